"""Worker processes: a crash costs one task, a hang ends, no child outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from stages.runners.local import TaskFailedError, perform


class OddError(Exception):
    """Cannot be unpickled: its arguments are not those it is made with."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


def _work(task):
    if task == "odd":
        raise OddError("odd", 3)
    if task == "exit":
        sys.exit(3)
    if task == "hang":
        time.sleep(600)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError(task)
    return task * 2


def test_a_task_that_fails_hangs_or_crashes_costs_itself_alone():
    tasks = [1, "crash", 2, "raise", 3, "hang", 4, "odd", 5, "exit", 6]
    got = dict(perform(_work, tasks, workers=2, timeout_s=8))
    assert [got[i] for i in (0, 2, 4, 6, 8, 10)] == [2, 4, 6, 8, 10, 12]
    assert "process died (exit code -9)" in str(got[1])
    assert isinstance(got[3], ValueError)
    assert str(got[5]) == "took more than 8 s and was stopped"
    assert str(got[7]) == "OddError: odd at 3"
    assert str(got[9]) == "SystemExit: 3"
    assert all(isinstance(got[i], TaskFailedError) for i in (1, 5, 7, 9))


def test_no_task_starts_no_process():
    assert list(perform(_work, [], workers=2, timeout_s=1)) == []


def _say_pid(folder):
    with open(f"{folder}/{os.getpid()}", "w"):
        pass
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_workers_die_with_a_killed_parent(tmp_path):
    script = ("from tests.test_local_runner import _say_pid; from stages.runners.local import perform\n"
              f"if __name__ == '__main__': list(perform(_say_pid, [{str(tmp_path)!r}] * 2, workers=2, timeout_s=600))")
    path = tmp_path / "parent.py"
    path.write_text(script)
    parent = subprocess.Popen([sys.executable, str(path)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while len(pids := [p.name for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
