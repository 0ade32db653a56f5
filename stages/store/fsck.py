"""A look at every byte of a store: what is damaged, what is missing, what nobody needs; and its repair.

The look changes nothing. Memory follows the number of names, not of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.lib.digests import digest_bytes, digest_file
from stages.lib.errors import RoadmillError
from stages.store.gc import Live
from stages.store.names import Names, action_name, is_digest, outputs_of, parse_action, parse_blob
from stages.store.store import Store, blob_name, concurrently

Watch = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass
class Findings:
    """What was found.

    num        what was looked at -> how many: blobs, bytes, results, pages, actions
    damaged    blobs whose bytes are not those of their names
    lost       blobs that are needed, and gone or damaged -> op of an action that has them, "" where none has
    hits       actions that count as done, but lack their result or a file of it
    pages      names of pages whose blob is gone or damaged
    actions    names of action documents that are not what was hashed
    foreign    names that the store does not give
    orphans    blobs that nothing names, whole or not
    """

    num: dict[str, int]
    damaged: set[bytes] = field(default_factory=set)
    lost: dict[bytes, str] = field(default_factory=dict)
    hits: Names = field(default_factory=Names)
    pages: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    num_orphans: int = 0
    orphan_bytes: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether all that is needed is there, and all that is there is right."""
        return not (self.damaged or self.lost or self.hits or self.pages or self.actions)


@dataclass
class Repaired:
    """What a repair did.

    restored   blobs that are whole again
    forgotten  names of actions that count as not done now: their results can't be brought back
    lost       blobs that roots need and that can't be brought back -> why
    """

    restored: set[bytes] = field(default_factory=set)
    forgotten: list[str] = field(default_factory=list)
    lost: dict[bytes, str] = field(default_factory=dict)


def check(store: Store, live: Live, watch: Watch = lambda blobs, total: blobs) -> Findings:
    """Reads all of the shared store. `live` is needed beside what the store's own actions name.

    watch(what, how many) passes blobs or action documents on, as they are asked for.
    """
    found, entries, sizes = Findings({}), Names(), {}
    for name in store.shared.names("ac/"):  # before the blobs: what is committed meanwhile has them
        entries.add(name) if parse_action(name) else found.foreign.append(name)
    pages = _by_digest(store, found, "pages/", "")
    for one in store.shared.list("cas/"):
        if digest := parse_blob(one.name):
            sizes[digest] = one.bytes
        else:
            found.foreign.append(one.name)
    results, outputs = {pair[32:] for pair in entries.of}, {}
    for digest, right, data in _read(store, watch(list(sizes), len(sizes)), results):
        if not right:
            found.damaged.add(digest)
        elif digest in results:
            outputs[digest] = b"".join(sorted(outputs_of(json.loads(data))))
    inputs = _check_actions(store, found, watch)
    found.num |= {"blobs": len(sizes), "bytes": sum(sizes.values()), "results": len(entries), "pages": len(pages)}

    def is_lost(digest: bytes) -> bool:
        return digest not in sizes or digest in found.damaged

    for pair, generation in entries.of.items():
        lacking = [digest for digest in (pair[32:], *_split(outputs.get(pair[32:], b""))) if is_lost(digest)]
        if lacking:
            found.lost |= dict.fromkeys(lacking, generation.partition("/")[0])
            found.hits.of[pair] = generation
    for digest in filter(is_lost, live.blobs):
        found.lost.setdefault(digest, "")
    found.pages = sorted(name for digest, name in pages.items() if is_lost(digest))
    for named in (results, live.blobs, inputs, pages, *map(_split, outputs.values())):
        for digest in named:
            sizes.pop(digest, None)
    found.num_orphans, found.orphan_bytes = len(sizes), sum(sizes.values())
    return found


