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
them, and each plan puts them in again. Records (actions/, runs/) stay.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.lib.digests import canonical, digest_bytes
from stages.store.objects import Listed, Objects
from stages.store.store import Store, blob_name

NAMES_A_FILE = 100_000
CLOCK = "gc/clock"
BATCH = 1_000  # names deleted between two looks at what runs have rescued
HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Live:
    """Digests (32 bytes) that the roots name: of results, and of all blobs, results included."""

    results: set[bytes] = field(default_factory=set)
    blobs: set[bytes] = field(default_factory=set)

    def add(self, document: Mapping[str, Any]) -> None:
        """Notes a result document, or a row of a manifest, which is one with a name."""
        result = bytes.fromhex(result_digest(document))
        self.results.add(result)
        self.blobs.update({result, *_outputs(document)})


@dataclass(frozen=True)
class Names:
    """Names of the store, packed: a million take 200 MB.

    actions  `<op>/<generation>` -> keys and results, 64 bytes each
    pages    names
    blobs    digests, 32 bytes
    """

    actions: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    pages: set[str] = field(default_factory=set)
    blobs: set[bytes] = field(default_factory=set)

    def __len__(self) -> int:
        return sum(map(len, self.actions.values())) + len(self.pages) + len(self.blobs)

    def add(self, name: str) -> None:
        """Takes in a name; one that is not of the store's layout is passed over."""
        if found := parse_action(name):
            self.actions[found[0]].add(found[1])
        elif name.startswith("pages/"):
            self.pages.add(name)
        elif digest := parse_blob(name):
            self.blobs.add(digest)

    def has_action(self, generation: str, pair: bytes) -> bool:
        """Whether the action is among them."""
        return pair in self.actions.get(generation, ())

    def names(self) -> Iterator[str]:
        """All of them, actions first, blobs last, sorted."""
        for generation in sorted(self.actions):
            yield from (action_name(generation, pair) for pair in sorted(self.actions[generation]))
        yield from sorted(self.pages)
        yield from (blob_name(digest.hex()) for digest in sorted(self.blobs))


@dataclass(frozen=True)
class Tombstone:
    """What an earlier collection doomed.

    name    gc/<tombstone>/
    made_s  when it was whole, by the place's clock; None where it never was
    """

    name: str
    made_s: float | None
    doomed: Names
    kept: Names


@dataclass(frozen=True)
class Survey:
    """What is dead now. A run of `survey` alone changes nothing.

    ripe     tombstones whose grace period has passed; the others are `waiting`
    goes     what of the ripe ones is still dead: it can be deleted
    dooms    what is dead and in no tombstone that waits
    revived  waiting tombstone -> what of it lives again
    torn     tombstones that were never whole, and are old
    tally    (step, op) -> Counter of "results", "blobs", "bytes"; step is "goes", "dooms" or "waits", op may also be
             "(pages)" and "(nobody's)"
    """

    now_s: float
    grace_s: float
    ripe: tuple[Tombstone, ...]
    waiting: tuple[Tombstone, ...]
    torn: tuple[Tombstone, ...]
    goes: Names
    dooms: Names
    revived: dict[str, Names]
    tally: dict[tuple[str, str], Counter]


