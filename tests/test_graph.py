"""The graph as a user runs it: what runs again after which change, experiments, clones, kills and lost stores.

Each test works on a copy of the small world.
"""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from stages.harness import ITEM_STAGES, STAGES, Harness, load_knobs
from stages.lib.errors import ConfigError
from tests import clones
from tests.clones import counters, num_rows, outputs, run, set_knob
from tests.small_world import NEW, NUM_DRIVES, NUM_SCENES

SAMPLES = "data/merge/tables/sample.parquet"


@pytest.fixture
def clone(world, tmp_path) -> Path:
    return clones.copy(world, tmp_path / "clone")


def ran(text: str) -> list[str]:
    """The stages that a `dvc repro` ran."""
    return [stage for stage in STAGES if f"Running stage '{stage}'" in text]


def work(folder: Path, stage: str) -> tuple[int, int]:
    """How many items of the stage were in the store, and how many ran, the last time."""
    record = counters(folder)[stage]
    return record["cached"], record["ran"]


def test_a_second_repro_runs_no_stage(world):
    assert "Data and pipelines are up to date" in run(world, "dvc", "repro")
    assert num_rows(world) == NUM_SCENES
    assert run(world, "git", "status", "--porcelain") == ""


def test_one_knob_runs_only_what_depends_on_it_and_why_says_so_before(clone):
    assert run(clone, "roadmill", "why").strip() == ", ".join(STAGES) + ": unchanged"
    set_knob(clone, "autolabel", "num_pictures", 1)
    text = run(clone, "roadmill", "why", "autolabel")
    assert text.splitlines() == ["autolabel will run", "  autolabel.num_pictures   3 -> 1   params.yaml",
                                 "what follows: merge, train, evaluate, as far as its output changes"]
    assert ran(run(clone, "dvc", "repro")) == ["autolabel"]
    assert work(clone, "autolabel") == (NUM_SCENES, 0), "a knob of the report alone runs no item"
    set_knob(clone, "autolabel", "min_score", 0.2)
    (clone / "stages/lib/places.py").write_text((clone / "stages/lib/places.py").read_text() + "\n")
    text = run(clone, "roadmill", "why")
    assert text.splitlines() == [
        "split will run", "  stages/lib/places.py: code modified",
        "sample will run if the output of split changes",
        "autolabel will run", "  autolabel.min_score   0.1 -> 0.2   params.yaml",
        "merge will run if the output of split or sample or autolabel changes",
        "train will run if the output of merge changes",
        "evaluate will run if the output of autolabel or merge or train changes",
        "ingest, curate: unchanged"]
    assert "did you mean ingest" in run(clone, "roadmill", "why", "ingst", code=2)
    assert ran(run(clone, "dvc", "repro", "autolabel")) == ["split", "autolabel"]
    assert work(clone, "autolabel") == (0, NUM_SCENES)