def repair(store: Store, found: Findings, live: Live, documents: Mapping[bytes, bytes]) -> Repaired:
    """Brings back what was lost: from the documents given, pages, this machine's folder, or by doing it again. Then
    forgets the actions, pages and records that can't be brought back, and removes damaged blobs that nothing replaced.

    documents  digest -> result document, of those that are lost
    """
    shared, done = store.shared, Repaired()
    documents = {**_in_pages(store, found), **documents}

    def bring_back(digest: bytes) -> bool:
        if digest not in done.restored and digest not in why:
            why[digest] = _bring_back(store, digest, documents.get(digest))
            if not why[digest]:
                done.restored.add(digest)
                del why[digest]
        return digest in done.restored

    def is_kept(digest: str, num_bytes: int) -> bool:
        raw = bytes.fromhex(digest)
        is_right = raw not in found.damaged and raw not in found.lost and store.keeps(digest, num_bytes)
        return is_right or bring_back(raw)

    why: dict[bytes, str] = {}
    for digest in sorted(found.lost):
        bring_back(digest)
    for pair, generation in found.hits.of.items():
        document = store.result(pair[32:].hex())
        if document is None or not all(is_kept(*blob) for blob in document["outputs"].values()):
            done.forgotten.append(action_name(generation, pair))
    done.lost = {digest: text for digest, text in why.items() if digest in live.blobs}
    shared.delete(done.forgotten)
    shared.delete([*found.pages, *found.actions])
    shared.delete([blob_name(digest.hex()) for digest in sorted(found.damaged - done.restored)])
    return done


def _in_pages(store: Store, found: Findings) -> dict[bytes, bytes]:
    """Digest -> result document, of those that are lost and that a page repeats."""
    documents, lost = {}, {pair[32:] for pair in found.hits.of} & found.lost.keys()
    for name in sorted(store.shared.names("pages/")) if lost else ():
        path = store.find(name.rpartition("/")[2]) if name not in found.pages else None
        for line in path.read_bytes().split(b"\n") if path else ():
            if (digest := bytes.fromhex(digest_bytes(line))) in lost:
                documents[digest] = line
    return documents


def _bring_back(store: Store, digest: bytes, document: bytes | None) -> str:
    """Why the blob can't be had; "" where it is whole in the shared store again."""
    name, text = blob_name(digest.hex()), "nothing known makes it"
    if document is not None:
        store.local.write(name, document)
    elif not _is_here(store, digest):
        try:
            store.rebuild(digest.hex())
        except (RoadmillError, OSError) as error:
            text = str(error)
    if not _is_here(store, digest):
        return text
    if store.shared is not store.local:
        store.shared.write(name, store.local.path(name))
    return ""


def _is_here(store: Store, digest: bytes) -> bool:
    try:
        return digest_file(store.local.path(blob_name(digest.hex()))) == digest.hex()
    except FileNotFoundError:
        return False


def _by_digest(store: Store, found: Findings, folder: str, suffix: str) -> dict[bytes, str]:
    """Digest -> name of the objects that are called by one, as `<folder><op>/<16 digits>/<digest><suffix>`."""
    names = {}
    for name in store.shared.names(folder):
        digest = name.rpartition("/")[2].removesuffix(suffix)
        if name.count("/") == 3 and name.endswith(suffix) and is_digest(digest):
            names[bytes.fromhex(digest)] = name
        else:
            found.foreign.append(name)
    return names


def _check_actions(store: Store, found: Findings, watch: Watch) -> set[bytes]:
    """Digests that whole action documents name as inputs; notes the others."""
    inputs, names = set(), _by_digest(store, found, "actions/", ".json")
    found.num["actions"] = len(names)
    for key, right, data in _read(store, watch(names, len(names)), names.keys(), names.get):
        if right:
            inputs.update(bytes.fromhex(digest) for digest in json.loads(data)["inputs"].values())
        else:
            found.actions.append(names[key])
    return inputs


def _read(store: Store, digests: Iterable[bytes], wanted: Collection[bytes],
          name_of: Callable[[bytes], str] = lambda digest: blob_name(digest.hex())) -> Iterator[
              tuple[bytes, bool, bytes]]:
    """(digest, whether the object's bytes have it, and its bytes if they are `wanted` and right), in order."""
    is_local = store.shared is store.local
    with store.scratch() as folder:
        def look(digest: bytes) -> tuple[bytes, bool, bytes]:
            path = store.local.path(name_of(digest)) if is_local else folder / digest.hex()
            try:
                got = digest_file(path) if is_local else store.shared.download(name_of(digest), path)
                right = got == digest.hex()
                return digest, right, path.read_bytes() if right and digest in wanted else b""
            except FileNotFoundError:
                return digest, False, b""
            finally:
                if not is_local:
                    path.unlink(missing_ok=True)

        yield from map(look, digests) if is_local else concurrently(look, digests)


def _split(packed: bytes) -> Iterator[bytes]:
    return (packed[start:start + 32] for start in range(0, len(packed), 32))
