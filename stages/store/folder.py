"""Objects as read-only files of a folder.

    <name>                  an object
    tmp/<host>~<pid>-…      what a process of this host is writing; renamed when it is whole
"""

from __future__ import annotations

import glob
import itertools
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.lib.digests import digest_file
from stages.store.objects import Listed

_numbers = itertools.count()


class Folder:
    """Objects under `root`, which is made when something is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def path(self, name: str) -> Path:
        """Where the object is, or would be."""
        return self.root / name

    def names(self, prefix: str) -> Iterator[str]:
        """Names that start with the prefix, sorted."""
        return (name for name, _ in self._entries(prefix))

    def list(self, prefix: str) -> Iterator[Listed]:
        """The same with their sizes and times."""
        for name, entry in self._entries(prefix):
            try:
                stat = entry.stat()
            except FileNotFoundError:  # another process removed it just now
                continue
            yield Listed(name, stat.st_size, stat.st_mtime)

    def read(self, name: str) -> bytes | None:
        """The whole object; None where it is not there."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return None

    def download(self, name: str, path: Path) -> str | None:
        """sha256 of what was copied to `path`; None where the object is not there."""
        try:
            shutil.copyfile(self.path(name), path)
        except FileNotFoundError:
            return None
        return digest_file(path)

    def write(self, name: str, data: bytes | Path, sha256: str | None = None) -> None:
        """Keeps bytes, or a copy of a file, instead of what was there."""
        self.move(self._written(data), name)

    def move(self, path: Path | str, name: str) -> None:
        """Makes a file of this disk the object."""
        os.chmod(path, 0o444)
        self._place(os.replace, path, name)

    def create(self, name: str, data: bytes) -> bool:
        """Keeps bytes only where nothing is there; False where something is."""
        try:
            if not data:
                self._place(_create_empty, "", name)
                return True
            written = self._written(data)
            try:
                self._place(os.link, written, name)
            finally:
                os.unlink(written)
        except FileExistsError:
            return False
        return True

    def size(self, name: str) -> int | None:
        """Bytes of the object; None where it is not there."""
        try:
            return os.stat(self.path(name)).st_size
        except FileNotFoundError:
            return None

    def delete(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on this disk that is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self._tmp(), prefix=_mine()) as folder:
            yield Path(folder)

    def remove_leftovers(self) -> None:
        """Removes what processes of this host were writing when they were killed."""
        for path in self._tmp().glob(f"{glob.escape(platform.node())}~*"):
            pid = path.name.rpartition("~")[2].partition("-")[0]
            if not _lives(int(pid)):
                path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)

    def _entries(self, prefix: str) -> Iterator[tuple[str, os.DirEntry]]:
        parent = prefix.rpartition("/")[0]
        try:
            found = sorted(os.scandir(self.root / parent), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in found:
            name = f"{parent}/{entry.name}" if parent else entry.name
            if entry.is_dir():
                if f"{name}/".startswith(prefix):
                    yield from self._entries(f"{name}/")
            elif name.startswith(prefix):
                yield name, entry

    def _written(self, data: bytes | Path) -> str:
        path = f"{self.root}/tmp/{_mine()}{next(_numbers)}"
        try:
            try:
                _fill(path, data)
            except FileNotFoundError:
                self._tmp()
                _fill(path, data)
        except BaseException as error:
            if isinstance(error, OSError) and not error.filename:  # a full disk does not say which
                error.filename = path
            Path(path).unlink(missing_ok=True)
            raise
        return path

    def _place(self, put, path: str | Path, name: str) -> None:
        place = f"{self.root}/{name}"
        try:
            put(path, place)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            put(path, place)

    def _tmp(self) -> Path:
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _fill(path: str, data: bytes | Path) -> None:
    if isinstance(data, Path):
        shutil.copyfile(data, path)
        os.chmod(path, 0o444)
    else:
        with open(path, "xb", opener=_read_only) as file:
            file.write(data)


def _read_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o444)


def _create_empty(_: str, place: str) -> None:
    os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444))


def _mine() -> str:
    """How the names begin of what this process writes."""
    return f"{platform.node()}~{os.getpid()}-"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
