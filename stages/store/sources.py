"""Recordings where they lie: what a folder or a bucket holds, their digests, and where a known one can be read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from stages.lib import sidefiles
from stages.lib.digests import canonical, digest_bytes, digest_file
from stages.lib.errors import ConfigError, RemoteError
from stages.lib.recordings import Recording
from stages.lib.site import Site
from stages.store.places import open_bucket
from stages.store.ranged import RangedPath
from stages.store.scratch import Scratch

if TYPE_CHECKING:
    from stages.store.bucket import Bucket, Described

BAG_SUFFIXES = (".bag", ".mcap", ".db3")
WHOLE_SUFFIXES = {".bag", ".db3", ".zstd", *sidefiles.SUFFIXES}
REMEMBERED = ".roadmill/hashes.jsonl"
SCRATCH = ".roadmill/recordings"
LOST_AND_FOUND = "lost+found"  # the file system's own
METADATA_BYTES = 2**26
BLOCK_BYTES = 2**24


class Hashes:
    """sha256 of files, remembered by (path, size, mtime, inode), and of objects by (URL, size, etag, version), so that
    a second look reads nothing twice.

    Processes append to one file; lines that a kill tore are passed over.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / REMEMBERED
        self._known: dict[str, list] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            with contextlib.suppress(ValueError):
                where, *known = json.loads(line)
                self._known[where] = known

    def of(self, path: Path) -> str:
        """sha256 of the file's bytes in 64 hex digits."""
        stat = path.stat()
        return self.remembered(str(path), [stat.st_size, stat.st_mtime_ns, stat.st_ino], lambda: digest_file(path))

    def remembered(self, where: str, seen: list, digest: Callable[[], str]) -> str:
        """The digest of what lies at `where` and looks like `seen`, taken with `digest()` where it is not known."""
        known = self._known.get(where)
        if known is None or known[:-1] != seen:
            self._known[where] = known = [*seen, digest()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([where, *known]) + "\n")
        return known[-1]


class Source(Protocol):
    """A place of files.

    where    the folder or URL that names are relative to
    at_once  how many files it is best asked for at a time
    """

    where: str
    at_once: int

    def files(self, under: str = "") -> dict[str, int]:
        """Name -> bytes of every file in the folder `under`, or of the one file of that name."""

    def read(self, name: str) -> bytes | None:
        """All of a small file; None where it is not there."""

    def sha256(self, name: str) -> str:
        """Of a file that is there."""

    def reach(self, recording: Recording) -> Path | RangedPath:
        """Where the recording, which is there as described, can be read."""


class FolderSource:
    """Files under `root`."""

    at_once = 1

    def __init__(self, root: Path, hashes: Hashes) -> None:
        self.where = str(root)
        self._root = root
        self._hashes = hashes

    def files(self, under: str = "") -> dict[str, int]:
        top = self._root / under
        if top.is_file():
            return {under: top.stat().st_size} if under else {}
        found = {}
        for folder, inner, names in os.walk(top, onerror=_want_readable):
            inner[:] = [name for name in inner if name != LOST_AND_FOUND]
            for path in (Path(folder, name) for name in names):
                if path.is_file():
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return found

    def read(self, name: str) -> bytes | None:
        path = self._root / name
        return path.read_bytes() if path.exists() else None

    def sha256(self, name: str) -> str:
        return self._hashes.of(self._root / name)

    def reach(self, recording: Recording) -> Path:
        return self._root / recording.name


class BucketSource:
    """Objects of a bucket. What was described once is that from then on: another object of its name is not read.

    scratch  the folder for recordings that can't be read by ranges
    """

    at_once = 16

    def __init__(self, bucket: Bucket, hashes: Hashes, scratch: Path) -> None:
        self.where = bucket.where
        self._bucket = bucket
        self._hashes = hashes
        self._scratch = Scratch(scratch, hashes.of)
        self._described: dict[str, Described] = {}

    def files(self, under: str = "") -> dict[str, int]:
        found = {one.name: one.bytes for one in self._bucket.list(f"{under}/" if under else "")}
        parents = {str(parent) for name in found for parent in PurePosixPath(name).parents}
        found = {name: size for name, size in found.items() if size or name not in parents}  # consoles mark folders so
        if under and not found and (one := self._bucket.describe(under)):
            self._described[under] = one
            found = {under: one.bytes}
        return found

    def read(self, name: str) -> bytes | None:
        return self._bucket.read(name)

    def sha256(self, name: str) -> str:
        one = self.described(name)
        return one.sha256 or self._hashes.remembered(f"{self.where}/{name}", [one.bytes, one.etag, one.version],
                                                     lambda: self._streamed(name, one))

    def reach(self, recording: Recording) -> Path | RangedPath:
        members = [f"{recording.name}/{member}" for member, _, _ in recording.members] or [recording.name]
        suffixes = {PurePosixPath(name).suffix for name in members}
        if ".mcap" in suffixes and not suffixes & WHOLE_SUFFIXES:
            return RangedPath(self._bucket, recording.name, {name: self.described(name) for name in members})
        return self._scratch.bring(recording, self._bucket.download, self.where)

    def described(self, name: str) -> Described:
        """Of an object that is there; as it was when this was first asked. Raises RemoteError where it is gone."""
        if name not in self._described:
            one = self._bucket.describe(name)
            if one is None:
                raise RemoteError(f"{self.where}/{name} is gone since the bucket was listed\n  run it again")
            self._described[name] = one
        return self._described[name]

    def _streamed(self, name: str, one: Described) -> str:
        hashed = hashlib.sha256()
        for start in range(0, one.bytes, BLOCK_BYTES):
            hashed.update(self._bucket.read_range(name, start, min(start + BLOCK_BYTES, one.bytes), one.etag))
        return hashed.hexdigest()


