"""The scene store in a local folder.

    cas/<hh>/<digest>                                  a blob, read-only
    ac/<op>/<generation>/<hh>/<key>.<result digest>    an action that was done; empty; the result document is a blob
    actions/<op>/<item, 16 digits>/<key>.json          what was hashed, to explain hits and misses
    tmp/<host>~<pid>-…                                 what a process of this host is writing

Files appear whole or not at all: they are written in tmp/ and renamed. Writers may race and die.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.digests import canonical, digest_bytes, digest_file
from stages.lib.errors import RemoteError
from stages.lib.stage import Blob
from stages.store.action import Action


class MissingBlobError(RemoteError):
    """A blob is neither in the store nor can it be made again."""


@dataclass(frozen=True)
class LocalStore:
    """Blobs and done actions under `root`.

    rebuild  rebuild(digest) runs the action that made the blob again and puts its outputs; False where no known action
             made it
    """

    root: Path
    rebuild: Callable[[str], bool] = lambda digest: False
    _verified: dict[tuple, bool] = field(default_factory=dict, repr=False, compare=False)

    # blobs --------------------------------------------------------------------------------------------------------
    def put_file(self, path: Path) -> Blob:
        """Moves a file from a scratch folder into the store."""
        blob = Blob(digest_file(path), path.stat().st_size)
        if self._find(blob.digest) is None:
            _publish(path, self._blob_path(blob.digest))
        return blob

    def put_bytes(self, data: bytes) -> Blob:
        """Keeps bytes as a blob."""
        blob = Blob(digest_bytes(data), len(data))
        if self._find(blob.digest) is None:
            self._write(self._blob_path(blob.digest), data)
        return blob

    def put_copy(self, path: Path) -> Blob:
        """Keeps a copy of a file that stays where it is."""
        blob = Blob(digest_file(path), path.stat().st_size)
        if self._find(blob.digest) is None:
            with self.scratch() as folder:
                shutil.copyfile(path, folder / "copy")
                _publish(folder / "copy", self._blob_path(blob.digest))
        return blob

    def need(self, digest: str) -> Path:
        """The blob as a local read-only file with exactly these bytes; made again where it is gone or damaged.

        Raises MissingBlobError where that is impossible, and RemoteError where the rebuilt bytes differ.
        """
        found = self._find(digest)
        if found is None and self.rebuild(digest):
            found = self._find(digest)
        if found is None:
            raise MissingBlobError(f"{self.root}: blob {digest} is gone, and no recorded action makes it\n"
                                   "  `dvc repro` makes what this checkout needs")
        return found

    def has(self, digest: str) -> bool:
        """Whether the blob is here, whole."""
        return self._find(digest) is not None

    # actions ------------------------------------------------------------------------------------------------------
    def done(self, generation: str) -> dict[str, str]:
        """key -> result digest of every action of this generation that was done.

        Two results for one key are reported; the smaller digest counts, for every reader alike.
        """
        entries: dict[str, str] = {}
        for folder in sorted(self.root.glob(f"ac/{generation}/??")):
            for name in sorted(os.listdir(folder)):
                key, _, result = name.partition(".")
                if key in entries and entries[key] != result:
                    print(f"{generation}: action {key} gave two results, {entries[key]} and {result}: "
                          "the operation is not deterministic; the first counts", file=sys.stderr)
                elif len(result) == 64:
                    entries.setdefault(key, result)
        return entries

    def lookup(self, action: Action) -> dict[str, Any] | None:
        """The result document of one action, as all readers take it; None where it was not done, or all are gone."""
        documents = map(self.result, sorted(self._results(action)))
        return next((document for document in documents if document is not None), None)

    def result(self, result_digest: str) -> dict[str, Any] | None:
        """The result document, or None where it is gone or damaged (the action then counts as not done)."""
        path = self._find(result_digest)
        return None if path is None else json.loads(path.read_bytes())

    def commit(self, action: Action, item: str, facts: Mapping[str, Any], outputs: Mapping[str, Blob]) -> str:
        """Records that the action gave these outputs, which must be in the store; returns the result's digest."""
        document = {"facts": facts, "outputs": {name: [blob.digest, blob.bytes] for name, blob in outputs.items()}}
        result = self.put_bytes(canonical(document)).digest
        self._write(self._entry(action, result), b"")
        self._write(self._history(action.op, item) / f"{action.key}.json", canonical(action.document))
        return result

    def forget_lost(self, action: Action) -> None:
        """Forgets those of the action's results that are gone, whole or in part."""
        for result in self._results(action):
            document = self.result(result)
            if document is None or not all(self.has(digest) for digest, _ in document["outputs"].values()):
                self._entry(action, result).unlink(missing_ok=True)

    def history(self, op: str, item: str) -> list[dict[str, Any]]:
        """The documents of the item's earlier actions, the newest last."""
        paths = sorted(self._history(op, item).glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [json.loads(path.read_bytes()) for path in paths]

    # files --------------------------------------------------------------------------------------------------------
    def _blob_path(self, digest: str) -> Path:
        return self.root / "cas" / digest[:2] / digest

    def _entry(self, action: Action, result_digest: str) -> Path:
        return self.root / "ac" / action.generation / action.key[:2] / f"{action.key}.{result_digest}"

    def _history(self, op: str, item: str) -> Path:
        return self.root / "actions" / op / digest_bytes(item.encode())[:16]

    def _find(self, digest: str) -> Path | None:
        """The blob's path if its bytes are right; a damaged one is said and removed."""
        path = self._blob_path(digest)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        seen = (digest, stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if seen not in self._verified:
            if digest_file(path) != digest:
                print(f"{path}: damaged, {stat.st_size} bytes that are not {digest[:12]}…; removed, will be made again",
                      file=sys.stderr)
                path.unlink(missing_ok=True)
                return None
            self._verified[seen] = True
        return path

    def _results(self, action: Action) -> set[str]:
        entry = self._entry(action, "*")
        return {path.name.partition(".")[2] for path in entry.parent.glob(entry.name)}

    def _write(self, place: Path, data: bytes) -> None:
        if not place.exists():
            with tempfile.NamedTemporaryFile(**self._tmp(), delete=False) as file:
                file.write(data)
            _publish(Path(file.name), place)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the store's disk that is gone afterwards."""
        with tempfile.TemporaryDirectory(**self._tmp()) as folder:
            yield Path(folder)

    def remove_leftovers(self) -> None:
        """Removes what processes of this host were writing when they were killed."""
        for path in self._tmp()["dir"].glob(f"{glob.escape(platform.node())}~*"):
            pid = path.name.rpartition("~")[2].partition("-")[0]
            if not _lives(int(pid)):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)

    def _tmp(self) -> dict[str, Any]:
        """Where this process writes, and how the names there begin."""
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return {"dir": folder, "prefix": f"{platform.node()}~{os.getpid()}-"}


def _publish(path: Path, place: Path) -> None:
    """Gives a file its place, read-only."""
    place.parent.mkdir(parents=True, exist_ok=True)
    os.chmod(path, 0o444)
    os.replace(path, place)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
