"""The graph as a user runs it: what runs again after which change, experiments, clones, kills and lost stores.

One small world is simulated and made once; each test works on a copy.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from stages.harness import STAGES
from stages.sim.simulate import simulate
from tests import clones
from tests.clones import counters, num_scenes, outputs, run

NUM_DRIVES = 4
ITEM_STAGES = ("ingest", "sample", "autolabel", "train", "evaluate")
KNOBS = """
curate: {scene_s: 5.0, min_scene_s: 5.0, rules: {moving: null}}
split: {quotas: {train: 0.5, val: 0.5, test: 0.0}}
sample: {keyframe_hz: 2.0}
train: {steps: 4, batch_size: 2}
"""


@pytest.fixture(scope="session")
def drives(tmp_path_factory) -> Path:
    """Simulated drives of 6 s; the last of them is the new one."""
    folder = tmp_path_factory.mktemp("drives")
    simulate(folder, NUM_DRIVES + 1, 6.0, 0, workers=2)
    return folder


@pytest.fixture(scope="session")
def world(drives, tmp_path_factory) -> Path:
    """A clone whose every stage has run on the first drives."""
    folder = clones.new_clone(tmp_path_factory.mktemp("world") / "clone", KNOBS)
    shutil.copytree(drives, folder / "data/raw/bags", ignore=shutil.ignore_patterns(f"drive_{NUM_DRIVES:04}*"))
    run(folder, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    run(folder, "dvc", "repro")
    clones.commit(folder, "made")
    return folder


@pytest.fixture
def clone(world, tmp_path) -> Path:
    return clones.copy(world, tmp_path / "clone")


def ran(text: str) -> list[str]:
    """The stages that a `dvc repro` ran."""
    return [stage for stage in STAGES if f"Running stage '{stage}'" in text]


def set_knob(folder: Path, stage: str, knob: str, value) -> None:
    """Edits conf/ as a user does, and composes."""
    path = folder / "conf/experiment/small.yaml"
    values = yaml.safe_load(path.read_text())
    values.setdefault(stage, {})[knob] = value
    path.write_text("# @package _global_\n" + yaml.safe_dump(values))
    run(folder, "roadmill", "compose")


def test_a_second_repro_runs_no_stage(clone):
    assert "Data and pipelines are up to date" in run(clone, "dvc", "repro")
    assert num_scenes(clone) == NUM_DRIVES
    assert run(clone, "git", "status", "--porcelain") == ""


def test_one_knob_runs_only_what_depends_on_it(clone):
    set_knob(clone, "evaluate", "num_worst", 1)
    assert ran(run(clone, "dvc", "repro")) == ["evaluate"]
    set_knob(clone, "autolabel", "min_score", 0.2)
    assert ran(run(clone, "dvc", "repro"))[:1] == ["autolabel"]
    assert counters(clone)["autolabel"]["ran"] == NUM_DRIVES


def test_a_new_drive_runs_only_its_own_actions(clone, drives):
    before = {row.read_bytes() for row in [clone / "data/split/scenes.parquet"]}
    for name in os.listdir(drives):
        if name.startswith(f"drive_{NUM_DRIVES:04}"):
            source, target = drives / name, clone / "data/raw/bags" / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    assert "1 new, 0 changed, 0 gone" in run(clone, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    run(clone, "dvc", "repro")
    assert num_scenes(clone) == NUM_DRIVES + 1
    for stage in ("ingest", "sample", "autolabel"):
        record = counters(clone)[stage]
        assert (record["cached"], record["ran"]) == (NUM_DRIVES, 1), stage
        assert list(record["seconds_per_item"])[0].startswith(f"drive_{NUM_DRIVES:04}")
    assert before != {(clone / "data/split/scenes.parquet").read_bytes()}


def test_an_experiment_in_a_temporary_folder_meets_the_same_store(clone):
    run(clone, "dvc", "exp", "run", "--temp", "--name", "slow", "-S", "sample.keyframe_hz=1")
    run(clone, "dvc", "get", ".", "data/merge/tables", "--rev", "slow", "-o", "slow")
    run(clone, "dvc", "get", ".", "data/merge/tables", "--rev", "HEAD", "-o", "head")
    import polars as pl

    heights = [pl.read_parquet(clone / name / f"{table}.parquet").height
               for name in ("slow", "head") for table in ("scene", "sample")]
    assert heights[0] == heights[2] == NUM_DRIVES
    assert heights[1] < heights[3]
    assert "Data and pipelines are up to date" in run(clone, "dvc", "repro")


def test_a_queued_sweep_of_four_makes_four_datasets(clone):
    run(clone, "dvc", "exp", "run", "--queue", "-S", "sample.keyframe_hz=1,2", "-S", "sample.jpeg_quality=80,90")
    run(clone, "dvc", "exp", "run", "--run-all")
    names = [line.split()[-1].strip("[]") for line in run(clone, "dvc", "exp", "list", "--name-only").splitlines()]
    sizes = set()
    for name in names:
        run(clone, "dvc", "get", ".", "data/merge/tables", "--rev", name, "-o", name)
        import polars as pl

        assert pl.read_parquet(clone / name / "scene.parquet").height == NUM_DRIVES
        sizes.add((pl.read_parquet(clone / name / "sample.parquet").height,
                   pl.read_parquet(clone / name / "sample_data.parquet")["bytes"].sum()))
    assert len(names) == len(sizes) == 4


def test_a_fresh_clone_with_pulled_data_runs_nothing(clone, tmp_path):
    run(clone, "dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    clones.commit(clone, "remote")
    run(clone, "dvc", "push")
    run(tmp_path, "git", "clone", "--quiet", str(clone), "fresh")
    fresh = tmp_path / "fresh"
    assert ran(run(fresh, "dvc", "repro", "--allow-missing")) == []
    run(fresh, "dvc", "pull")
    assert ran(run(fresh, "dvc", "repro", "--allow-missing")) == []
    assert num_scenes(fresh) == NUM_DRIVES
    assert {k: v for k, v in outputs(fresh).items()} == outputs(clone)


def test_a_recorded_experiment_is_a_commit_that_a_fresh_clone_agrees_with(clone, tmp_path):
    run(clone, "dvc", "exp", "run", "-S", "evaluate.num_worst=1", "-S", "merge.view_max_scenes=3")
    text = run(clone, "roadmill", "record", "leaner")
    assert "merge.view_max_scenes=3" in text
    assert run(clone, "git", "status", "--porcelain") == ""
    run(clone, "dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    clones.commit(clone, "remote")
    run(clone, "dvc", "push")
    run(tmp_path, "git", "clone", "--quiet", str(clone), "fresh")
    fresh = tmp_path / "fresh"
    assert "leaner" in run(fresh, "dvc", "metrics", "show", "-T")
    assert yaml.safe_load((fresh / "params.yaml").read_text())["merge"]["view_max_scenes"] == 3
    run(fresh, "dvc", "pull")
    assert ran(run(fresh, "dvc", "exp", "run", "--allow-missing")) == []
    assert "is taken" in run(clone, "roadmill", "record", "leaner", code=2)


@pytest.mark.parametrize("lost", ["all", "cas", "ac", "random"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_store_changes_no_byte_of_what_a_stage_makes(clone, stage, lost):
    before = outputs(clone)
    store = clone / "data/store"
    if lost == "random":
        blobs = sorted(path for path in (store / "cas").rglob("*") if path.is_file())
        for path in random.Random(stage).sample(blobs, len(blobs) // 2):
            path.unlink()
    else:
        shutil.rmtree(store if lost == "all" else store / lost)
    run(clone, "python", "-m", "stages", stage)
    assert outputs(clone) == before


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_repro_finishes_with_the_same_bytes(world, tmp_path, seed):
    clone = clones.copy(world, tmp_path / "clone")
    before, dice = outputs(clone), random.Random(seed)
    for name in ("data/store", ".dvc/cache", *(f"data/{s}" for s in STAGES if s != "train"), "models", "results"):
        shutil.rmtree(clone / name, ignore_errors=True)
    (clone / "dvc.lock").unlink()
    for _ in range(3):
        process = subprocess.Popen(["dvc", "repro"], cwd=clone, env=clones.shell(), start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(2, 15))
        victims = [process.pid, *_descendants(process.pid)]
        os.kill(dice.choice(victims), signal.SIGKILL)
        time.sleep(0.5)
        if process.poll() is None and dice.random() < 0.5:
            process.kill()
        process.wait()
        if (clone / "dvc.lock").exists() and not _is_whole(clone / "dvc.lock"):
            (clone / "dvc.lock").unlink()
    run(clone, "dvc", "repro")
    assert outputs(clone) == before


def _descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2])))
    found, left = [], [pid]
    while left:
        children = [child for child, parent in parents.items() if parent == left[-1] and child not in found]
        left.pop()
        found += children
        left += children
    return found


def _is_whole(lock: Path) -> bool:
    try:
        return isinstance(yaml.safe_load(lock.read_text()), dict)
    except yaml.YAMLError:
        return False


def test_no_process_of_a_killed_repro_goes_on(clone):
    shutil.rmtree(clone / "data/store")
    (clone / "dvc.lock").unlink()
    process = subprocess.Popen(["dvc", "repro"], cwd=clone, env=clones.shell(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(below := _descendants(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_second_run_of_a_stage_waits_and_says_so(clone):
    (clone / ".roadmill").mkdir(exist_ok=True)
    import fcntl

    with (clone / ".roadmill/curate.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        second = subprocess.Popen(["python", "-m", "stages", "curate"], cwd=clone, env=clones.shell(),
                                  stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert second.stderr.readline() == "curate: waiting for process 4711, which runs it here\n"
    assert second.wait(60) == 0


def test_a_torn_lock_is_named_with_its_way_back_and_costs_no_item(clone):
    lock = clone / "dvc.lock"
    lock.write_bytes(lock.read_bytes()[: lock.stat().st_size // 2].rsplit(b":", 1)[0])
    assert "git checkout dvc.lock" in run(clone, "roadmill", "doctor", code=2)
    lock.unlink()
    run(clone, "dvc", "repro")
    assert all(counters(clone)[stage]["ran"] == 0 for stage in ITEM_STAGES)
    assert run(clone, "git", "status", "--porcelain") == ""


def test_two_clones_share_one_store_at_once(world, tmp_path):
    before, both = outputs(world), []
    for name in ("one", "two"):
        clone = clones.copy(world, tmp_path / name)
        shutil.rmtree(clone / "data/store")
        (clone / "dvc.lock").unlink()
        (clone / "shared.yaml").write_text(f"root: {tmp_path / 'store'}\n")
        both.append((clone, subprocess.Popen(["dvc", "repro"], cwd=clone, stdout=subprocess.DEVNULL,
                                             env=clones.shell(ROADMILL_STORE="shared.yaml"))))
    for clone, process in both:
        assert process.wait(600) == 0
        assert outputs(clone) == before


def test_one_worker_and_two_make_equal_bytes(clone):
    before = outputs(clone)
    shutil.rmtree(clone / "data/store")
    (clone / "one.yaml").write_text("workers: 1\ntimeout_s: {default: 1800}\n")
    for stage in STAGES:
        run(clone, "python", "-m", "stages", stage, ROADMILL_RUNNER="one.yaml")
    assert outputs(clone) == before


def test_a_broken_recording_is_named_the_others_are_kept_and_a_tolerance_is_recorded(clone):
    bag = next((clone / "data/raw/bags/drive_0001").glob("*.mcap"))
    bag.write_bytes(bag.read_bytes()[:20_000])
    run(clone, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    text = run(clone, "python", "-m", "stages", "ingest", code=3)
    assert "ingest: drive_0001: " in text
    assert "Traceback" not in text
    assert "1 of 4 items failed, the others are kept" in text
    set_knob(clone, "ingest", "max_failed_ratio", 0.25)
    run(clone, "dvc", "repro")
    assert num_scenes(clone) == NUM_DRIVES - 1
    assert '"error"' in (clone / "data/ingest/manifest.jsonl").read_text()


def test_why_names_the_knob_old_and_new_and_what_follows(clone):
    assert run(clone, "roadmill", "why").strip() == ", ".join(STAGES) + ": unchanged"
    set_knob(clone, "autolabel", "min_score", 0.3)
    text = run(clone, "roadmill", "why", "autolabel")
    assert "autolabel will run\n  autolabel.min_score   0.1 -> 0.3   params.yaml" in text
    assert "what follows: merge, train, evaluate" in text
    (clone / "stages/lib/places.py").write_text((clone / "stages/lib/places.py").read_text() + "\n")
    assert "stages/lib/places.py: code modified" in run(clone, "roadmill", "why", "split")
    assert "did you mean ingest" in run(clone, "roadmill", "why", "ingst", code=2)


def test_explain_says_hit_or_miss_and_what_differs(clone):
    text = run(clone, "roadmill", "explain", "drive_0001")
    assert [line.split()[2] for line in text.splitlines()] == ["hit", "hit"]
    set_knob(clone, "sample", "jpeg_quality", 70)
    text = run(clone, "roadmill", "explain", "drive_0001")
    assert "knobs.jpeg_quality   95 -> 70" in text
    assert "is called 'drive_9'" in run(clone, "roadmill", "explain", "drive_9", code=2)


def test_a_stale_params_file_is_found_by_doctor(clone):
    (clone / "params.yaml").write_text((clone / "params.yaml").read_text().replace("steps: 4", "steps: 5"))
    assert "it is not the composition of conf/" in run(clone, "roadmill", "doctor", code=2)
