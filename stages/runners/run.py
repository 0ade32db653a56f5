"""One run of a stage: its lock, its progress, its failures, and the record of where and how long it ran.

The record says what no output may say (seconds, host, processes): it goes to the store and to results/run.json, which
git and DVC do not see.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from stages.lib.errors import DataError, RemoteError, RoadmillError
from stages.lib.secrets import redacted
from stages.runners.local import TaskFailedError

T = TypeVar("T")
RUN_FILE = "results/run.json"
MACHINE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO}


def told(error: BaseException) -> str:
    """The text of an error that needs no traceback: ours, a task's end, or this machine's disk; '' for any other."""
    if isinstance(error, (RoadmillError, TaskFailedError)):
        return redacted(str(error))
    if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
        return redacted(f"{error.filename or 'the disk'}: {error.strerror}\n"
                        "  `roadmill doctor` looks at the store and its disk")
    return ""


def exit_code(error: BaseException) -> int:
    """Our errors' own; that of the store for this machine's disk; 1 for all else."""
    return getattr(error, "exit_code", RemoteError.exit_code if isinstance(error, OSError) and told(error) else 1)


class StageFailedError(RoadmillError):
    """Some items failed; the others are committed."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Lock:
    """Keeps a second run of the same stage in the same folder waiting, and says so. Gone with its process."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage = path, stage

    def __enter__(self) -> Lock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            print(f"{self._stage}: waiting for process {self._file.read().strip() or '?'}, which runs it here",
                  file=sys.stderr, flush=True)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Progress:
    """A bar on a terminal, a line per tenth elsewhere, nothing for what takes less than a few seconds."""

    QUIET_S = 3.0

    def __init__(self, stage: str, total: int, done: int) -> None:
        self._stage, self._total, self._done = stage, total, done
        self._started, self._told = time.monotonic(), done * 10 // max(total, 1)
        console = Console(stderr=True)
        self._bar = Bar(TextColumn(f"{stage:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                        TimeRemainingColumn(), console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=self._total, completed=self._done)
        return self

    def advance(self) -> None:
        """One more item has ended."""
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)
            return
        tenth = self._done * 10 // self._total
        if tenth > self._told and time.monotonic() - self._started > self.QUIET_S:
            self._told = tenth
            print(f"{self._stage:<9} {self._done}/{self._total}", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()


def watched(what: str, items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with a Progress of how many have been asked for and used."""
    with Progress(what, total, 0) as progress:
        for item in items:
            yield item
            progress.advance()


class RunRecord:
    """Where and how long a stage ran; kept even when it fails: keep(stage, record), and results/run.json."""

    def __init__(self, root: Path, stage: str, keep: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._root, self._stage, self._keep = root, stage, keep
        self.counts: dict[str, int] = {}
        self._items: dict[str, float] = {}
        self._actions: dict[str, str] = {}

    def item(self, name: str, seconds: float, key: str) -> None:
        """Notes how long one item took, and the key of its action."""
        self._items[name], self._actions[name] = round(seconds, 3), key

    def __enter__(self) -> RunRecord:
        self._started = time.time()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        record = {"stage": self._stage, "started": round(self._started, 3),
                  "seconds": round(time.time() - self._started, 3), "host": platform.node(),
                  "platform": platform.platform(), "python": platform.python_version(), "commit": _commit(self._root),
                  "error": redacted(str(error)) if error else None, "seconds_per_item": self._items,
                  "actions": self._actions, **self.counts}
        latest = self._root / RUN_FILE
        # where the disk or the cloud is why the stage failed, that is what must be told
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            latest.parent.mkdir(parents=True, exist_ok=True)
            records = {**last_runs(self._root), self._stage: record}
            latest.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
            try:
                self._keep(self._stage, record)
            except RemoteError as refused:  # no reason to lose what was made; who may only read meets it each time
                if not error:
                    print(f"{self._stage}: done, but the store keeps no record of this run: "
                          f"{told(refused).splitlines()[0]}", file=sys.stderr)


def judge(stage: str, failures: Mapping[str, BaseException], num_items: int, max_failed_ratio: float) -> None:
    """Names the failed items; raises StageFailedError unless all are the recordings' own fault and few enough."""
    if not failures:
        return
    texts = {name: told(error) for name, error in failures.items()}
    bugs = {type(error): error for name, error in failures.items() if not texts[name]}  # one of a kind is enough
    for error in failures.values() if os.environ.get("ROADMILL_TRACEBACK") == "1" else bugs.values():
        cause = error.__cause__ or "".join(traceback.format_exception(error))  # the worker's, if there
        print(redacted(str(cause)), file=sys.stderr)
    for name, error in sorted(failures.items()):
        print(f"{stage}: {name}: {texts[name] or redacted(f'{type(error).__name__}: {error}')}", file=sys.stderr)
    others = [error for error in failures.values() if not isinstance(error, DataError)]
    if not others and len(failures) <= max_failed_ratio * num_items:
        return
    allowed = f"{max_failed_ratio:g} allows {int(max_failed_ratio * num_items)}"
    hint = "" if others else f"\n  {stage}.max_failed_ratio={allowed}"
    raise StageFailedError(f"{stage}: {len(failures)} of {num_items} items failed, the others are kept{hint}",
                           max(map(exit_code, others), default=DataError.exit_code))


def _commit(root: Path) -> str:
    """The commit that is checked out, `-dirty` where tracked files differ from it; "" outside git."""
    with contextlib.suppress(OSError):
        return subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], cwd=root,
            text=True, capture_output=True).stdout.strip()
    return ""


def last_runs(root: Path) -> dict[str, Any]:
    """stage -> its latest record; {} where none was kept whole."""
    try:
        return dict(json.loads((root / RUN_FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # a kill tears it; the store has all records
        return {}