def survey(store: Store, live: Live, grace_s: float) -> Survey:
    """What a collection with these roots would delete now and doom for later; it writes nothing but `gc/clock`."""
    shared, now_s = store.shared, clock(store.shared)
    tombstones = list(_tombstones(shared))
    ripe = tuple(one for one in tombstones if one.made_s is not None and now_s - one.made_s >= grace_s)
    waiting = tuple(one for one in tombstones if one.made_s is not None and now_s - one.made_s < grace_s)
    torn = tuple(one for one in tombstones if one.made_s is None and _torn_is_old(shared, one.name, now_s - grace_s))
    found = Survey(now_s, grace_s, ripe, waiting, torn, Names(), Names(), defaultdict(Names), defaultdict(Counter))

    def is_young(one: Listed) -> bool:
        return now_s - one.modified_s < grace_s

    def judge(kind: str, name: Any, generation: str = "") -> str:
        """Where a dead name goes: the step of the tally."""
        def has(names: Names) -> bool:
            return names.has_action(generation, name) if kind == "actions" else name in getattr(names, kind)

        if any(has(one.doomed) for one in waiting):
            return "waits"
        return "goes" if any(has(one.doomed) and not has(one.kept) for one in ripe) else "dooms"

    # actions
    dead: dict[str, set[bytes]] = defaultdict(set)
    held: dict[str, set[bytes]] = defaultdict(set)  # stay, though no root names their results
    kept_generations = set()
    for one in shared.list("ac/"):
        if not (parsed := parse_action(one.name)):
            continue
        generation, pair = parsed
        if pair[32:] in live.results:
            _revive(found, "actions", pair, generation)
        elif is_young(one) or any(t.kept.has_action(generation, pair) for t in tombstones):
            held[generation].add(pair[32:])
            _revive(found, "actions", pair, generation)
        else:
            dead[generation].add(pair)
            continue
        kept_generations.add(generation)
    named = set()  # blobs of what is held
    for generation, results in held.items():
        for result, document in _documents(store, generation, results):
            named |= {result, *_outputs(document)}
    spared, owners = set(), {}  # blobs of the dead that are not deleted now; blob -> op of the dead
    for generation, pairs in dead.items():
        op, stays = generation.partition("/")[0], set()
        for pair in pairs:
            step = judge("actions", pair, generation)
            found.tally[step, op]["results"] += 1
            if step == "goes":
                found.goes.actions[generation].add(pair)
                continue
            stays.add(pair[32:])
            if step == "dooms":
                found.dooms.actions[generation].add(pair)
        for result, document in _documents(store, generation, {pair[32:] for pair in pairs}):
            blobs = {result, *_outputs(document)}
            for blob in blobs:
                owners.setdefault(blob, op)
            if result in stays:
                spared |= blobs
    # pages
    for one in shared.list("pages/"):
        generation, _, digest = one.name.removeprefix("pages/").rpartition("/")
        if not is_digest(digest):
            continue
        if generation in kept_generations or is_young(one):
            named.add(bytes.fromhex(digest))
            _revive(found, "pages", one.name)
            continue
        owners[bytes.fromhex(digest)] = "(pages)"
        step = judge("pages", one.name)
        if step == "goes":
            found.goes.pages.add(one.name)
            continue
        spared.add(bytes.fromhex(digest))
        if step == "dooms":
            found.dooms.pages.add(one.name)
    # blobs
    for one in shared.list("cas/"):
        digest = parse_blob(one.name)
        if digest is None:
            continue
        if digest in live.blobs or digest in named or is_young(one):
            _revive(found, "blobs", digest)
            continue
        step = judge("blobs", digest)
        if step == "goes" and digest in spared:
            step = "dooms"
        if step != "waits":
            getattr(found, step).blobs.add(digest)
        found.tally[step, owners.get(digest, "(nobody's)")] += Counter(blobs=1, bytes=one.bytes)
    return found


def sweep(store: Store, found: Survey) -> None:
    """Deletes what the survey says can go, actions before blobs; the ripe tombstones last. Killed, it goes on next
    time. What runs rescue or write meanwhile stays."""
    shared, rescued = store.shared, _Rescued(store, found.ripe)
    def old(prefix: str) -> Iterator[str]:  # what was made again or put again since the survey is young
        return (one.name for one in shared.list(prefix) if found.now_s - one.modified_s >= found.grace_s)

    for generation, pairs in found.goes.actions.items():
        listed = {parsed[1] for name in old(f"ac/{generation}/") if (parsed := parse_action(name))}
        for batch in _batches(sorted(pairs & listed)):
            rescued.look()
            left = (pair for pair in batch if not rescued.names.has_action(generation, pair))
            shared.delete([action_name(generation, pair) for pair in left])
    shared.delete(sorted(found.goes.pages))
    shards = defaultdict(set)
    for digest in found.goes.blobs:
        shards[digest[:1]].add(digest)
    for shard, digests in sorted(shards.items()):
        for batch in _batches(sorted(digests.intersection(map(parse_blob, old(f"cas/{shard.hex()}/"))))):
            rescued.look()
            shared.delete([blob_name(digest.hex()) for digest in batch if digest not in rescued.names.blobs])
    for one in (*found.ripe, *found.torn):
        names = sorted(shared.names(one.name))
        shared.delete([f"{one.name}whole"])
        shared.delete(names)


def bury(store: Store, found: Survey) -> None:
    """Writes what is newly dead as a tombstone, and strikes out of the earlier ones what lives again."""
    shared = store.shared
    for tombstone, names in found.revived.items():
        _keep(shared, tombstone, names.names())
    if not len(found.dooms):
        return
    tombstone = f"gc/{time.time_ns()}-{os.getpid()}/"
    for generation, pairs in found.dooms.actions.items():
        shared.write(f"{tombstone}ac/{generation}",
                     "\n".join(f"{pair[:32].hex()}.{pair[32:].hex()}" for pair in sorted(pairs)).encode())
    rest = Names(pages=found.dooms.pages, blobs=found.dooms.blobs)
    for number, names in enumerate(_batches(rest.names(), NAMES_A_FILE)):
        shared.write(f"{tombstone}rest/{number:06}", "\n".join(names).encode())
    shared.write(f"{tombstone}whole", b"")


