"""A recording that lies in a bucket, read by ranges as if it were a path; what `rosbags` calls an RPath."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING

from stages.lib.errors import RemoteError

if TYPE_CHECKING:
    from stages.store.bucket import Bucket, Described

LEAST_BYTES = 2**17
MOST_BYTES = 2**23
KEPT_BYTES = 4 * MOST_BYTES
GAP_BYTES = 2**20


class RangedPath:
    """A file or folder of a bucket, as it was when it was described: what is replaced since then is not read.

    files  name -> Described of every file that there is; `name` is one of them, or a folder that holds some
    It has the methods of pathlib.Path that reading a recording takes. It is no os.PathLike: it has no local file.
    """

    def __init__(self, bucket: Bucket, name: str, files: Mapping[str, Described]) -> None:
        self._bucket = bucket
        self._path = PurePosixPath(name)
        self._files = files
        self._ranges: dict[str, Ranges] = {}

    name = property(lambda self: self._path.name)
    stem = property(lambda self: self._path.stem)
    suffix = property(lambda self: self._path.suffix)

    def __str__(self) -> str:
        return f"{self._bucket.where}/{self._path}"

    def __truediv__(self, name: str | PurePosixPath) -> RangedPath:
        inner = RangedPath(self._bucket, str(self._path / name), self._files)
        inner._ranges = self._ranges
        return inner

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return str(self._path) in self._files

    def is_dir(self) -> bool:
        return any(self._path in PurePosixPath(name).parents for name in self._files)

    def stat(self, *, follow_symlinks: bool = True) -> SimpleNamespace:
        """st_size alone. Raises FileNotFoundError."""
        return SimpleNamespace(st_size=self._described().bytes)

    def open(self, mode: str = "rb") -> RangedFile:
        """The file for reading bytes. Raises FileNotFoundError; reading raises RemoteError."""
        if mode != "rb":
            raise ValueError(f"{self} can only be opened for reading bytes, not as {mode!r}")
        one, name = self._described(), str(self._path)
        if name not in self._ranges:
            self._ranges[name] = Ranges(lambda start, stop: self._bucket.read_range(name, start, stop, one.etag),
                                        one.bytes, str(self))
        return RangedFile(self._ranges[name])

    def read_bytes(self) -> bytes:
        """All of the file. Raises FileNotFoundError, RemoteError."""
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str | None = None) -> str:
        """All of the file. Raises FileNotFoundError, RemoteError, UnicodeDecodeError."""
        return self.read_bytes().decode(encoding or "utf-8")

    def _described(self) -> Described:
        try:
            return self._files[str(self._path)]
        except KeyError:
            raise FileNotFoundError(f"{self} is not there") from None


class Ranges:
    """The bytes of one object, fetched by ranges; the last few are kept, KEPT_BYTES at most.

    fetch  fetch(start, stop) gives these bytes of the object
    A lone read fetches what it asks for, at least LEAST_BYTES. Reads that follow on each other (over gaps of up to
    GAP_BYTES) fetch ahead, a quarter of what was passed so far and MOST_BYTES at most: a pass over the whole object
    takes long ranges, and one over a part of it few bytes that nobody wants.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int, where: str) -> None:
        self.size_bytes = size_bytes
        self._fetch = fetch
        self._where = where
        self._kept: list[tuple[int, bytes]] = []
        self._run_start = self._run_stop = 0

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of [start, stop), fewer where the object ends. Raises RemoteError."""
        stop, parts = min(stop, self.size_bytes), []
        while start < stop:
            first, kept = self._holding(start, stop)
            parts.append(kept[start - first:stop - first])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _holding(self, start: int, stop: int) -> tuple[int, bytes]:
        """What was fetched that has the byte at `start`, and where it begins."""
        for number in reversed(range(len(self._kept))):
            first, kept = self._kept[number]
            if first <= start < first + len(kept):
                self._kept.append(self._kept.pop(number))
                return first, kept
        if not self._run_stop <= start <= self._run_stop + GAP_BYTES:
            self._run_start = start
        ahead = min(max((start - self._run_start) // 4, LEAST_BYTES), MOST_BYTES)
        self._run_stop = min(start + max(stop - start, ahead), self.size_bytes)
        fetched = self._fetch(start, self._run_stop)
        if len(fetched) != self._run_stop - start:
            raise RemoteError(f"{self._where}: bytes {start} to {self._run_stop} were asked for, {len(fetched)} bytes "
                              "came\n  a fault between here and the bucket; run it again")
        self._kept.append((start, fetched))
        while sum(len(kept) for _, kept in self._kept) > KEPT_BYTES and len(self._kept) > 1:
            del self._kept[0]
        return start, fetched


class RangedFile(io.RawIOBase):
    """An object open for reading, of which only what is read is fetched."""

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self._ranges = ranges
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ranges.size_bytes}[whence]
        if base + offset < 0:
            raise OSError(22, f"a seek before the start, to {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._ranges.size_bytes if size is None or size < 0 else self._at + size
        data = self._ranges.read(self._at, stop)
        self._at += len(data)
        return data

    def readinto(self, buffer: bytearray) -> int:
        data = self.read(len(buffer))
        buffer[:len(data)] = data
        return len(data)