def test_one_new_drive_among_ten_runs_only_its_own_actions(clone, drives):
    for path in (drives / "long").glob(f"{NEW}*"):
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, clone / "data/raw/bags/long" / path.name)
    assert "1 new, 0 changed, 0 gone" in run(clone, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    run(clone, "dvc", "repro", "merge")
    assert num_rows(clone) == NUM_SCENES + 1
    assert work(clone, "ingest") == (NUM_DRIVES, 1)
    assert work(clone, "sample") == work(clone, "autolabel") == (NUM_SCENES, 1)
    for stage in ("ingest", "sample", "autolabel"):
        (name,) = counters(clone)[stage]["seconds_per_item"]
        assert NEW in name


def test_experiments_beside_each_other_share_the_store(clone):
    """One in a temporary folder, then a queued sweep of four: each dataset is whole, and no action runs twice."""
    done = {stage: len(list((clone / f"data/store/ac/{stage}").rglob("*.*"))) for stage in ITEM_STAGES}
    run(clone, "dvc", "exp", "run", "--temp", "--name", "slow", "-S", "sample.keyframe_hz=1", "merge")
    (slow,) = experiments(clone)
    assert num_rows(clone, rev=slow) == num_rows(clone) == NUM_SCENES
    assert num_rows(clone, SAMPLES, slow) < num_rows(clone, SAMPLES)
    sweep = ("-S", "sample.keyframe_hz=1,2", "-S", "sample.num_pictures=4,2")
    run(clone, "dvc", "exp", "run", "--queue", *sweep, "sample")
    run(clone, "dvc", "exp", "run", "--run-all")
    found = set()
    for rev in experiments(clone) - {slow}:
        knobs = yaml.safe_load(run(clone, "git", "show", f"{rev}:params.yaml"))["sample"]
        found.add((knobs["keyframe_hz"], knobs["num_pictures"], num_rows(clone, "data/sample/scenes.parquet", rev)))
    assert found == {(hz, pictures, NUM_SCENES) for hz in (1.0, 2.0) for pictures in (4, 2)}
    for stage in ("sample", "autolabel"):
        assert len(list((clone / f"data/store/ac/{stage}").rglob("*.*"))) == done[stage] + NUM_SCENES, "no work twice"
    assert "Data and pipelines are up to date" in run(clone, "dvc", "repro")


def experiments(clone: Path) -> set[str]:
    """The commits of the experiments."""
    return set(run(clone, "git", "for-each-ref", "--format=%(objectname)", "refs/exps/*/*/*").split())


def test_a_fresh_clone_runs_nothing_with_or_without_pulled_data(clone, tmp_path):
    run(clone, "dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    run(clone, "git", "commit", "--quiet", "-m", "remote", ".dvc/config")
    run(clone, "dvc", "push")
    run(tmp_path, "git", "clone", "--quiet", str(clone), "fresh")
    fresh = tmp_path / "fresh"
    assert ran(run(fresh, "dvc", "repro", "--allow-missing")) == []
    gone = "data/recordings, data/ingest, results/ingest/report.html"
    assert f"  not on this machine: {gone}; `dvc pull` fetches it" in run(fresh, "roadmill", "why", "ingest")
    assert "a scan would forget what it holds" in run(fresh, "roadmill", "scan", "data", "--rig", "sim", code=2)
    assert "data/merge does not exist\n  `dvc repro merge`" in run(fresh, "roadmill", "check", code=2)
    run(fresh, "dvc", "pull")
    assert ran(run(fresh, "dvc", "repro", "--allow-missing")) == []
    assert num_rows(fresh) == NUM_SCENES
    assert outputs(fresh) == outputs(clone)
    text = run(fresh, "python", "-m", "stages", "autolabel", code=2)
    assert "autolabel: 4 of 4 items failed, the others are kept\n" in text
    assert "recording 'long/drive_0000' (" in text
    assert "set ROADMILL_SOURCE to the folder or s3://bucket/prefix it is relative to" in text
    assert "Traceback" not in text


def test_a_recorded_experiment_is_a_commit_that_a_fresh_clone_agrees_with(clone, tmp_path):
    run(clone, "dvc", "exp", "run", "-S", "sample.num_pictures=2")
    assert "sample.num_pictures=2" in run(clone, "roadmill", "record", "two")
    run(clone, "dvc", "exp", "run", "--temp", "--name", "tried", "-S", "sample.num_pictures=3", "sample")
    run(clone, "dvc", "exp", "apply", "tried")
    text = run(clone, "roadmill", "record", "three")
    assert "sample.num_pictures=3" in text
    assert "sample.num_pictures=2" not in text, "an experiment stands by itself"
    assert run(clone, "git", "status", "--porcelain") == ""
    run(clone, "git", "diff", "--exit-code", "HEAD", "three")
    assert "'three' is taken" in run(clone, "roadmill", "record", "three", code=2)
    assert "cannot name an experiment" in run(clone, "roadmill", "record", "a..b", code=2)
    run(tmp_path, "git", "clone", "--quiet", str(clone), "fresh")
    fresh = tmp_path / "fresh"
    shown = run(fresh, "dvc", "metrics", "show", "-T")
    assert "two" in shown
    assert "three" in shown
    for name, pictures in (("three", 3), ("two", 2)):
        run(fresh, "git", "checkout", "--quiet", name)
        assert yaml.safe_load((fresh / "params.yaml").read_text())["sample"]["num_pictures"] == pictures
        assert ran(run(fresh, "dvc", "exp", "run", "--allow-missing")) == []
        assert run(fresh, "git", "status", "--porcelain") == ""


def lose(store: Path, what: str) -> None:
    """Deletes a subset of the store."""
    if what == "half":
        blobs = sorted(path for path in (store / "cas").rglob("*") if path.is_file())
        for path in random.Random(0).sample(blobs, len(blobs) // 2):
            path.unlink()
    else:
        shutil.rmtree(store / what, ignore_errors=True)


@pytest.mark.parametrize("runner", ["one worker", "two workers"])
def test_a_lost_store_changes_no_byte_of_what_is_made(clone, runner):
    """Some loss before each stage, as after a change in that stage alone; by one worker, and by two."""
    before = outputs(clone)
    losses = {"ingest": ".", "curate": "cas", "split": "half", "sample": "cas", "autolabel": ".", "merge": "ac"}
    if runner == "two workers":
        losses = {"ingest": "half", "sample": "ac", "autolabel": "half", "merge": "cas", "evaluate": "."}
    (clone / "runner.yaml").write_text(f"workers: {1 if runner == 'one worker' else 2}\ntimeout_s: {{default: 1800}}\n"
                                       "checkpoint_s: 300\n")
    for stage, what in losses.items():
        lose(clone / "data/store", what)
        shutil.rmtree(clone / {"train": "models"}.get(stage, f"data/{stage}"))  # as DVC does before it runs a stage
        run(clone, "python", "-m", "stages", stage, ROADMILL_RUNNER="runner.yaml")
        assert outputs(clone) == before, (stage, what)


def test_two_clones_share_one_store_while_one_is_killed_again_and_again(world, tmp_path):
    """kill -9 at random moments of dvc or any child; nothing goes on without its parent, and all bytes are as ever."""
    before, dice = outputs(world), random.Random(0)
    (tmp_path / "store.yaml").write_text(f"root: {tmp_path / 'store'}\n")
    both = [clones.copy(world, tmp_path / name) for name in ("killed", "undisturbed")]
    for clone in both:
        made = [f"{folder}/{stage}" for stage in STAGES[:-2] for folder in ("data", "results")]
        for name in ("data/store", ".dvc/cache/runs", *made):
            shutil.rmtree(clone / name)
        (clone / "dvc.lock").unlink()

    def start(clone: Path) -> subprocess.Popen:
        environment = clones.shell(clone, ROADMILL_STORE=str(tmp_path / "store.yaml"))
        return subprocess.Popen(["dvc", "repro", "merge"], cwd=clone, env=environment, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    undisturbed = start(both[1])
    for round_ in range(5):
        process = start(both[0])
        time.sleep(dice.uniform(1, 2 + round_))
        family = [process.pid, *descendants(process.pid)]
        os.kill(dice.choice(family), signal.SIGKILL)
        if dice.random() < 0.5:
            process.kill()
        process.wait()
        wait_for(lambda family=family: not any(map(runs, family)))
        mend(both[0])
    assert start(both[0]).wait() == 0
    assert undisturbed.wait() == 0
    for clone in both:
        assert outputs(clone) == before
    run(both[0], "python", "-m", "stages", "curate", ROADMILL_STORE=str(tmp_path / "store.yaml"))
    assert list((tmp_path / "store/tmp").iterdir()) == [], "what was being written is gone"


def mend(clone: Path) -> None:
    """What `roadmill doctor` says to do where DVC was killed in the middle of a file of its own."""
    files = [path for path in (clone / "dvc.lock", clone / ".dvc/tmp/rwlock") if path.exists()]
    if all(is_whole(path) for path in files):
        return
    text = run(clone, "roadmill", "doctor", code=None)
    if "delete it" in text:
        (clone / "dvc.lock").unlink()
    if "rm .dvc/tmp/rwlock" in text:
        (clone / ".dvc/tmp/rwlock").unlink()


def is_whole(path: Path) -> bool:
    try:
        return isinstance(yaml.load(path.read_text(), yaml.CSafeLoader), dict)
    except yaml.YAMLError:
        return False


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2])))
    found, left = [], [pid]
    while left:
        above = left.pop()
        below = [child for child, parent in parents.items() if parent == above]
        found += below
        left += below
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_run_of_a_stage_waits_and_says_so(clone):
    with (clone / ".roadmill/split.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        second = subprocess.Popen(["python", "-m", "stages", "split"], cwd=clone, env=clones.shell(clone),
                                  stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert second.stderr.readline() == "split: waiting for process 4711, which runs it here\n"
    assert second.wait(60) == 0


def test_files_torn_by_a_kill_are_named_with_their_way_back_or_do_no_harm(clone):
    lock = clone / "dvc.lock"
    lock.write_bytes(lock.read_bytes()[: lock.stat().st_size // 2].rsplit(b":", 1)[0])
    assert "dvc.lock: it is torn" in run(clone, "roadmill", "doctor", code=2)
    lock.unlink()
    assert ran(run(clone, "dvc", "repro")) == [], "DVC knows its runs without its lock"
    assert run(clone, "git", "status", "--porcelain") == ""
    for path in (clone / "results/run.json", clone / ".roadmill/hashes.jsonl"):
        path.write_text(path.read_text()[:-20])
    run(clone, "python", "-m", "stages", "ingest")
    assert list(counters(clone)) == ["ingest"]
    manifest = clone / "data/sample/manifest.jsonl"
    manifest.unlink()
    manifest.write_text('{"name": "dr')
    text = run(clone, "python", "-m", "stages", "autolabel", code=2)
    assert "data/sample/manifest.jsonl is damaged: " in text
    assert "`dvc checkout data/sample` restores it" in text
    listing = clone / "data/recordings/bags.jsonl"
    listing.unlink()
    listing.write_text('{"name": "dr')
    assert "bags.jsonl, line 1: not a recording" in run(clone, "python", "-m", "stages", "ingest", code=2)


FAULTS = '''

_run = run


def run(cfg, item, inputs, out):
    import os, time
    if item.name == "short/drive_0001":
        os.kill(os.getpid(), 9)
    if item.name == "short/drive_0002":
        time.sleep(600)
    if item.name == "short/drive_0003":
        raise KeyError("a bug")
    return _run(cfg, item, inputs, out)
'''


def test_items_that_fail_hang_or_crash_are_named_and_the_others_are_kept(clone):
    bag = next((clone / "data/raw/bags/short/drive_0000").glob("*.mcap"))
    damaged = bag.read_bytes()[:20_000]
    bag.unlink()
    bag.write_bytes(damaged)
    assert "0 new, 1 changed, 0 gone" in run(clone, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    text = run(clone, "python", "-m", "stages", "ingest", code=3)
    assert "ingest: short/drive_0000: " in text
    assert f"short/drive_0000/{bag.name}: " in text
    assert "1 of 10 items failed, the others are kept\n  ingest.max_failed_ratio=0 allows 0\n" in text
    assert "Traceback" not in text

    healthy = (clone / "stages/ingest.py").read_text()
    (clone / "stages/ingest.py").write_text(healthy + FAULTS)
    (clone / "runner.yaml").write_text("workers: 2\ntimeout_s: {default: 5}\ncheckpoint_s: 300\n")
    for cached, failing in ((0, 10), (6, 4)):
        text = run(clone, "python", "-m", "stages", "ingest", code=1, ROADMILL_RUNNER="runner.yaml")
        for line in ("ingest: short/drive_0001: its process died (exit code -9)\n",
                     "ingest: short/drive_0002: took more than 5 s and was stopped\n",
                     "ingest: short/drive_0003: KeyError: 'a bug'\n",
                     "ingest: 4 of 10 items failed, the others are kept\n"):
            assert line in text
        assert text.count("Traceback (most recent call last)") == 1, text  # where the bug is
        assert work(clone, "ingest") == (cached, failing)

    (clone / "stages/ingest.py").write_text(healthy)
    set_knob(clone, "ingest", "max_failed_ratio", 0.1)
    assert "ingest: short/drive_0000: " in run(clone, "python", "-m", "stages", "ingest")
    manifest = (clone / "data/ingest/manifest.jsonl").read_text()
    assert '"error":"short/drive_0000/' in manifest
    assert str(clone) not in manifest, "it is the same on every machine"
    assert len(manifest.splitlines()) == NUM_DRIVES


def test_explain_says_hit_or_miss_and_what_differs_from_what_is_there(clone):
    text = run(clone, "roadmill", "explain", "long/drive_0001")
    assert [(line.split()[0], line.split()[2]) for line in text.splitlines()] == [
        ("ingest", "hit"), ("sample", "hit"), ("autolabel", "hit")]
    set_knob(clone, "sample", "jpeg_quality", 70)
    path = clone / "stages/ingest.py"
    path.write_text(path.read_text() + FAULTS)
    text = run(clone, "roadmill", "explain", "long/drive_0001")
    assert "  knobs.jpeg_quality   95 -> 70\n" in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[2] for line in lines if line[0] in ITEM_STAGES] == ["miss", "miss", "hit"]
    assert lines[1][0] == "code"
    assert lines[1][1] != lines[1][3]
    assert "cache.code_pins.ingest=" in text
    assert "as data/ is now; ingest runs first" in text
    old = text.split("cache.code_pins.ingest=")[1].split()[0]
    set_knob(clone, "cache", "code_pins", {"ingest": old})
    assert "hit" in run(clone, "roadmill", "explain", "long/drive_0001").splitlines()[0]
    assert "is called 'drive_9'" in run(clone, "roadmill", "explain", "drive_9", code=2)


def test_settings_that_are_wrong_are_one_to_three_lines_with_exit_code_2(clone):
    params = clone / "params.yaml"
    good = params.read_text()

    def says(words: str, *command: str, code: int = 2, **environment: str) -> None:
        text = run(clone, *command, code=code, **environment)
        assert words in text
        assert len(text.splitlines()) <= 3
        assert "Traceback" not in text

    curate = ("python", "-m", "stages", "curate")
    params.write_text(good.replace("scene_s: 2.0", "scene_ss: 2.0"))
    says("curate.scene_ss is not a knob, did you mean scene_s?", *curate)
    params.unlink()
    says("params.yaml does not exist\n  `roadmill compose` makes it", "roadmill", "why")
    params.write_text(good.replace("scene_s: 2.0", "scene_s: 3.0"))
    assert "it is not the composition of conf/" in run(clone, "roadmill", "doctor", code=2)
    says("not up to date: curate", "roadmill", "record", "later")
    params.write_text(good)
    says("'ingst' is not a stage, did you mean ingest?", "python", "-m", "stages", "ingst")
    says("the store is called 's4' (ROADMILL_STORE), but", *curate, ROADMILL_STORE="s4")
    says("no dvc.yaml here or above", "env", "-C", "/", "roadmill", "why")
    experiment = clone / "conf/experiment/small.yaml"
    for wrong, words in (("curate: {scene_s: 0}\n", "curate.scene_s is 0"), ("a: [\n", "conf/ does not compose: "),
                         ("smaple: {}\n", "unknown section 'smaple', did you mean sample?")):
        experiment.write_text(f"# @package _global_\n{wrong}")
        says(words, "roadmill", "compose")
    assert params.read_text() == good
    (clone / "here").write_text("")
    (clone / "store.yaml").write_text("root: here/store\n")
    says("here/store/tmp: Not a directory\n  `roadmill doctor` looks at the store", *curate, code=4,
         ROADMILL_STORE="store.yaml")
    shutil.rmtree(clone / "data/curate")
    says("data/curate does not exist\n  `dvc repro curate` makes it", "python", "-m", "stages", "split")


@pytest.mark.parametrize(("text", "words"), [
    ("ingest: [\n}", r"params.yaml, line 2: not YAML, .*\n  `roadmill compose`"),
    ("", r"params.yaml holds nothing, expected sections\n  `roadmill compose`"),
    ("curat: {}", "unknown section 'curat', did you mean curate?"),
    ("cache: {salt: '', code_pins: {ingst: abc}}", "'ingst' is not a stage, did you mean ingest?"),
    ("ingest: {}", "has no section 'cache'"),
], ids=["torn", "empty", "another section", "another stage", "a section is missing"])
def test_a_params_file_that_is_wrong_is_named_with_what_mends_it(tmp_path, text, words):
    shutil.copytree(clones.ROOT / "conf", tmp_path / "conf")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_knobs(Harness(tmp_path).params, "cache")
