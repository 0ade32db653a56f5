"""The scene store: blobs by their sha256 (CAS), and which action gave which result (AC), for one machine or a team.

    cas/<hh>/<digest>                                  a blob
    ac/<op>/<generation>/<hh>/<key>.<result digest>    an action that was done; empty; the result document is a blob
    pages/<op>/<generation>/<digest>                   a blob of many result documents, one a line; empty
    actions/<op>/<item, 16 digits>/<key>.json          what was hashed, to explain hits and misses
    runs/<stage>/…                                     where and how long stages ran
    clones/<16 digits>.json                            a clone that ran stages here
    checkpoints/<key>/…                                what a training that was stopped goes on from
    gc/…                                               what collections have doomed: see `store.gc`

The same names and bytes in a folder and in a bucket. A store on S3 has a folder too: blobs are made and read there, and
the least recently used go when it is full. One listing of a generation tells what is done, pages tell the results
of many actions with one read; both are only faster ways to what the AC and the CAS say.

Every read verifies: a blob that is gone or damaged is fetched, else made again (`rebuild`), else an error.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.digests import canonical, digest_bytes, digest_file
from stages.lib.errors import ConfigError, RemoteError
from stages.lib.stage import Blob
from stages.store.action import Action
from stages.store.folder import Folder
from stages.store.objects import Objects

SINGLE_BYTES = 8 * 2**20  # blobs up to this size are put with one request, if absent
PAGE_DOCUMENTS = 20_000
PAGE_MIN_DOCUMENTS = 1_000  # fewer get no page
PAGES_SOUGHT = 100  # fewer are read one by one
LISTED_AT_ONCE = 1_000
THREADS = 16  # requests at once
BATCH = 1_000  # requests under way or waiting
FRESH_S = 3600.0  # a blob that is put again is written again when it is older: collections spare what is young
KEEP_S = 3600.0  # what was used in the last hour stays in the cache: somebody may be about to open it
SLACK = 0.05  # of the cache's limit, written between two looks at its size


class MissingBlobError(RemoteError):
    """A blob is neither in the store nor can it be made again."""


@dataclass(frozen=True)
class Store:
    """Blobs and done actions.

    local        folder through which all blobs pass
    shared       where they are kept for good: the same folder, or a bucket that a team shares
    cache_bytes  limit of `local` where `shared` is a bucket
    rebuild      rebuild(digest) runs the action that made the blob again and puts its outputs; False where no known
                 action made it
    """

    local: Folder
    shared: Objects
    cache_bytes: float = float("inf")
    rebuild: Callable[[str], bool] = lambda digest: False
    _verified: set[tuple] = field(default_factory=set, repr=False, compare=False)
    _put: set[str] = field(default_factory=set, repr=False, compare=False)
    _cache: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def in_folder(cls, root: Path, rebuild: Callable[[str], bool] = lambda digest: False) -> Store:
        """A store of one machine, or of several that mount the folder."""
        folder = Folder(root)
        return cls(folder, folder, rebuild=rebuild)

    # blobs --------------------------------------------------------------------------------------------------------
    def put_file(self, path: Path) -> Blob:
        """Moves a file from a scratch folder into the store."""
        return self._keep(digest_file(path), path.stat().st_size, lambda name: self.local.move(path, name))

    def put_bytes(self, data: bytes) -> Blob:
        """Keeps bytes as a blob."""
        return self._keep(digest_bytes(data), len(data), lambda name: self.local.write(name, data))

    def put_copy(self, path: Path) -> Blob:
        """Keeps a copy of a file that stays where it is."""
        return self._keep(digest_file(path), path.stat().st_size, lambda name: self.local.write(name, path))

    def find(self, digest: str) -> Path | None:
        """The blob as a local read-only file with exactly these bytes, fetched where needed; None where the store has
        it not, or damaged."""
        path = self._whole(digest)
        if path is None and self.shared is not self.local:
            path = self._fetched(digest)
        return path

    def need(self, digest: str) -> Path:
        """The blob as a local read-only file with exactly these bytes; made again where the store has lost it.

        Raises MissingBlobError where that is impossible, and RemoteError where the rebuilt bytes differ.
        """
        found = self.find(digest)
        if found is None and self.rebuild(digest):
            found = self.find(digest)
        if found is None:
            raise MissingBlobError(f"{self.shared.where}: blob {digest} is gone, and no recorded action makes it\n"
                                   "  `dvc repro` makes what this checkout needs")
        return found

    def hold(self, digest: str, folder: Path) -> Path:
        """The same; the cache keeps the blob as long as `folder` is there, a scratch folder of this store."""
        path = self.need(digest)
        if self.shared is not self.local and not (folder / digest).exists():
            os.link(path, folder / digest)
        return path

    def keeps(self, digest: str, num_bytes: int) -> bool:
        """Whether the blob is where it is kept for good: of a folder, whole; of a bucket, in its size (one request)."""
        if self.shared is self.local:
            return self._whole(digest) is not None
        return self.shared.size(blob_name(digest)) == num_bytes

    def find_all(self, digests: Iterable[str]) -> Iterator[Path | None]:
        """What `find` says of each, in order, several at a time."""
        return self._map(self.find, digests)

    # actions ------------------------------------------------------------------------------------------------------
    def done(self, generation: str) -> dict[str, str]:
        """key -> result digest of every action of this generation that was done, by listing alone.

        Two results for one key are reported; the smaller digest counts, for every reader alike.
        """
        entries: dict[str, str] = {}
        for name in self.shared.names(f"ac/{generation}/"):
            key, _, result = name.rpartition("/")[2].partition(".")
            if len(key) != 64 or len(result) != 64:
                continue
            other = entries.setdefault(key, result)
            if other != result:
                entries[key] = _smaller(generation, key, other, result)
        return entries

    def done_of(self, actions: Collection[Action], among: int) -> dict[str, str]:
        """The same of these actions alone, in as few requests: each costs one, or all one for 1,000 of the generation,
        of which there are `among`."""
        if len(actions) * LISTED_AT_ONCE >= among:
            return self.done(next(iter(actions)).generation) if actions else {}
        found = zip(actions, self._map(self.results, actions))
        return {one.key: functools.reduce(functools.partial(_smaller, one.generation, one.key), sorted(results))
                for one, results in found if results}

    def documents(self, generation: str, results: Collection[str]) -> dict[str, bytes]:
        """result digest -> result document (canonical JSON) of those that the store has, whole."""
        return dict(self.each_document(generation, results))

    def each_document(self, generation: str, results: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """The same one by one, where they may be too many to hold."""
        left = set(results)
        for digest, document in self._paged(generation, results):
            left.remove(digest)
            yield digest, document
        yield from self._alone(left)

    def keep_pages(self, generation: str, documents: Mapping[str, bytes]) -> None:
        """Writes pages of those of the documents that no page has, where they are many."""
        if len(documents) < PAGE_MIN_DOCUMENTS:
            return
        left = sorted(documents.keys() - {digest for digest, _ in self._paged(generation, documents)})
        for first in range(0, len(left) if len(left) >= PAGE_MIN_DOCUMENTS else 0, PAGE_DOCUMENTS):
            page = self.put_bytes(b"\n".join(documents[digest] for digest in left[first:first + PAGE_DOCUMENTS]))
            self.shared.create(f"pages/{generation}/{page.digest}", b"")

    def result(self, result_digest: str) -> dict[str, Any] | None:
        """The result document, or None where it is gone or damaged (the action then counts as not done)."""
        path = self.find(result_digest)
        return None if path is None else json.loads(path.read_bytes())

    def results(self, action: Action) -> set[str]:
        """Result digests of the action: one, or more where it is not deterministic."""
        entry = _entry(action)
        return {name.removeprefix(entry) for name in self.shared.names(entry)}

    def lookup(self, action: Action) -> dict[str, Any] | None:
        """The result document of one action, as all readers take it; None where it was not done, or all are gone."""
        documents = map(self.result, sorted(self.results(action)))
        return next((document for document in documents if document is not None), None)

    def commit(self, action: Action, item: str, facts: Mapping[str, Any], outputs: Mapping[str, Blob]) -> str:
        """Records that the action gave these outputs, which must be in the store; returns the result's digest."""
        document = {"facts": facts, "outputs": {name: [blob.digest, blob.bytes] for name, blob in outputs.items()}}
        result = self.put_bytes(canonical(document)).digest
        self.shared.create(f"{_history(action.op, item)}{action.key}.json", canonical(action.document))
        entry = f"{_entry(action)}{result}"
        if not self.shared.create(entry, b""):
            self.shared.write(entry, b"")  # used again: a collection asks how old it is
        return result

    def forget_lost(self, action: Action) -> None:
        """Forgets those of the action's results that are gone, whole or in part."""
        for result in self.results(action):
            document = self.result(result)
            if document is None or not all(self.keeps(*blob) for blob in document["outputs"].values()):
                self.shared.delete([f"{_entry(action)}{result}"])

    def history(self, op: str, item: str) -> list[dict[str, Any]]:
        """The documents of the item's earlier actions, the newest last."""
        listed = sorted(self.shared.list(_history(op, item)), key=lambda one: (one.modified_s, one.name))
        return [json.loads(data) for data in self._map(self.shared.read, (one.name for one in listed)) if data]

    def keep_run(self, stage: str, record: Mapping[str, Any]) -> None:
        """Keeps the record of a run."""
        name = f"runs/{stage}/{time.time_ns()}-{os.getpid()}.json"
        self.shared.create(name, json.dumps(record, sort_keys=True).encode())

    def keep_clone(self, folder: Path) -> None:
        """Notes that a clone in this folder of this host uses the store now."""
        clone = canonical([platform.node(), str(folder)])
        self.shared.write(f"clones/{digest_bytes(clone)[:16]}.json", clone)

    def clones(self) -> list[tuple[str, str, float]]:
        """(host, folder, time of its last run by the store's clock) of the clones that ran stages on this store."""
        listed = sorted(self.shared.list("clones/"), key=lambda one: one.name)
        found = zip(listed, self._map(self.shared.read, [one.name for one in listed]))
        return [(*json.loads(clone), one.modified_s) for one, clone in found if clone]

    def runs(self, stage: str) -> Iterator[dict[str, Any]]:
        """The records of the stage's runs, the newest first."""
        for name in sorted(self.shared.names(f"runs/{stage}/"), reverse=True):
            data = self.shared.read(name)
            if data is not None:
                yield json.loads(data)

    # files --------------------------------------------------------------------------------------------------------
    def scratch(self) -> AbstractContextManager[Path]:
        """A folder on the store's disk that is gone afterwards."""
        return self.local.scratch()

    def remove_leftovers(self) -> None:
        """Removes what processes of this host were writing when they were killed."""
        self.local.remove_leftovers()

    def _keep(self, digest: str, num_bytes: int, write: Callable[[str], None]) -> Blob:
        name = blob_name(digest)
        whole = self._whole(digest)
        if whole is None or _is_old(whole.stat().st_mtime):
            self._make_room(num_bytes)
            write(name)
        if self.shared is not self.local and digest not in self._put:
            self._share(name, digest, num_bytes)
            self._put.add(digest)
        return Blob(digest, num_bytes)

    def _share(self, name: str, digest: str, num_bytes: int) -> None:
        """Puts a blob of the folder into the bucket, where that has it not, or only an old one."""
        path = self.local.path(name)
        if num_bytes <= SINGLE_BYTES and self.shared.create(name, path.read_bytes()):
            return
        if self.shared.size(name) != num_bytes or all(_is_old(one.modified_s) for one in self.shared.list(name)):
            self.shared.write(name, path, sha256=digest)

    def _whole(self, digest: str) -> Path | None:
        """The local blob's path if its bytes are right; a damaged one is said and removed."""
        path = self.local.path(blob_name(digest))
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            return None
        seen = (digest, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if seen not in self._verified:
            if digest_file(path) != digest:
                print(f"{path}: damaged, {stat.st_size} bytes that are not {digest[:12]}…; removed, will be made again",
                      file=sys.stderr)
                path.unlink(missing_ok=True)
                return None
            self._verified.add(seen)
        if self.shared is not self.local:
            os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        return path

    def _fetched(self, digest: str) -> Path | None:
        """The blob brought from the bucket to the folder; one that is damaged there is said and removed."""
        name, came = blob_name(digest), []
        with self.scratch() as folder:
            path = folder / digest
            for _ in range(2):  # what the way spoilt comes right the second time
                got = self.shared.download(name, path)
                if got is None:
                    return None
                if got == digest:
                    self._make_room(path.stat().st_size)
                    self.local.move(path, name)
                    return self._whole(digest)
                came.append(got)
        if came[0] != came[1]:
            raise RemoteError(f"{self.shared.where}/{name} came as {came[0][:12]}… and then as {came[1][:12]}…: this "
                              "machine or its way to the bucket changes bytes; nothing was removed\n"
                              "  `roadmill store fsck` on another machine says whether the bucket is whole")
        print(f"{self.shared.where}/{name}: damaged, its bytes are {got[:12]}…; removed, will be made again",
              file=sys.stderr)
        self.shared.delete([name])
        self._put.discard(digest)
        return None

    def _make_room(self, num_bytes: int) -> None:
        """Removes the least recently used blobs from the cache where these bytes may bring it over its limit, or over
        what the disk has for it."""
        if self.cache_bytes == float("inf"):
            return
        with self._lock:
            self._cache["left"] = self._cache.get("left", 0) - num_bytes
            if self._cache["left"] >= 0:
                return
            used = sorted((stat.st_atime, stat.st_size, path) for path in self.local.root.glob("cas/??/*")
                          if (stat := _stat(path)))
            total = sum(size for _, size, _ in used)
            self.local.root.mkdir(parents=True, exist_ok=True)
            limit_bytes = min(self.cache_bytes, total + shutil.disk_usage(self.local.root).free)
            total += num_bytes
            for used_s, size, path in used:
                if total <= (1 - SLACK) * limit_bytes or used_s > time.time() - KEEP_S:
                    break
                now = _stat(path)
                if now and (now.st_atime, now.st_nlink) == (used_s, 1):  # of more links, it is held
                    path.unlink(missing_ok=True)
                    total -= size
            self._cache["left"] = SLACK * limit_bytes

    def _paged(self, generation: str, results: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Digest and document of those of the results that pages have, each once."""
        left = set(results)
        if len(left) < PAGES_SOUGHT:
            return
        for name in sorted(self.shared.names(f"pages/{generation}/")):
            if left and (path := self.find(name.rpartition("/")[2])) is not None:
                for line in path.read_bytes().split(b"\n"):
                    if (digest := digest_bytes(line)) in left:
                        left.remove(digest)
                        yield digest, line

    def _alone(self, results: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for digest, path in zip(ordered := sorted(results), self.find_all(ordered)):
            if path is not None:
                yield digest, path.read_bytes()

    def _map(self, call: Callable[[str], Any], names: Iterable[str]) -> Iterator[Any]:
        return map(call, names) if self.shared is self.local else concurrently(call, names)


def concurrently(call: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` of requests, several at a time, in order."""
    left = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(itertools.islice(left, BATCH)):
            yield from pool.map(call, batch)


def blob_name(digest: str) -> str:
    """Name of a blob. Raises ConfigError for what is no digest: a manifest may come from anywhere."""
    if not (digest.isascii() and digest.isalnum()):
        raise ConfigError(f"{digest[:80]!r} is not the sha256 of a blob: the manifest that names it is damaged\n"
                          "  `dvc checkout` restores it, `dvc repro` makes it again")
    return f"cas/{digest[:2]}/{digest}"


def _smaller(generation: str, key: str, one: str, other: str) -> str:
    print(f"{generation}: action {key} gave two results, {one} and {other}: the operation is not deterministic; "
          "the smaller digest counts", file=sys.stderr)
    return min(one, other)


def _entry(action: Action) -> str:
    return f"ac/{action.generation}/{action.key[:2]}/{action.key}."


def _is_old(modified_s: float) -> bool:
    return abs(time.time() - modified_s) > FRESH_S  # also where clocks differ


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _history(op: str, item: str) -> str:
    return f"actions/{op}/{digest_bytes(item.encode())[:16]}/"
