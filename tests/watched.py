"""What stages open while they work, seen at the system calls: Python, OpenCV, polars, duckdb and torch alike.

`watch` runs stages in a child process under strace. The child makes marks around each call of a stage's `run` and
`collect`, and writes down what that call was given; whatever else is opened, looked for, executed or connected to
between the marks is a finding. Interpreter, packages, system libraries and what the kernel offers are no inputs: their
versions are pinned and in the code digest.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.lib.checkpoints import NOTHING

BEGIN, END = "/watched-begin/", "/watched-end/"
CALLS = "trace=%file,connect,bind"
LOOKS = {"stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat", "mkdir"}
# Not the stage's: the kernel's own files, the loader's, the time zone, where MKL and OpenMP look for processors.
SYSTEM = ("/proc", "/sys", "/dev", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
          "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/etc/timezone")
LINE = re.compile(r"^(?P<pid>\d+) +(?P<call>\w+)\((?P<rest>.*)$")
PATH = re.compile(r'^(?:(?P<at>AT_FDCWD|\d+)(?:<(?P<folder>[^>]*)>)?, )?"(?P<path>(?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, order=True)
class Finding:
    """`during` (stage, function, item): a file, program or address that the call was not given."""

    during: str
    call: str
    what: str


def watch(root: Path, *stages: str) -> list[Finding]:
    """Runs the stages in the checkout `root`; what they used without being given it. Skips where nothing can watch."""
    journal, trace = root / ".roadmill/watched.jsonl", root / ".roadmill/watched.strace"
    journal.parent.mkdir(exist_ok=True)
    journal.unlink(missing_ok=True)
    command = [*strace(), "-o", str(trace), sys.executable, "-m", "tests.watched", str(root), *stages]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                   "POLARS_MAX_THREADS": "1", "JOBLIB_MULTIPROCESSING": "0"}
    ran = subprocess.run(command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
    assert ran.returncode == 0, ran.stdout
    windows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert {window["stage"] for window in windows} == set(stages)
    return sorted(set(_findings(trace, windows)))


def strace() -> list[str]:
    """The command that watches. Skips the test where there is none, or the kernel does not let it."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed: nothing else sees what C libraries open")
    command = [program, "--follow-forks", "--seccomp-bpf", "--decode-fds=path", "--string-limit=4096", "-e", CALLS]
    if subprocess.run([*command, "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here (a container without ptrace)")
    return command


def _findings(trace: Path, windows: list[dict]) -> Iterator[Finding]:
    open_window = None
    for line in trace.read_text(errors="replace").splitlines():
        if BEGIN in line or END in line:
            number = int(re.search(r"/watched-(?:begin|end)/(\d+)", line)[1])
            open_window = windows[number] if BEGIN in line else None
        elif open_window:
            found = _used(line)
            if found and not _given(*found, open_window["given"]):
                yield Finding(open_window["during"], *found)


def _used(line: str) -> tuple[str, str] | None:
    """(system call, path or address) of a line of strace's; None where it is neither."""
    match = LINE.match(line)
    if match is None:
        return None
    call, rest = match["call"], match["rest"]
    if call in ("connect", "bind"):
        return call, rest
    path = PATH.match(rest)
    if path is None or call == "getcwd" or not path["path"]:
        return None
    name = path["path"].encode("latin-1", "backslashreplace").decode("unicode_escape")
    return call, os.path.normpath(os.path.join(path["folder"] or "", name))


def _given(call: str, path: str, given: list[str]) -> bool:
    """Whether the path was given, lies in a folder that was, or is only looked at on the way to what was."""
    on_the_way = call in LOOKS and any(one.startswith(f"{path.rstrip('/')}/") for one in given)
    return on_the_way or any(path == one or path.startswith(f"{one}/") for one in (*given, *SYSTEM))


# the child ------------------------------------------------------------------------------------------------------------
class Journal:
    """Marks in the system calls where a stage's function begins and ends, and what it was given."""

    def __init__(self, path: Path) -> None:
        self._path, self._windows = path, []

    def call(self, stage, function, name, given, work):
        """What `work(results)` returns, watched; results: its upstream results with the files they are asked for."""
        callers = {frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)}  # a warning shows their lines
        window = {"stage": stage, "during": " ".join(filter(None, (stage, function, name))),
                  "given": [*map(str, given), *sorted(callers)]}
        number = len(self._windows)
        self._windows.append(window)

        def outside(ask):
            """A file of an earlier result is fetched by the harness, not by the stage."""
            def asked(file):
                os.access(f"{END}{number}", os.F_OK)
                path = ask(file)
                window["given"].append(str(path))
                os.access(f"{BEGIN}{number}", os.F_OK)
                return path
            return asked

        os.access(f"{BEGIN}{number}", os.F_OK)
        try:
            return work(lambda result: dataclasses.replace(result, path=outside(result.path)))
        finally:
            os.access(f"{END}{number}", os.F_OK)
            self._path.write_text("".join(json.dumps(one) + "\n" for one in self._windows))


def _wrap(journal: Journal, stage: str, module, always: list[Path]) -> None:
    run, collect = module.run, getattr(module, "collect", None)

    def run_item(cfg, item, inputs, out, *kept):
        return journal.call(stage, "run", item.name, [*always, *inputs.values(), out],
                            lambda watched: run(cfg, item, inputs, out, *[NOTHING for _ in kept]))

    def run_whole(cfg, inputs, out):
        folders = [upstream.folder for upstream in inputs.values()]
        return journal.call(stage, "run", "", [*always, *folders, out.data, out.results], lambda watched: run(cfg, {
            name: dataclasses.replace(upstream, results=tuple(map(watched, upstream.results)))
            for name, upstream in inputs.items()}, out))

    def collect_all(cfg, results, out):
        return journal.call(stage, "collect", "", [*always, out.data, out.results],
                            lambda watched: collect(cfg, [watched(result) for result in results], out))

    module.run = run_item if collect else run_whole
    if collect:
        module.collect = collect_all


def main(root: Path, stages: list[str]) -> None:
    """Runs the stages in this process, with marks."""
    importlib.import_module("torch._dynamo")  # else the first optimiser does, and that asks for the user and a cache

    from stages import harness
    from stages.store import code

    harness.local.perform = lambda function, tasks, **how: ((index, function(task)) for index, task in enumerate(tasks))
    places = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
    packages = [Path(place) for place in sorted(places | {os.path.realpath(place) for place in places})]
    journal = Journal(root / ".roadmill/watched.jsonl")
    for stage in stages:
        own = [root / path for path in code.source_files(root, f"stages.{stage}")]
        _wrap(journal, stage, harness.module_of(stage), [*packages, *own])
        harness.Harness(root).run(stage)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
