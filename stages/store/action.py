"""An action: one operation on one item, and the key under which its result is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stages.lib.digests import canonical, digest_bytes


@dataclass(frozen=True)
class Action:
    """What determines a result, and nothing else: where and when it runs is not in here.

    op      name of the operation
    knobs   the operation's parameters, equal for all its items
    code    digest of the code that runs
    salt    changed to disown everything made before
    params  parameters of this item
    inputs  role -> sha256 of the bytes read
    """

    op: str
    knobs: Mapping[str, Any]
    code: str
    salt: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def document(self) -> dict[str, Any]:
        """The action as plain JSON."""
        return {"op": self.op, "knobs": self.knobs, "code": self.code, "salt": self.salt,
                "params": self.params, "inputs": self.inputs}

    @cached_property
    def key(self) -> str:
        """sha256 of the canonical document."""
        return digest_bytes(canonical(self.document))

    @cached_property
    def generation(self) -> str:
        """`<op>/<16 digits>` for the parameters and code that all items of one run share: one LIST tells its keys."""
        shared = {"knobs": self.knobs, "code": self.code, "salt": self.salt}
        return f"{self.op}/{digest_bytes(canonical(shared))[:16]}"
