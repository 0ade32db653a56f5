"""What an attempt that is stopped leaves to the next one: the two newest states of an action that is under way.

    checkpoints/<action key>/started    empty; its time is that of the first attempt
    checkpoints/<action key>/<step>     a state
    checkpoints/<action key>/LATEST     written last: step, sha256 and bytes of the states, the newest first, as JSON

They lie beside the action cache and never count as a result: they go when the action is committed, and with a
collection when nobody has gone on for its grace period. How often work is interrupted, and when, decides what is done
twice, never what comes out.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from stages.lib.digests import canonical, digest_bytes
from stages.lib.errors import EXIT_TEMPORARY, RemoteError, RoadmillError

ROOT = "checkpoints/"
NUM_KEPT = 2


class StoppedError(RoadmillError):
    """The work was asked to stop, and did; what it had is kept."""

    exit_code = EXIT_TEMPORARY


class Listed(Protocol):
    """One object of a listing."""

    name: str
    bytes: int
    modified_s: float


class Place(Protocol):
    """Where they lie: what of a store of named bytes is needed here."""

    where: str

    def names(self, prefix: str) -> Iterator[str]: ...
    def list(self, prefix: str) -> Iterator[Listed]: ...
    def read(self, name: str) -> bytes | None: ...
    def write(self, name: str, data: bytes) -> None: ...
    def create(self, name: str, data: bytes) -> bool: ...
    def delete(self, names: list[str]) -> None: ...


@dataclass(frozen=True)
class Standing:
    """How far an action has come, for who waits for it; times are of the place's own clock, in seconds since 1970.

    started_s  when its first attempt began
    saved_s    when its newest state was kept; None where none was
    step       of that state; 0 where there is none
    """

    started_s: float
    saved_s: float | None
    step: int


class Checkpoints:
    """The states of one action, one attempt long: `with Checkpoints(place, action key, every_s) as checkpoints`.

    Within, SIGTERM asks for a last state; after it the signal goes on to whoever had it before.
    """

    def __init__(self, place: Place, key: str, every_s: float) -> None:
        self._place, self._prefix, self._every_s = place, f"{ROOT}{key}/", every_s
        self._kept: list[dict[str, Any]] = []
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Checkpoints:
        self._place.create(f"{self._prefix}started", b"")
        if threading.current_thread() is threading.main_thread():  # no other may set it
            self._before = signal.signal(signal.SIGTERM, self._ask)
        self._saved_s = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self._asked:
                signal.raise_signal(signal.SIGTERM)

    def load(self) -> bytes | None:
        """The newest state that is whole; None where there is none. One that is gone or damaged is said and passed
        over."""
        listed = self._listed()
        for one in listed:
            data = self._place.read(self._name(one["step"]))
            if data is not None and digest_bytes(data) == one["sha256"]:
                self._kept = [other for other in listed if other["step"] <= one["step"]]
                if self._kept != listed:
                    self._point()  # at what is whole, before newer ones are compared with it
                print(f"goes on from step {one['step']}", file=sys.stderr, flush=True)
                return data
            fault = "gone" if data is None else f"damaged, {len(data)} bytes that are not {one['sha256'][:12]}…"
            print(f"{self._place.where}/{self._name(one['step'])}: {fault}; the one before is taken", file=sys.stderr)
        if listed:
            self._place.delete([f"{self._prefix}LATEST"])
        return None

    def offer(self, step: int, state: Callable[[], bytes]) -> None:
        """Keeps the state after so many steps where it is time, or the work is asked to stop.

        Raises StoppedError in the latter case. A place that fails is said: the work goes on, and tries again later.
        """
        if not self._asked and time.monotonic() - self._saved_s < self._every_s:
            return
        self._saved_s = time.monotonic()
        try:
            self._save(step, state())
        except (RemoteError, OSError) as error:
            print(f"the state after step {step} could not be kept: {error}", file=sys.stderr, flush=True)
        if self._asked:
            raise StoppedError(f"asked to stop after step {step}\n  the same command goes on from there")

    def forget(self) -> None:
        """Removes all that was kept of the action: it is done."""
        self._place.delete([f"{self._prefix}LATEST"])
        self._place.delete(list(self._place.names(self._prefix)))

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _save(self, step: int, state: bytes) -> None:
        if any(one["step"] >= step for one in self._listed()):
            return  # a twin of this attempt is further
        self._place.write(self._name(step), state)
        newest = {"step": step, "sha256": digest_bytes(state), "bytes": len(state)}
        self._kept = [newest, *self._kept][:NUM_KEPT]
        self._point()
        oldest = self._name(self._kept[-1]["step"])
        self._place.delete([name for name in self._place.names(self._prefix)
                            if name.rpartition("/")[2].isdigit() and name < oldest])

    def _point(self) -> None:
        self._place.write(f"{self._prefix}LATEST", canonical(self._kept))

    def _listed(self) -> list[dict[str, Any]]:
        return _parsed(self._place.read(f"{self._prefix}LATEST"))

    def _name(self, step: int) -> str:
        return f"{self._prefix}{step:09}"


class _Nothing:
    """Checkpoints that keep nothing."""

    def load(self) -> None:
        """There is none."""

    def offer(self, step: int, state: Callable[[], bytes]) -> None:
        """Keeps nothing."""


NOTHING = _Nothing()


def standing(place: Place, key: str) -> Standing | None:
    """How far the action has come; None where it was never begun, or is done."""
    prefix = f"{ROOT}{key}/"
    times = {one.name.removeprefix(prefix): one.modified_s for one in place.list(prefix)}
    if "started" not in times:
        return None
    steps = [one["step"] for one in _parsed(place.read(f"{prefix}LATEST"))]
    return Standing(times["started"], times.get("LATEST"), max(steps, default=0))


def abandoned(place: Place, before_s: float) -> list[Listed]:
    """All that is kept of actions of which nothing was written since then, by the place's clock."""
    of_key = defaultdict(list)
    for one in place.list(ROOT):
        of_key[one.name.split("/")[1]].append(one)
    return [one for key in sorted(of_key) if max(one.modified_s for one in of_key[key]) < before_s
            for one in of_key[key]]


def _parsed(latest: bytes | None) -> list[dict[str, Any]]:
    """The states that LATEST names; none where it is gone or damaged: the work begins anew."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return [{"step": int(one["step"]), "sha256": str(one["sha256"]), "bytes": int(one["bytes"])}
                for one in json.loads(latest or b"[]")]
    return []
