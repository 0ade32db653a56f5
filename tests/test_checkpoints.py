"""Checkpoints: the newest whole state is found whatever is damaged, little is kept, and nothing outlives its use."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest

from stages.lib import checkpoints
from stages.lib.checkpoints import Checkpoints, Standing, StoppedError
from stages.lib.digests import digest_bytes
from stages.lib.errors import RemoteError
from stages.store.folder import Folder
from stages.tools import collect
from tests.fake_clone import FakeClone
from tests.places import DAY_S, PLACES
from tests.test_train import cfg as train_cfg
from tests.test_train import merged, planned, world  # noqa: F401 (fixtures)

KEY = "a" * 64
AT_ONCE, NEVER = 0.0, 1e9


@pytest.fixture(params=sorted(PLACES))
def place(request, tmp_path):
    return PLACES[request.param](tmp_path)


def opened(place, every_s: float = AT_ONCE, key: str = KEY) -> Checkpoints:
    return Checkpoints(place.store().shared, key, every_s)


def keep(place, *steps: int) -> None:
    """One attempt that does these steps."""
    with opened(place) as own:
        own.load()
        for step in steps:
            own.offer(step, lambda step=step: b"state %d" % step)


def kept(place) -> set[str]:
    return {name.removeprefix(f"checkpoints/{KEY}/") for name in place.names()}


# what is kept -------------------------------------------------------------------------------------------------------
def test_the_two_newest_states_are_kept_and_the_newest_is_loaded(place):
    keep(place, 1, 2, 3, 4)
    assert kept(place) == {"started", "000000003", "000000004", "LATEST"}
    assert json.loads(place.names()[f"checkpoints/{KEY}/LATEST"]) == [
        {"step": step, "sha256": digest_bytes(b"state %d" % step), "bytes": 7} for step in (4, 3)]
    assert opened(place).load() == b"state 4"


def test_an_action_without_checkpoints_begins_at_the_beginning(place):
    assert opened(place).load() is None


def test_a_state_is_kept_when_it_is_time_and_not_before(place):
    with opened(place, NEVER) as own:
        own.offer(1, lambda: pytest.fail("packed for nothing"))
    assert kept(place) == {"started"}


def test_the_pointer_is_written_last_so_that_a_kill_in_between_leaves_the_state_before(place, monkeypatch):
    keep(place, 1)
    order = []
    shared = place.store().shared
    write = type(shared).write
    monkeypatch.setattr(type(shared), "write", lambda self, name, data: (order.append(name), write(self, name, data)))
    keep(place, 2)
    assert [name.rpartition("/")[2] for name in order] == ["000000002", "LATEST"]
    place.damage(f"checkpoints/{KEY}/LATEST", json.dumps(
        [{"step": 1, "sha256": digest_bytes(b"state 1"), "bytes": 7}]).encode())
    assert opened(place).load() == b"state 1"


@pytest.mark.parametrize(("damage", "words"), [(b"state ", "damaged, 6 bytes that are not "), (None, "gone")])
def test_a_damaged_state_is_said_and_the_one_before_is_taken(place, capsys, damage, words):
    keep(place, 1, 2)
    place.damage(f"checkpoints/{KEY}/000000002", damage)
    with opened(place) as own:
        assert own.load() == b"state 1"
        err = capsys.readouterr().err
        assert err.startswith(f"{place.store().shared.where}/checkpoints/{KEY}/000000002: {words}")
        assert err.endswith("; the one before is taken\ngoes on from step 1\n")
        own.offer(2, lambda: b"state 2")
    assert opened(place).load() == b"state 2"


def test_where_all_is_damaged_the_work_begins_anew(place):
    keep(place, 1, 2)
    for step in (1, 2):
        place.damage(f"checkpoints/{KEY}/00000000{step}", b"")
    assert opened(place).load() is None
    keep(place, 1)
    assert opened(place).load() == b"state 1"


@pytest.mark.parametrize("latest", [b"", b"[{", b"{}", b'[{"step": "x"}]', b"[3]"])
def test_a_torn_pointer_is_no_pointer(place, latest):
    keep(place, 1, 2)
    place.damage(f"checkpoints/{KEY}/LATEST", latest)
    assert opened(place).load() is None
    keep(place, 1)
    assert opened(place).load() == b"state 1"


def test_a_twin_that_lags_behind_does_not_turn_back_the_pointer(place):
    with opened(place) as ahead, opened(place) as behind:
        ahead.offer(5, lambda: b"state 5")
        behind.offer(2, lambda: b"state 2")
    assert opened(place).load() == b"state 5"


def test_a_place_that_fails_is_said_and_the_work_goes_on(place, monkeypatch, capsys):
    with opened(place) as own:
        with monkeypatch.context() as broken:
            broken.setattr(type(place.store().shared), "write", _refuse)
            own.offer(1, lambda: b"state 1")
        assert capsys.readouterr().err == "the state after step 1 could not be kept: no room\n"
        own.offer(2, lambda: b"state 2")
    assert opened(place).load() == b"state 2"


def _refuse(*_):
    raise RemoteError("no room")


def test_nothing_is_left_of_an_action_that_is_done(place):
    keep(place, 1, 2)
    opened(place).forget()
    assert kept(place) == set()


def test_who_waits_sees_when_it_began_and_how_far_it_has_come(place):
    shared = place.store().shared
    assert checkpoints.standing(shared, KEY) is None
    with opened(place, NEVER):
        pass
    begun = checkpoints.standing(shared, KEY)
    assert begun == Standing(begun.started_s, None, 0)
    place.pass_days(1)
    keep(place, 7)
    found = checkpoints.standing(shared, KEY)
    assert found.started_s == pytest.approx(begun.started_s - DAY_S, abs=1e-3), "a later attempt is not the first"
    assert (found.step, found.saved_s > found.started_s) == (7, True)


def test_a_collection_takes_what_nobody_has_gone_on_with_for_its_grace_period(tmp_path):
    place = PLACES["folder"](tmp_path / "store")
    clone = FakeClone(tmp_path / "clone", place.folder)
    clone.commit({})
    keep(place, 1, 2)
    place.pass_days(31)
    with opened(place, key="b" * 64) as own:
        own.offer(3, lambda: b"young")
    say = "checkpoints of trainings that were given up: 0.000 GiB"
    assert f"{say} would be deleted" in collect.collect(clone.folder, [], 30.0, dry_run=True)
    assert len(place.names()) == 7
    assert f"{say} deleted" in collect.collect(clone.folder, [], 30.0, dry_run=False)
    assert {name.split("/")[1] for name in place.names() if name.startswith("checkpoints/")} == {"b" * 64}


# signals ------------------------------------------------------------------------------------------------------------
def test_sigterm_asks_for_a_last_state_and_then_goes_to_whoever_had_it_before(place):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("before"))
    own = opened(place, NEVER)
    try:
        with own:
            own.offer(2, lambda: b"state 2")
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
            with pytest.raises(StoppedError, match="asked to stop after step 3\n  the same command goes on") as stopped:
                own.offer(3, lambda: b"state 3")
        assert heard == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.exit_code == 75
    assert opened(place).load() == b"state 3"


STAGE = """
import itertools, sys, time
from pathlib import Path
from types import SimpleNamespace
import polars  # it takes SIGINT for its own
from stages import __main__ as program
from stages.lib.checkpoints import Checkpoints
from stages.runners.local import perform
from stages.store.folder import Folder

