"""Recordings that must be on this disk whole, brought here once; those unused the longest go when room is wanted.

    <digest, 32 digits>/<file or folder>    a recording, verified
    <digest, 32 digits>.lock                held by who reads or brings it; its mtime says when it was last wanted
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from stages.lib.errors import ConfigError, RemoteError
from stages.lib.recordings import Recording

SPARE_BYTES = 2**31
ATTEMPTS = 3


class Scratch:
    """The recordings under `root`. The last one brought is kept for this process until it asks for another.

    sha256_of  the digest of a file of this disk
    """

    def __init__(self, root: Path, sha256_of: Callable[[Path], str]) -> None:
        self._root = root
        self._sha256_of = sha256_of
        self._held: IO | None = None

    def bring(self, recording: Recording, download: Callable[[str, Path], str | None], where: str) -> Path:
        """The recording on this disk, verified. download(name, path) gives the sha256 of what it wrote, or None.

        Raises ConfigError where the disk has no room, RemoteError where the bytes that come are others.
        """
        name = PurePosixPath(recording.name).name
        files = {f"{name}/{member}": (size, sha256) for member, size, sha256 in recording.members}
        files = files or {name: (recording.bytes, recording.digest)}
        folder = self._root / recording.digest[:32]
        self._root.mkdir(parents=True, exist_ok=True)
        if self._held:
            self._held.close()
        self._held = lock = folder.with_suffix(".lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(lock.name)
        for _ in range(ATTEMPTS):
            if self._is_whole(folder, files):
                return folder / name
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._is_whole(folder, files):
                self._make_room(recording, where)
                self._fill(folder, recording.name, files, download, where)
            fcntl.flock(lock, fcntl.LOCK_SH)  # for a moment nobody holds it: look again
        raise RemoteError(f"{folder}: {recording.name} does not stay there as it came\n"
                          "  `roadmill doctor` looks at this machine")

    def _fill(self, folder: Path, recording: str, files: dict[str, tuple[int, str]],
              download: Callable[[str, Path], str | None], where: str) -> None:
        part, parent = folder.with_suffix(".part"), PurePosixPath(recording).parent
        for old in (folder, part):
            shutil.rmtree(old, ignore_errors=True)
        for file, (_, sha256) in files.items():
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            came = download(str(parent / file), part / file)
            if came != sha256:
                shutil.rmtree(part)
                raise RemoteError(f"{where}/{parent / file}: {'nothing' if came is None else f'{came[:12]}…'} came, "
                                  f"expected {sha256[:12]}…\n  it changed just now; run it again")
        part.rename(folder)

    def _is_whole(self, folder: Path, files: dict[str, tuple[int, str]]) -> bool:
        return all((folder / file).is_file() and (folder / file).stat().st_size == size
                   and self._sha256_of(folder / file) == sha256 for file, (size, sha256) in files.items())

    def _make_room(self, recording: Recording, where: str) -> None:
        """Removes recordings that nobody reads, until the disk has room for this one and SPARE_BYTES more."""
        for lock in sorted(self._root.glob("*.lock"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            if self._has_room(recording.bytes):
                return
            with lock.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                for old in (lock.with_suffix(""), lock.with_suffix(".part")):
                    shutil.rmtree(old, ignore_errors=True)
        if not self._has_room(recording.bytes):
            free_bytes = shutil.disk_usage(self._root).free
            raise ConfigError(f"{where}/{recording.name} can't be read by ranges and needs {recording.bytes} bytes "
                              f"here and {SPARE_BYTES} to spare; {self._root} has {free_bytes} left\n"
                              "  free some, or upload it as MCAP: `ros2 bag convert`")

    def _has_room(self, num_bytes: int) -> bool:
        return shutil.disk_usage(self._root).free >= num_bytes + SPARE_BYTES
