"""`roadmill upload`: the vehicle's disk comes home, whole and verified; cut off, it goes on where it was."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from stages.lib import site
from stages.lib.errors import ConfigError, RemoteError
from stages.store import resumable
from stages.store.places import open_bucket
from stages.store.sources import SCRATCH, BucketSource, FolderSource, Hashes

UNFINISHED = ".roadmill/uploads"
LARGE_BYTES = 4 * resumable.PART_BYTES
FILES_AT_ONCE = 4


@dataclass
class Uploaded:
    """What an upload came to.

    where     the bucket and prefix
    verified  file -> bytes of those that the bucket has with their size and sha256; sent: those it had not before
    failed    file -> why the bucket has it not, or not as it is here
    """

    where: str
    verified: dict[str, int] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    failed: dict[str, Exception] = field(default_factory=dict)


class ChangedFileError(ConfigError):
    """The bucket has other bytes of this name: recordings do not change."""


def upload(root: Path, folder: Path, url: str, replace: bool = False) -> Uploaded:
    """Copies to the bucket each file of the folder that it does not have; what fails does not stop the others.

    Where the bucket has other bytes of a file's name, they stay, and that is a ChangedFileError; with `replace` the
    file takes their place. Nothing is ever deleted, here or there. Raises ConfigError for a folder without files and
    for what is no URL, RemoteError where the bucket can't be listed.
    """
    here, hashes, folder = site.load(root), Hashes(root), folder.resolve()
    source = FolderSource(folder, hashes)
    files = source.files()
    if not files:
        raise ConfigError(f"{folder} is no folder with files in it\n  `roadmill upload FOLDER s3://bucket/prefix`")
    bucket = open_bucket(url, here.store)
    for place in (here.store.url, here.store.dvc_remote) if isinstance(here.store, site.BucketStore) else ():
        if f"{bucket.where}/".startswith(f"{place}/"):
            raise ConfigError(f"{bucket.where} lies in {place}, whose garbage collection deletes what it does not know"
                              "\n  `roadmill upload FOLDER s3://bucket/prefix` with a prefix of its own")
    home = BucketSource(bucket, hashes, here.root / SCRATCH)
    there = home.files()
    stop = threading.Event()

    def is_home(name: str, sha256: str) -> bool:
        if name not in there:
            return False
        same = there[name] == files[name] and home.sha256(name) == sha256
        if not same and not replace:
            raise ChangedFileError(
                f"{bucket.where} has other bytes of that name ({there[name]} bytes, here {files[name]}); left alone\n"
                "  recordings do not change: rename the file, or have it replaced with `roadmill upload --replace`")
        return same and home.described(name).sha256 is not None

    def bring(name: str, advance: Callable[[int], None]) -> bool:
        """Whether the file had to be sent."""
        if re.search(r"[\0-\x1f\x7f\ud800-\udfff]", name):
            raise ConfigError("no object can have a name with control characters or outside UTF-8\n  rename it: `mv`")
        sha256 = source.sha256(name)
        if is_home(name, sha256):
            advance(files[name])
            return False
        if files[name] < LARGE_BYTES:
            bucket.write(name, folder / name, sha256)
            advance(files[name])
        else:
            resumable.send(bucket, name, folder / name, sha256, notes=here.root / UNFINISHED, advance=advance)
        found = bucket.describe(name)
        if found is None or (found.bytes, found.sha256) != (files[name], sha256):
            raise RemoteError(f"{bucket.where}/{name} was sent, and is {'other bytes' if found else 'not there'} now\n"
                              "  somebody else writes there; run it again")
        return True

    done = Uploaded(bucket.where)
    with _bar(sum(files.values()), stop) as advance, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        bringing = {pool.submit(bring, name, advance): name for name in sorted(files)}
        try:
            for one in as_completed(bringing):
                name = bringing[one]
                if error := one.exception():
                    done.failed[name] = error
                    continue
                done.verified[name] = files[name]
                if one.result():
                    done.sent.add(name)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return done


@contextlib.contextmanager
def _bar(num_bytes: int, stop: threading.Event) -> Iterator[Callable[[int], None]]:
    """advance(num_bytes), which raises KeyboardInterrupt once `stop` is set."""
    bar = Progress(TextColumn("upload"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                   TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task("upload", total=num_bytes)

    def advance(more: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        bar.advance(task, more)

    with bar if bar.console.is_terminal else contextlib.nullcontext():
        yield advance
