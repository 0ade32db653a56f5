"""The scene store in a local folder.

    cas/<hh>/<digest>                                  a blob, read-only
    ac/<op>/<generation>/<hh>/<key>.<result digest>    an action that was done; empty; the result document is a blob
    actions/<op>/<item, 16 digits>/<key>.json          what was hashed, to explain hits and misses

Files appear whole or not at all: they are written beside their place and renamed. Writers may race and die.
"""

from __future__ import annotations

import json
import os
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
        """Moves a file into the store (copies it where it lies on another disk)."""
        blob = Blob(digest_file(path), path.stat().st_size)
        if self._find(blob.digest) is None:
            self._move_in(path, self._blob_path(blob.digest))
        else:
            path.unlink()
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
            with _appearing(self._blob_path(blob.digest)) as part:
                shutil.copyfile(path, part)
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

    def result(self, result_digest: str) -> dict[str, Any] | None:
        """The result document, or None where it is gone or damaged (the action then counts as not done)."""
        path = self._find(result_digest)
        return None if path is None else json.loads(path.read_bytes())

    def commit(self, action: Action, item: str, facts: Mapping[str, Any], outputs: Mapping[str, Blob]) -> str:
        """Records that the action gave these outputs, which must be in the store; returns the result's digest."""
        self._write(self._history(action.op, item) / f"{action.key}.json", canonical(action.document))
        document = {"facts": facts, "outputs": {name: [blob.digest, blob.bytes] for name, blob in outputs.items()}}
        result = self.put_bytes(canonical(document)).digest
        self._write(self._entry(action, result), b"")
        return result

    def disown(self, action: Action, result_digest: str) -> None:
        """Forgets a result whose document is gone, after a new one was committed."""
        self._entry(action, result_digest).unlink(missing_ok=True)

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

    def _write(self, place: Path, data: bytes) -> None:
        if not place.exists():
            with _appearing(place) as part:
                part.write_bytes(data)

    def _move_in(self, path: Path, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.stat().st_dev == place.parent.stat().st_dev:
            os.chmod(path, 0o444)
            os.replace(path, place)
        else:
            with _appearing(place) as part:
                shutil.copyfile(path, part)
            path.unlink()


@contextmanager
def _appearing(place: Path) -> Iterator[Path]:
    """A file beside `place` that takes its name, read-only, once it is written; or is gone."""
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=".part-")
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        os.chmod(part, 0o444)
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)
