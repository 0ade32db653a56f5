"""Recordings on this machine: what lies in a folder, its digests, and where a known recording is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from stages.lib import sidefiles
from stages.lib.digests import canonical, digest_bytes, digest_file
from stages.lib.errors import ConfigError
from stages.lib.recordings import Recording

BAG_SUFFIXES = (".bag", ".mcap", ".db3")
REMEMBERED = ".roadmill/hashes.jsonl"


class Hashes:
    """sha256 of files, remembered by (path, size, mtime, inode), so that a second look reads nothing twice.

    Processes append to one file; lines that a kill tore are passed over.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / REMEMBERED
        self._known: dict[str, list] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            with contextlib.suppress(ValueError):
                path, *known = json.loads(line)
                self._known[path] = known

    def of(self, path: Path) -> str:
        """sha256 of the file's bytes in 64 hex digits."""
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if known is None or known[:3] != seen:
            self._known[str(path)] = known = [*seen, digest_file(path)]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([str(path), *known]) + "\n")
        return known[3]


def discover(source: Path) -> list[Path]:
    """Recordings: `source` itself, or under it; folders of videos with their stamps, folders with a rosbag2
    metadata.yaml, else single bag files; sorted. What lies inside such a folder is part of it.

    Raises ConfigError where there are none.
    """
    if source.is_file():
        if source.suffix in BAG_SUFFIXES:
            return [source]
        raise ConfigError(f"{source} is no recording: its name does not end in {', '.join(BAG_SUFFIXES)}\n"
                          "  `roadmill scan SOURCE` takes a folder of recordings, or one of them")
    drives = {path.parent for path in source.rglob("*") if sidefiles.stamps_path(path)}
    drives |= {path.parent for path in source.rglob("metadata.yaml") if _is_rosbag2(path)}
    folders = [path for path in sorted(drives) if not drives & set(path.parents)]
    inside = {folder.resolve() for folder in folders}
    files = [path for path in sorted(source.rglob("*")) if path.suffix in BAG_SUFFIXES and path.is_file()
             and not inside & set(path.resolve().parents)]
    if not folders + files:
        raise ConfigError(f"{source} holds no recordings: no rosbag2 folder, no folder of videos with their stamps "
                          f"and no file ending in {', '.join(BAG_SUFFIXES)}\n  check the path given to `roadmill scan`")
    return sorted(folders + files)


def describe(path: Path, name: str, rig: str, hashes: Hashes) -> Recording:
    """The recording at `path` under its relative name, with its digest."""
    if path.is_file():
        return Recording(name, path.stat().st_size, hashes.of(path), rig)
    members = tuple((file.relative_to(path).as_posix(), file.stat().st_size, hashes.of(file))
                    for file in sorted(path.rglob("*")) if file.is_file())
    digest = digest_bytes(canonical([[member, sha256] for member, _, sha256 in members]))
    return Recording(name, sum(size for _, size, _ in members), digest, rig, members)


def locate(recording: Recording, folders: Iterable[Path], hashes: Hashes) -> Path:
    """Where the recording's bytes lie on this machine, verified.

    Raises ConfigError where no folder has it, or only one with other bytes.
    """
    tried = []
    for folder in folders:
        path = folder / recording.name
        if not path.exists():
            tried.append(f"{folder}: not there")
            continue
        found = describe(path, recording.name, recording.rig, hashes)
        if found.digest == recording.digest:
            return path
        tried.append(f"{folder}: other bytes ({found.digest[:12]}…, {found.bytes} bytes)")
    raise ConfigError(f"recording {recording.name!r} ({recording.digest[:12]}…, {recording.bytes} bytes) is not on "
                      f"this machine: {'; '.join(tried) or 'no source is known'}\n"
                      "  set ROADMILL_SOURCE to the folder it is relative to, or run `roadmill scan` on it")


def _is_rosbag2(metadata: Path) -> bool:
    with metadata.open("rb") as file:
        return b"rosbag2_bagfile_information" in file.read(4096)