def open_source(where: str, site: Site, hashes: Hashes) -> Source:
    """The source at a folder, or at s3://bucket/prefix as the site reaches it. Raises ConfigError."""
    if where.startswith("s3://"):
        return BucketSource(open_bucket(where, site.store), hashes, site.root / SCRATCH)
    return FolderSource(Path(where), hashes)


def look(where: str, open_at: Callable[[str], Source]) -> tuple[Source, dict[str, dict[str, int]]]:
    """The recordings under `where`, or the one that `where` is, as `discover` gives them, and the source that their
    names are relative to.

    Raises ConfigError where there are none.
    """
    takes = "`roadmill scan SOURCE` takes a folder or s3://bucket/prefix of recordings, or one of them"
    source = open_at(where)
    files = source.files()
    found = discover(files, source)
    if files and "." not in found:
        if not found:
            raise ConfigError(_no_recordings(where))
        return source, found
    base, _, name = where.rpartition("/")
    source = open_at(base)
    files = source.files(name)
    if not files:
        raise ConfigError(_no_recordings(where) if Path(where).is_dir() else f"{where} does not exist\n  {takes}")
    if name in files and PurePosixPath(name).suffix not in BAG_SUFFIXES:
        raise ConfigError(f"{where} is no recording: its name does not end in {', '.join(BAG_SUFFIXES)}\n  {takes}")
    return source, {name: files}


def discover(files: Mapping[str, int], source: Source) -> dict[str, dict[str, int]]:
    """Recording -> its files with their bytes: folders of videos with their stamps and all below them, folders with a
    rosbag2 metadata.yaml, else single bag files.

    The source itself is called `.`, where it is such a folder.
    """
    metadata = [name for name, size in files.items()
                if PurePosixPath(name).name == "metadata.yaml" and size <= METADATA_BYTES]
    with ThreadPoolExecutor(source.at_once) as pool:
        folders = {PurePosixPath(name).parent for name, text in zip(metadata, pool.map(source.read, metadata))
                   if text and b"rosbag2_bagfile_information" in text[:4096]}
    drives = {PurePosixPath(name).parent for name in files if sidefiles.stamps_names(name) & files.keys()}
    folders = {folder for folder in drives | folders if not drives.intersection(folder.parents)}
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for name, size in files.items():
        owners = folders.intersection(PurePosixPath(name).parents)
        if not owners and PurePosixPath(name).suffix in BAG_SUFFIXES:
            owners = {name}
        for owner in owners:
            found[str(owner)][name] = size
    return dict(found)


def describe(source: Source, name: str, files: Mapping[str, int], rig: str) -> Recording:
    """The recording of this name, which is made of `files` (name -> bytes), with its digest."""
    if name in files:
        return Recording(name, files[name], source.sha256(name), rig)
    members = tuple((PurePosixPath(file).relative_to(name).as_posix(), files[file], source.sha256(file))
                    for file in sorted(files, key=PurePosixPath))
    digest = digest_bytes(canonical([[member, sha256] for member, _, sha256 in members]))
    return Recording(name, sum(size for _, size, _ in members), digest, rig, members)


def locate(recording: Recording, sources: Iterable[Source]) -> Path | RangedPath:
    """Where the recording's bytes can be read from here, verified.

    Raises ConfigError where no source has it, or only one with other bytes.
    """
    tried = []
    for source in sources:
        files = source.files(recording.name)
        if not files:
            tried.append(f"{source.where}: not there")
            continue
        found = describe(source, recording.name, files, recording.rig)
        if found.digest == recording.digest:
            return source.reach(found)
        tried.append(f"{source.where}: other bytes ({found.digest[:12]}…, {found.bytes} bytes)")
    raise ConfigError(f"recording {recording.name!r} ({recording.digest[:12]}…, {recording.bytes} bytes) is not on "
                      f"this machine: {'; '.join(tried) or 'no source is known'}\n"
                      "  set ROADMILL_SOURCE to the folder or s3://bucket/prefix it is relative to, or run "
                      "`roadmill scan` on it")


def _want_readable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _no_recordings(where: str) -> str:
    return (f"{where} holds no recordings: no rosbag2 folder, no folder of videos with their stamps and no file "
            f"ending in {', '.join(BAG_SUFFIXES)}\n  check the path given to `roadmill scan`")
