"""One run of a stage: its lock, its progress, and the record of where and how long it ran.

The record says what no output may say (seconds, host, processes): it goes to the store and to results/run.json, which
git and DVC do not see.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

RUN_FILE = "results/run.json"


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
        self._bar = Bar(TextColumn(f"{stage:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                        console=console, transient=True) if console.is_terminal else None

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


class RunRecord:
    """Where and how long a stage ran; written even when it fails."""

    def __init__(self, root: Path, store: Path, stage: str) -> None:
        self._root, self._store, self._stage = root, store, stage
        self.counts: dict[str, int] = {}
        self._items: dict[str, float] = {}

    def item(self, name: str, seconds: float) -> None:
        """Notes how long one item took."""
        self._items[name] = round(seconds, 3)

    def __enter__(self) -> RunRecord:
        self._started = time.time()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        record = {"stage": self._stage, "started": round(self._started, 3),
                  "seconds": round(time.time() - self._started, 3), "host": platform.node(),
                  "platform": platform.platform(), "python": platform.python_version(),
                  "error": str(error) if error else None, "seconds_per_item": self._items, **self.counts}
        place = self._store / "runs" / self._stage / f"{time.time_ns()}-{os.getpid()}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(record, sort_keys=True))
        latest = self._root / RUN_FILE
        latest.parent.mkdir(parents=True, exist_ok=True)
        runs = json.loads(latest.read_text()) if latest.exists() else {}
        latest.write_text(json.dumps({**runs, self._stage: record}, indent=1, sort_keys=True) + "\n")


def remove_leftovers(scratch: Path) -> None:
    """Removes the scratch folders of processes of this machine that are gone."""
    for folder in scratch.iterdir():
        host, _, rest = folder.name.rpartition("~")
        pid = rest.split("-")[0]
        if host == platform.node() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def scratch_prefix() -> str:
    """`<host>~<pid>-`: names a scratch folder's owner."""
    return f"{platform.node()}~{os.getpid()}-"
