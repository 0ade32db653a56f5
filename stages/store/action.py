"""An action: one operation on one item, and the key under which its result is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.lib.digests import canonical, digest_bytes


class Operation:
    """What all actions of one run share.

    generation  `<op>/<16 digits>` for it: one LIST tells the keys
    """

    __slots__ = ("_parts", "code", "generation", "knobs", "op", "salt")

    def __init__(self, op: str, knobs: Mapping[str, Any], code: str, salt: str) -> None:
        self.op, self.knobs, self.code, self.salt = op, knobs, code, salt
        shared = {"knobs": knobs, "code": code, "salt": salt}
        self.generation = f"{op}/{digest_bytes(canonical(shared))[:16]}"
        self._parts = (b'{"code":%s,"inputs":' % canonical(code),
                       b',"knobs":%s,"op":%s,"params":' % (canonical(knobs), canonical(op)),
                       b',"salt":%s}' % canonical(salt))

    def key(self, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        """sha256 of the canonical document of an action with these."""
        before, between, after = self._parts
        return digest_bytes(b"".join((before, canonical(inputs), between, canonical(params), after)))

    def action(self, params: Mapping[str, Any], inputs: Mapping[str, str]) -> Action:
        """The action on one item."""
        return Action(self.op, self.knobs, self.code, self.salt, params, inputs, self)


@dataclass(frozen=True, slots=True)
class Action:
    """What determines a result, and nothing else: where and when it runs is not in here.

    op         name of the operation
    knobs      the operation's parameters, equal for all its items
    code       digest of the code that runs
    salt       changed to disown everything made before
    params     parameters of this item
    inputs     role -> sha256 of the bytes read
    operation  the first four, where many actions share one
    key        sha256 of the canonical document
    """

    op: str
    knobs: Mapping[str, Any]
    code: str
    salt: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    operation: Operation | None = field(default=None, compare=False, repr=False)
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        operation = self.operation or Operation(self.op, self.knobs, self.code, self.salt)
        object.__setattr__(self, "operation", operation)
        object.__setattr__(self, "key", operation.key(self.params, self.inputs))

    @property
    def document(self) -> dict[str, Any]:
        """The action as plain JSON."""
        return {"op": self.op, "knobs": self.knobs, "code": self.code, "salt": self.salt,
                "params": self.params, "inputs": self.inputs}

    @property
    def generation(self) -> str:
        """`<op>/<16 digits>` for what all actions of one run share."""
        return self.operation.generation