def rescue(shared: Objects, generation: str, keys: Collection[str]) -> None:
    """Keeps those of the done actions that a tombstone names: a run is about to use their results."""
    for name in sorted(shared.names("gc/")):
        tombstone, _, what = name.partition("/ac/")
        if what == generation and (data := shared.read(name)):
            used = [line for line in data.decode().splitlines() if line.partition(".")[0] in keys]
            _keep(shared, f"{tombstone}/", (f"ac/{generation}/{line[:2]}/{line}" for line in used))


def clock(shared: Objects) -> float:
    """The place's time now, in seconds since 1970: machines' clocks differ."""
    shared.write(CLOCK, b"")
    return next(one.modified_s for one in shared.list(CLOCK) if one.name == CLOCK)


def result_digest(document: Mapping[str, Any]) -> str:
    """The result's digest, of its document or of a manifest's row."""
    return digest_bytes(canonical({"facts": document["facts"], "outputs": document["outputs"]}))


def parse_action(name: str) -> tuple[str, bytes] | None:
    """(`<op>/<generation>`, key and result in 64 bytes) of an AC entry's name; None for any other name."""
    parts = name.split("/")
    key, _, result = parts[-1].partition(".")
    if len(parts) != 5 or parts[0] != "ac" or not (is_digest(key) and is_digest(result)) or parts[3] != key[:2]:
        return None
    return f"{parts[1]}/{parts[2]}", bytes.fromhex(key + result)


def action_name(generation: str, pair: bytes) -> str:
    """Name of an AC entry."""
    return f"ac/{generation}/{pair[:1].hex()}/{pair[:32].hex()}.{pair[32:].hex()}"


def parse_blob(name: str) -> bytes | None:
    """The digest in a blob's name; None for any other name."""
    digest = name.rpartition("/")[2]
    return bytes.fromhex(digest) if is_digest(digest) and name == blob_name(digest) else None


def is_digest(text: str) -> bool:
    """Whether it is 64 hex digits as sha256 are written."""
    return len(text) == 64 and HEX.issuperset(text)


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
            for name in self._store.shared.names(f"{tombstone}kept/"):
                if name not in self._seen:
                    self._seen.add(name)
                    self._add((self._store.shared.read(name) or b"").decode().splitlines())

    def _add(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.names.add(line)
            if parsed := parse_action(line):
                result = parsed[1][32:]
                self.names.blobs.add(result)
                self.names.blobs.update(_outputs(self._store.result(result.hex()) or {"outputs": {}}))


def _tombstones(shared: Objects) -> Iterator[Tombstone]:
    made = defaultdict(lambda: Tombstone("", None, Names(), Names()))
    for one in sorted(shared.list("gc/"), key=lambda one: one.name):
        _, number, *rest = one.name.split("/")
        if not rest:
            continue
        own = made[number]
        if rest == ["whole"]:
            made[number] = Tombstone(own.name, one.modified_s, own.doomed, own.kept)
            continue
        made[number] = Tombstone(f"gc/{number}/", own.made_s, own.doomed, own.kept)
        lines = (shared.read(one.name) or b"").decode().splitlines()
        generation = "/".join(rest[1:])
        for line in lines:
            if rest[0] == "ac":
                own.doomed.add(f"ac/{generation}/{line[:2]}/{line}")
            else:
                (own.kept if rest[0] == "kept" else own.doomed).add(line)
    yield from (one for one in made.values() if one.name)


def _torn_is_old(shared: Objects, tombstone: str, before_s: float) -> bool:
    return all(one.modified_s <= before_s for one in shared.list(tombstone))


def _revive(found: Survey, kind: str, name: Any, generation: str = "") -> None:
    for one in found.waiting:
        if kind == "actions":
            if one.doomed.has_action(generation, name) and not one.kept.has_action(generation, name):
                found.revived[one.name].actions[generation].add(name)
        elif name in getattr(one.doomed, kind) and name not in getattr(one.kept, kind):
            getattr(found.revived[one.name], kind).add(name)


def _keep(shared: Objects, tombstone: str, names: Iterable[str]) -> None:
    data = "\n".join(names).encode()
    if data:
        shared.create(f"{tombstone}kept/{digest_bytes(data)}", data)


def _documents(store: Store, generation: str, results: set[bytes]) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
    for result, document in store.each_document(generation, [digest.hex() for digest in results]):
        yield bytes.fromhex(result), json.loads(document)


def _outputs(document: Mapping[str, Any]) -> set[bytes]:
    return {bytes.fromhex(digest) for digest, _ in document["outputs"].values()}


def _batches(names: Iterable[Any], size: int = BATCH) -> Iterator[list[Any]]:
    left = iter(names)
    while batch := [name for _, name in zip(range(size), left)]:
        yield batch