def count_for_ever(folder):
    with Checkpoints(Folder(Path(folder)), "a" * 64, 1e9) as own:
        for step in itertools.count(1):
            Path(folder, "counts").touch()
            time.sleep(0.01)
            own.offer(step, lambda: b"state")

if __name__ == "__main__":
    program.Harness = lambda root: SimpleNamespace(
        run=lambda folder: list(perform(count_for_ever, [folder], workers=1, timeout_s=600)))
    sys.exit(program.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_is_stopped_lets_its_items_keep_what_they_have(tmp_path, number):
    (tmp_path / "stage.py").write_text(STAGE)
    stage = subprocess.Popen([sys.executable, tmp_path / "stage.py", tmp_path], text=True, stderr=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while not (tmp_path / "counts").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stage.send_signal(number)
    _, err = stage.communicate(timeout=60)
    assert stage.returncode == 130
    assert "stopped; what was done is kept, the same command goes on from there" in err
    assert checkpoints.standing(Folder(tmp_path), KEY).step > 0


# a training ---------------------------------------------------------------------------------------------------------
def attempts(folder, world, merged, *words: str) -> tuple[list[int], str]:  # noqa: F811
    """How the attempts of tests/interrupted.py ended, and what they said."""
    changes = {"steps": 12, "batch_size": 2}
    item = planned(merged, **changes)
    inputs = {role: what if hasattr(what, "parts") else world.open_pack(what) for role, what in item.inputs.items()}
    folder.mkdir()
    (folder / "action").write_bytes(pickle.dumps((train_cfg(**changes), item, inputs)))
    done = subprocess.run([sys.executable, "-m", "tests.interrupted", str(folder), *words],
                          text=True, capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()], done.stderr


def test_a_training_that_is_killed_again_and_again_equals_one_that_never_was(world, merged, tmp_path):  # noqa: F811
    """kill -9 at five steps drawn by chance, some of them while a state is written, and SIGTERM at two."""
    steps = sorted(random.Random(5).choices(range(1, 13), k=5))
    ends, _ = attempts(tmp_path / "whole", world, merged)
    assert ends == [0]
    ends, told = attempts(tmp_path / "torn", world, merged, "SIGTERM:1", *(f"SIGKILL:{step}" for step in steps),
                          "SIGTERM:12")
    assert ends == [-15, *[-9] * 5, -15, 0]
    assert told.count("goes on from step ") >= 6
    assert "goes on from step 12\n" in told, "the batch norm statistics were all that was left to do"
    for name in ("model.pt", "model.onnx", "curves.csv", "model_card.md"):
        assert (tmp_path / "torn/out" / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes(), name
    left = {name.rpartition("/")[2] for name in Folder(tmp_path / "torn/store").names("checkpoints/")}
    assert len(left - {"started", "LATEST"}) <= 2
