"""A store on a disk that fails it: damage, a full disk, racing writers, kills. No wrong byte is given, nothing that was
committed is lost, the next run heals, and somebody is told."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.digests import digest_file
from stages.runners.run import exit_code, told
from stages.store.action import Action
from stages.store.store import MissingBlobError, Store, blob_name
from tests.clones import ROOT

NUM_KILLS = 200
FORK = multiprocessing.get_context("fork")


def action(number: int, run: int = 0) -> Action:
    return Action("op", {"run": run}, "c0de", "", {"n": number}, {})


def pack(number: int, run: int = 0) -> bytes:
    return random.Random(f"{run} {number}").randbytes(3_000 + 40_000 * (number % 2))


def commit(store: Store, number: int, run: int = 0) -> str:
    return store.commit(action(number, run), str(number), {"n": number}, {"pack": store.put_bytes(pack(number, run))})


def is_whole(store: Store, number: int, run: int = 0) -> bool:
    """Whether the action is a hit that gives exactly its bytes."""
    document = store.lookup(action(number, run))
    return document is not None and store.need(document["outputs"]["pack"][0]).read_bytes() == pack(number, run)


# damage ---------------------------------------------------------------------------------------------------------------
def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("what", ["pack", "document"])
@pytest.mark.parametrize("spoil", [
    pytest.param(flip, id="flipped"), pytest.param(lambda data: data[:len(data) // 2], id="truncated"),
    pytest.param(lambda data: b"", id="emptied"), pytest.param(lambda data: data + b"0", id="grown")])
def test_a_damaged_blob_is_told_never_given_and_the_next_run_heals(tmp_path, capsys, what, spoil):
    result = commit(Store.in_folder(tmp_path), 1)
    digest = result if what == "document" else Store.in_folder(tmp_path).result(result)["outputs"]["pack"][0]
    path = tmp_path / blob_name(digest)
    damaged = spoil(path.read_bytes())
    path.chmod(0o644)
    path.write_bytes(damaged)
    store = Store.in_folder(tmp_path)
    if what == "document":
        assert store.lookup(action(1)) is None, "not done, to all readers"
    else:
        with pytest.raises(MissingBlobError, match=rf"blob {digest} is gone, and no recorded action makes it"):
            store.need(digest)
    assert f"{path}: damaged, {len(damaged)} bytes that are not {digest[:12]}…; removed" in capsys.readouterr().err
    commit(store, 1)
    assert is_whole(Store.in_folder(tmp_path), 1)
    assert list(store.done(action(1).generation)) == [action(1).key]


def test_damage_that_comes_while_a_process_runs_is_seen_by_it(tmp_path):
    store = Store.in_folder(tmp_path)
    digest = store.result(commit(store, 1))["outputs"]["pack"][0]
    path = store.need(digest)
    path.chmod(0o644)
    path.write_bytes(flip(path.read_bytes()))
    assert store.find(digest) is None


# a full disk ----------------------------------------------------------------------------------------------------------
def fill(folder: Path) -> None:
    """Commits until the disk is full, makes room, and does the rest; run on a disk of 1 MiB."""
    ballast, store, committed, failed, texts = folder / "ballast", Store.in_folder(folder / "store"), [], [], set()
    ballast.write_bytes(b"0" * 600_000)
    for number in range(16):
        try:
            commit(store, number)
            committed.append(number)
        except OSError as error:
            failed.append(number)
            place, _, text = told(error).partition(": ")
            texts.add((exit_code(error), place.startswith(f"{folder}/store/"), text))
    assert committed
    assert texts == {(4, True, "No space left on device\n  `roadmill doctor` looks at the store and its disk")}
    whole = Store.in_folder(folder / "store")
    assert all(is_whole(whole, number) for number in committed)
    assert all(path.name == digest_file(path) for path in (folder / "store").glob("cas/*/*"))
    assert set(whole.done(action(0).generation)) == {action(number).key for number in committed}
    assert list((folder / "store/tmp").iterdir()) == []
    ballast.unlink()
    for number in failed:
        commit(store, number)
    assert all(is_whole(Store.in_folder(folder / "store"), number) for number in range(16))
    print("all well")


def test_a_full_disk_is_told_loses_nothing_and_leaves_nothing_behind(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("this user may not mount a small disk: unshare -rm is refused")
    script = f"from pathlib import Path; from tests.test_store_faults_disk import fill; fill(Path({str(disk)!r}))"
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", script],
                         cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ran.stdout == "all well\n", ran.stderr


# two writers ----------------------------------------------------------------------------------------------------------
def _race(root: Path, ready, run: int, facts: list[int]) -> None:
    store = Store.in_folder(root)
    for number, fact in itertools.product(range(5), facts):
        ready.wait()
        store.commit(action(number, run), str(number), {"fact": fact}, {"pack": store.put_bytes(pack(number, run))})


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
def test_writers_of_one_key_at_once_leave_one_result_for_all_readers(tmp_path, capsys, unequal):
    ready = FORK.Barrier(6)
    writers = [FORK.Process(target=_race, args=(tmp_path, ready, 1, [one if unequal else 0])) for one in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    stores = [Store.in_folder(tmp_path) for _ in range(3)]
    found = [store.done(action(0, 1).generation) for store in stores]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5
    assert all(is_whole(stores[0], number, 1) for number in range(5))
    assert all(stores[0].lookup(action(number, 1)) == stores[1].result(found[1][action(number, 1).key])
               for number in range(5))
    assert len(list(tmp_path.glob("ac/*/*/*/*"))) == (30 if unequal else 5)
    assert ("the operation is not deterministic" in capsys.readouterr().err) == unequal


# kills ----------------------------------------------------------------------------------------------------------------
def _write_until_killed(root: Path, run: int, pipe: int, num_steps: int) -> None:
    """Commits, and writes a byte for each into the pipe; kills itself before or after the given call of C code."""
    left = itertools.count(num_steps, -1)

    def step(frame, event, arg):
        if event.startswith("c_") and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step if num_steps else None)
    store = Store.in_folder(root)
    for number in itertools.count():
        commit(store, number, run)
        os.write(pipe, b".")


def test_a_writer_killed_at_any_of_200_moments_loses_nothing_it_committed(tmp_path, capsys):
    """Half of the kills come at a call of C code that the seed gives, half after a time."""
    chance = random.Random(20261121)
    num_interrupted = num_leftovers = 0
    for run in range(NUM_KILLS):
        reads, writes = os.pipe()
        num_steps = chance.randrange(1, 1_500) if run % 2 else 0
        writer = FORK.Process(target=_write_until_killed, args=(tmp_path, run, writes, num_steps))
        writer.start()
        os.close(writes)
        if not num_steps:
            time.sleep(chance.uniform(0, 0.02))
            os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        with os.fdopen(reads, "rb") as pipe:
            committed = len(pipe.read())
        store = Store.in_folder(tmp_path)
        assert all(is_whole(store, number, run) for number in range(committed)), run
        done = store.done(action(0, run).generation)
        assert committed <= len(done) <= committed + 1, run
        assert all(is_whole(store, number, run) for number in range(len(done))), run
        num_interrupted += len(done) == committed
        with store.scratch() as own:
            num_leftovers += len(list((tmp_path / "tmp").iterdir())) - 1
            store.remove_leftovers()
            assert list((tmp_path / "tmp").iterdir()) == [own], run
        commit(store, committed, run)
        assert is_whole(Store.in_folder(tmp_path), committed, run), "the next run heals"
    assert all(path.name == digest_file(path) for path in tmp_path.glob("cas/*/*"))
    assert num_interrupted > NUM_KILLS // 2
    assert num_leftovers > NUM_KILLS // 20, "some were killed while they wrote"
    assert capsys.readouterr().err == ""
