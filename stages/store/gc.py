"""Garbage collection of the scene store in two steps: a tombstone names what is dead; what it names and is still dead
a grace period later is deleted.

    gc/<tombstone>/ac/<op>/<generation>   doomed actions, `<key>.<result>` a line
    gc/<tombstone>/rest/<number>          doomed pages and blobs, a name a line
    gc/<tombstone>/whole                  written last: its time starts the grace period
    gc/<tombstone>/kept/<digest>          names of it that were used since, a line each: they stay

Dead is an action whose result no root names, that is older than the grace period and that no run has found done since
it was doomed (`rescue`); and a blob that no root and no action names, as old. An action goes before its blobs, and a
blob stays while an action that stays names it: a kill between any two deletions leaves blobs too many, never too few.
Ages are taken by the place's own clock. Files that a run put in as they lay in its checkout are no roots: DVC keeps
them, and each run that reads them puts them in again. Records (actions/, runs/) stay.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.lib.digests import digest_bytes
from stages.store.names import Names, action_name, is_digest, outputs_of, parse_action, parse_blob, result_digest
from stages.store.objects import Listed, Objects
from stages.store.store import Store, blob_name

NAMES_A_FILE = 100_000
CLOCK = "gc/clock"
BATCH = 1_000  # names deleted between two looks at what runs have rescued


@dataclass(frozen=True)
class Live:
    """Digests (32 bytes) that the roots name: of results, and of all blobs, results included."""

    results: set[bytes] = field(default_factory=set)
    blobs: set[bytes] = field(default_factory=set)

    def add(self, document: Mapping[str, Any]) -> None:
        """Notes a result document, or a row of a manifest, which is one with a name."""
        result = bytes.fromhex(result_digest(document))
        self.results.add(result)
        self.blobs.update({result, *outputs_of(document)})


@dataclass(frozen=True)
class Tombstone:
    """What an earlier collection doomed.

    name    gc/<tombstone>/
    made_s  when it was whole, by the place's clock; None where it is not
    last_s  when the last was written to it
    """

    name: str
    made_s: float | None
    last_s: float
    doomed: Names
    kept: Names


@dataclass(frozen=True)
class Survey:
    """What is dead now.

    ripe     tombstones whose grace period has passed; the others are `waiting`
    torn     tombstones that were never whole, and are old
    goes     what of the ripe ones is still dead: it can be deleted
    dooms    what is dead and in no tombstone that waits
    revived  waiting tombstone -> what of it lives again
    tally    (step, op) -> Counter of "results", "blobs", "bytes"; step is "goes", "dooms" or "waits", op may also be
             "(pages)" and "(nobody's)"
    """

    now_s: float
    grace_s: float
    ripe: tuple[Tombstone, ...]
    waiting: tuple[Tombstone, ...]
    torn: tuple[Tombstone, ...]
    goes: Names = field(default_factory=Names)
    dooms: Names = field(default_factory=Names)
    revived: dict[str, Names] = field(default_factory=lambda: defaultdict(Names))
    tally: dict[tuple[str, str], Counter] = field(default_factory=lambda: defaultdict(Counter))


def survey(store: Store, live: Live, grace_s: float) -> Survey:
    """What a collection with these roots would delete now and doom for later; it writes nothing but `gc/clock`."""
    now_s, known = clock(store.shared), _tombstones(store.shared)
    whole = [one for one in known if one.made_s is not None]
    found = Survey(now_s, grace_s, tuple(one for one in whole if now_s - one.made_s >= grace_s),
                   tuple(one for one in whole if now_s - one.made_s < grace_s),
                   tuple(one for one in known if one.made_s is None and now_s - one.last_s >= grace_s))
    look = _Look(store, live, found, known)
    look.at_actions()
    look.at_pages()
    look.at_blobs()
    return found


class _Look:
    """One look through a store: actions, then pages, then blobs.

    named   blobs of what stays though no root names it
    spared  blobs of what is dead and not deleted now
    owners  blob -> op of a dead action that names it
    """

    def __init__(self, store: Store, live: Live, found: Survey, known: Iterable[Tombstone]) -> None:
        self.store, self.live, self.found = store, live, found
        self.kept = [one.kept for one in known]
        self.named: set[bytes] = set()
        self.spared: set[bytes] = set()
        self.owners: dict[bytes, str] = {}
        self.living: set[str] = set()  # generations with an action that stays

    def at_actions(self) -> None:
        held, dead = defaultdict(set), defaultdict(list)
        for one in self.store.shared.list("ac/"):
            if not (parsed := parse_action(one.name)):
                continue
            generation, pair = parsed
            is_live = pair[32:] in self.live.results
            if not is_live and not self._is_young(one) and not any(pair in kept for kept in self.kept):
                dead[generation].append(pair)
                continue
            self._revive(pair, generation)
            self.living.add(generation)
            if not is_live:
                held[generation].add(pair[32:])
        for generation, results in held.items():
            for result, document in _documents(self.store, generation, results):
                self.named |= {result, *outputs_of(document)}
        for generation, pairs in dead.items():
            self._dead_actions(generation, pairs)

    def _dead_actions(self, generation: str, pairs: list[bytes]) -> None:
        op = generation.partition("/")[0]
        stays = set()
        for pair in pairs:
            step = self._doom(pair, generation)
            self.found.tally[step, op]["results"] += 1
            if step != "goes":
                stays.add(pair[32:])
        for result, document in _documents(self.store, generation, {pair[32:] for pair in pairs}):
            for blob in (result, *outputs_of(document)):
                self.owners.setdefault(blob, op)
                if result in stays:
                    self.spared.add(blob)

    def at_pages(self) -> None:
        for one in self.store.shared.list("pages/"):
            generation, _, digest = one.name.removeprefix("pages/").rpartition("/")
            if not is_digest(digest):
                continue
            blob = bytes.fromhex(digest)
            if generation in self.living or self._is_young(one):
                self._revive(one.name)
                self.named.add(blob)
                continue
            self.owners[blob] = "(pages)"
            if self._doom(one.name) != "goes":
                self.spared.add(blob)

    def at_blobs(self) -> None:
        for one in self.store.shared.list("cas/"):
            blob = parse_blob(one.name)
            if blob is None:
                continue
            if blob in self.live.blobs or blob in self.named or self._is_young(one):
                self._revive(blob)
            else:
                step = self._doom(blob)
                self.found.tally[step, self.owners.get(blob, "(nobody's)")] += Counter(blobs=1, bytes=one.bytes)

    def _is_young(self, one: Listed) -> bool:
        return self.found.now_s - one.modified_s < self.found.grace_s

    def _doom(self, mark: bytes | str, generation: str = "") -> str:
        """Notes something dead; which step it is at."""
        if any(mark in one.doomed for one in self.found.waiting):
            return "waits"
        if mark not in self.spared and any(mark in one.doomed and mark not in one.kept for one in self.found.ripe):
            self.found.goes.of[mark] = generation
            return "goes"
        self.found.dooms.of[mark] = generation
        return "dooms"

    def _revive(self, mark: bytes | str, generation: str = "") -> None:
        for one in self.found.waiting:
            if mark in one.doomed and mark not in one.kept:
                self.found.revived[one.name].of[mark] = generation


def sweep(store: Store, found: Survey) -> None:
    """Deletes what the survey says can go, actions before blobs; the ripe tombstones last. Killed, it goes on next
    time. What runs rescue, make or put meanwhile stays."""
    shared, rescued = store.shared, _Rescued(store, found.ripe)

    def old(prefix: str) -> Iterator[str]:
        return (one.name for one in shared.list(prefix) if found.now_s - one.modified_s >= found.grace_s)

    for generation, pairs in found.goes.actions().items():
        listed = {parsed[1] for name in old(f"ac/{generation}/") if (parsed := parse_action(name))}
        for batch in _batches(pair for pair in pairs if pair in listed):
            rescued.look()
            shared.delete([action_name(generation, pair) for pair in batch if pair not in rescued.names])
    shared.delete([name for name in found.goes.rest() if name.startswith("pages/")])
    shards = itertools.groupby(found.goes.blobs(), key=lambda digest: digest[:1].hex())
    for shard, digests in shards:
        listed = set(map(parse_blob, old(f"cas/{shard}/")))
        for batch in _batches(digest for digest in digests if digest in listed):
            rescued.look()
            shared.delete([blob_name(digest.hex()) for digest in batch if digest not in rescued.names])
    for one in (*found.ripe, *found.torn):
        names = sorted(shared.names(one.name))
        shared.delete([f"{one.name}whole"])
        shared.delete(names)


def bury(store: Store, found: Survey) -> None:
    """Writes what is newly dead as a tombstone, and strikes out of the earlier ones what lives again."""
    shared = store.shared
    for tombstone, names in found.revived.items():
        _keep(shared, tombstone, names.names())
    if not found.dooms:
        return
    tombstone = f"gc/{time.time_ns()}-{os.getpid()}/"
    for generation, pairs in found.dooms.actions().items():
        lines = (f"{pair[:32].hex()}.{pair[32:].hex()}" for pair in pairs)
        shared.write(f"{tombstone}ac/{generation}", "\n".join(lines).encode())
    for number, names in enumerate(_batches(found.dooms.rest(), NAMES_A_FILE)):
        shared.write(f"{tombstone}rest/{number:06}", "\n".join(names).encode())
    shared.write(f"{tombstone}whole", b"")


def rescue(shared: Objects, generation: str, keys: Collection[str]) -> None:
    """Keeps those of the done actions that a tombstone names: a run is about to use their results."""
    for name in sorted(shared.names("gc/")):
        tombstone, _, what = name.partition("/ac/")
        if what == generation:
            used = [line for line in _lines(shared, name) if line.partition(".")[0] in keys]
            _keep(shared, f"{tombstone}/", (f"ac/{generation}/{line[:2]}/{line}" for line in used))


def clock(shared: Objects) -> float:
    """The place's time now, in seconds since 1970: machines' clocks differ."""
    shared.write(CLOCK, b"")
    return next(one.modified_s for one in shared.list(CLOCK) if one.name == CLOCK)


class _Rescued:
    """What runs keep of the ripe tombstones while these are swept.

    names  the actions, and the blobs of their results
    """

    def __init__(self, store: Store, ripe: Iterable[Tombstone]) -> None:
        self.names = Names()
        self._store, self._seen = store, set()
        self._tombstones = [one.name for one in ripe]

    def look(self) -> None:
        """Reads what was added."""
        for tombstone in self._tombstones:
            for name in set(self._store.shared.names(f"{tombstone}kept/")) - self._seen:
                self._seen.add(name)
                for line in _lines(self._store.shared, name):
                    self._add(line)

    def _add(self, name: str) -> None:
        self.names.add(name)
        if parsed := parse_action(name):
            result = parsed[1][32:]
            document = self._store.result(result.hex()) or {"outputs": {}}
            self.names.of |= dict.fromkeys({result, *outputs_of(document)}, "")


def _tombstones(shared: Objects) -> list[Tombstone]:
    listed = defaultdict(list)
    for one in shared.list("gc/"):
        if one.name.count("/") > 1:
            listed["/".join(one.name.split("/")[:2]) + "/"].append(one)
    return [_tombstone(shared, name, listed[name]) for name in sorted(listed)]


def _tombstone(shared: Objects, name: str, listed: Iterable[Listed]) -> Tombstone:
    made_s, doomed, kept = None, Names(), Names()
    for one in listed:
        kind, _, rest = one.name.removeprefix(name).partition("/")
        if kind == "whole":
            made_s = one.modified_s
        elif kind == "ac":
            for line in _lines(shared, one.name):
                doomed.add(f"ac/{rest}/{line[:2]}/{line}")
        else:
            for line in _lines(shared, one.name):
                (kept if kind == "kept" else doomed).add(line)
    return Tombstone(name, made_s, max(one.modified_s for one in listed), doomed, kept)


def _lines(shared: Objects, name: str) -> list[str]:
    return (shared.read(name) or b"").decode().splitlines()


def _keep(shared: Objects, tombstone: str, names: Iterable[str]) -> None:
    data = "\n".join(names).encode()
    if data:
        shared.create(f"{tombstone}kept/{digest_bytes(data)}", data)


def _documents(store: Store, generation: str, results: set[bytes]) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
    for result, document in store.each_document(generation, [digest.hex() for digest in results]):
        yield bytes.fromhex(result), json.loads(document)


def _batches(names: Iterable[Any], size: int = BATCH) -> Iterator[list[Any]]:
    left = iter(names)
    while batch := [name for _, name in zip(range(size), left)]:
        yield batch
