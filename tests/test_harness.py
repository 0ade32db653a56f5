"""The harness with two small stages: what is gone is made again with the same bytes, or named."""

import dataclasses
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stages import harness
from stages.harness import Harness
from stages.lib import checkpoints, recordings, site
from stages.lib.digests import digest_bytes
from stages.lib.errors import ConfigError, RemoteError
from stages.lib.knobs import knob
from stages.lib.recordings import Recording
from stages.lib.stage import Item, Summary
from stages.store import gc
from stages.store.folder import Folder
from stages.store.store import MissingBlobError, Store
from stages.tools import damage, why
from tests.memory import Memory

ROOT = Path(__file__).parents[1]
DRIVES = ("a", "b", "c")


@dataclasses.dataclass(frozen=True)
class Knobs:
    gain: int = knob("what is written", low=1)


def ingest_run(cfg, item, inputs, out):
    (out / "own").write_bytes(b"own " + inputs["recording"].read_bytes() * cfg.gain)
    (out / "all").write_bytes(b"the same for all")
    return {"b": 1, "a": (1, 2)}


def sample_run(cfg, item, inputs, out):
    (out / "pack").write_bytes(inputs["own"].read_bytes() + inputs["all"].read_bytes())
    return {}


def collect(cfg, results, out):
    text = repr([(one.name, one.facts, [one.path(name).read_bytes() for name in one.outputs]) for one in results])
    (out.data / "table").write_text(text)
    return Summary(len(results), len(results), "items")


INGEST = SimpleNamespace(
    Knobs=Knobs, INPUTS=("recordings",), run=ingest_run, collect=collect,
    plan=lambda cfg, inputs: [Item(one.name, {}, {"recording": one.digest})
                              for one in recordings.read(inputs["recordings"].folder)])
SAMPLE = SimpleNamespace(
    Knobs=Knobs, INPUTS=("ingest",), run=sample_run, collect=collect,
    plan=lambda cfg, inputs: [Item(one.name, {}, {role: one.outputs[role].digest for role in ("own", "all")})
                              for one in inputs["ingest"].results])


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with three recordings and the stages ingest and sample, whose items run in this process."""
    modules = {"ingest": INGEST, "sample": SAMPLE}
    monkeypatch.setattr(harness, "module_of", lambda stage: modules[stage])
    monkeypatch.setattr(harness.code, "code_digest", lambda *where: "c0de")
    monkeypatch.setattr(Harness, "pins", {})
    monkeypatch.setattr(harness.local, "perform", lambda function, tasks, **how: (
        (index, function(task)) for index, task in enumerate(tasks)))
    harness._harness_of_worker.cache_clear()
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    set_gain(tmp_path, 1)
    bags = tmp_path / "data/raw"
    bags.mkdir(parents=True)
    for name in DRIVES:
        (bags / name).write_text(name)
    found = [Recording(name, 1, digest_bytes(name.encode()), "sim") for name in DRIVES]
    recordings.write_listing(found, tmp_path / "data/recordings/raw.jsonl")
    site.remember_source(tmp_path, "raw", str(bags))
    run(tmp_path, "ingest")
    run(tmp_path, "sample")
    return tmp_path


def set_gain(root, gain):
    stages = {stage: {"gain": gain} for stage in ("ingest", "sample")}
    (root / "params.yaml").write_text(yaml.safe_dump({**stages, "cache": {"salt": "", "code_pins": {}}}))


def run(root, stage):
    harness._harness_of_worker.cache_clear()
    Harness(root).run(stage)
    return (root / "data" / stage / "table").read_bytes()


def lose(root, *contents):
    for path in (root / "data/store/cas").rglob("*"):
        if path.is_file() and (not contents or path.read_bytes() in contents):
            path.unlink()


def test_a_cached_result_is_collected_as_the_first_one_was(root):
    """Equal bytes though JSON sorts keys and knows no tuples."""
    first = (root / "data/ingest/table").read_bytes()
    assert run(root, "ingest") == first
    assert b"{'a': [1, 2], 'b': 1}" in first


@pytest.mark.parametrize("contents", [(), (b"own a",), (b"the same for all",), (b"own a", b"own athe same for all")],
                         ids=["all", "an own one", "a shared one", "a chain"])
def test_collect_finds_what_is_gone_though_dvc_removed_the_manifest(root, contents):
    for stage in ("ingest", "sample"):
        before = (root / "data" / stage / "table").read_bytes()
        lose(root, *contents)
        shutil.rmtree(root / "data" / stage)
        assert run(root, stage) == before


def test_only_the_recordings_that_are_needed_must_be_there(root, capsys):
    """A blob that many items made is made again by one whose recording is there; else the item's own is named."""
    planned = Harness(root).plan("sample")
    lose(root)
    for name in DRIVES:
        (root / "data/raw" / name).unlink()
    with pytest.raises(ConfigError, match=r"recording 'c' \(.*not there\n  set ROADMILL_SOURCE"):
        Harness(root).perform(planned["c"])
    (root / "data/raw/b").write_text("b")
    Harness(root).store.need(planned["c"].item.inputs["all"])
    assert capsys.readouterr().err.startswith("ingest: b was made again, ")
    again = Harness(root)
    assert again.store.result(again.perform(planned["b"]))["outputs"].keys() == {"pack"}


@pytest.mark.parametrize("cause", ["another setting", "chance"])
def test_other_bytes_are_never_accepted_and_the_way_on_is_named(root, monkeypatch, cause):
    if cause == "another setting":
        set_gain(root, 2)
    else:
        monkeypatch.setattr(INGEST, "run", lambda cfg, *rest: ingest_run(Knobs(2), *rest))
    lose(root, b"own a", b"own athe same for all")
    old, new = digest_bytes(b"own a"), digest_bytes(b"own aa")[:12]
    with pytest.raises(RemoteError, match=rf"ingest: a was made again and gave other bytes: .*own {new}…\n"
                                          rf"  data/ingest wants {old}\n  `dvc repro -f ingest`"):
        run(root, "sample")
    run(root, "ingest")
    assert b"own aathe same" in run(root, "sample")


def test_a_blob_of_an_item_that_is_no_longer_wanted_cannot_be_made_again(root):
    own = Harness(root).plan("sample")["c"].item.inputs["own"]
    found = recordings.read(root / "data/recordings")
    recordings.write_listing(found[:2], root / "data/recordings/raw.jsonl")
    lose(root, b"own c")
    with pytest.raises(MissingBlobError, match=f"blob {own} is gone"):
        Harness(root).store.need(own)


def test_two_items_of_one_name_are_refused(root, monkeypatch):
    monkeypatch.setattr(INGEST, "plan", lambda cfg, inputs: [Item("a", {"n": n}, {}) for n in (1, 2)])
    with pytest.raises(ConfigError, match="ingest: two items are called 'a'"):
        Harness(root).plan("ingest")


def test_a_stage_that_leaves_nothing_is_an_error_and_publishes_nothing(root, monkeypatch):
    before = (root / "data/ingest/table").read_bytes()
    monkeypatch.setattr(INGEST, "collect", lambda cfg, results, out: Summary(3, 0, "drives", dropped={"rule": 3}))
    with pytest.raises(harness.DataError, match="ingest: nothing is left of 3 drives: rule 3\n  `roadmill why ingest`"):
        run(root, "ingest")
    assert (root / "data/ingest/table").read_bytes() == before


def test_an_item_that_may_take_hours_goes_on_where_it_stopped_and_gives_the_same(root, monkeypatch):
    """Every other attempt at one fails half way. What is kept half way is in no key and in no result."""
    began = []

    def resuming(cfg, item, inputs, out, checkpoints):
        began.append(checkpoints.load())
        checkpoints.offer(1, lambda: b"half " + item.name.encode())
        if began[-1] is None:
            raise RemoteError("reclaimed")
        return ingest_run(cfg, item, inputs, out)

    first, keys = (root / "data/ingest/table").read_bytes(), [one.action.key for one in Harness(root).plan(
        "ingest").values()]
    monkeypatch.setattr(INGEST, "RESUMES", True, raising=False)
    monkeypatch.setattr(INGEST, "run", resuming)
    settings = root / "conf/runner/local.yaml"
    settings.write_text(settings.read_text().replace("checkpoint_s: 300", "checkpoint_s: 1.0e-9"))
    shutil.rmtree(root / "data/store")
    for name in DRIVES:
        planned = Harness(root).plan("ingest")[name]
        with pytest.raises(RemoteError, match="reclaimed"):
            Harness(root).perform(planned)
        assert checkpoints.standing(Harness(root).store.shared, planned.action.key).step == 1
    assert run(root, "ingest") == first
    assert began == [None, None, None, b"half a", b"half b", b"half c"]
    assert [one.action.key for one in Harness(root).plan("ingest").values()] == keys
    assert list(Harness(root).store.shared.names("checkpoints/")) == []


def test_a_run_that_takes_results_which_a_collection_has_doomed_keeps_them(root):
    store = Harness(root).store
    gc.bury(store, gc.survey(store, gc.Live(), 0.0))
    run(root, "ingest")
    found = gc.survey(Harness(root).store, gc.Live(), 0.0)
    assert {op: count["results"] for (step, op), count in found.tally.items() if step == "goes"} == {"sample": 3}


@pytest.fixture
def others(root, monkeypatch):
    """The same checkout on a bucket that holds all; what its prefixes in the set allow can be written."""
    shared = Memory()
    for path in (root / "data/store").rglob("*"):
        if path.is_file():
            name = path.relative_to(root / "data/store").as_posix()
            shared.kept[name], shared.modified_s[name] = path.read_bytes(), 0.0
    allowed = set()

    def guarded(write):
        def attempt(name, data):
            if not name.startswith(tuple(allowed)):
                raise RemoteError(f"memory/{name}: access denied")
            return write(name, data)
        return attempt

    shared.write, shared.create = guarded(shared.write), guarded(shared.create)
    monkeypatch.setattr(harness, "open_store", lambda where, folder, rebuild: Store(
        Folder(root / "cache"), shared, rebuild=rebuild))
    shutil.rmtree(root / "data/store")
    return shared, allowed


def test_who_may_only_read_the_store_repeats_a_stage_and_is_told_what_is_not_kept(root, others, capsys):
    _, allowed = others
    before = (root / "data/sample/table").read_bytes()
    assert run(root, "sample") == before
    assert "sample: done, but the store keeps no record of this run: memory/runs/sample/" in capsys.readouterr().err
    allowed.add("gc/")
    store = Harness(root).store
    gc.bury(store, gc.survey(store, gc.Live(), 0.0))
    allowed.clear()
    assert run(root, "sample") == before
    assert ("sample: a collection has doomed what this run uses, and it can't be kept: memory/gc/"
            in capsys.readouterr().err)


def test_a_plan_writes_nothing_and_a_run_puts_the_checkouts_files_where_a_worker_finds_them(root, others, monkeypatch):
    shared, allowed = others
    (root / "table").write_bytes(b"a table of the checkout")
    monkeypatch.setattr(SAMPLE, "plan", lambda cfg, inputs: [
        Item("a", {}, {"own": root / "table", "all": root / "table"})])
    names = set(shared.kept)
    assert Harness(root).plan("sample")["a"].item.inputs["own"] == digest_bytes(b"a table of the checkout")
    assert set(shared.kept) == names
    allowed.add("")
    assert b"a table of the checkout" in run(root, "sample")
    lose_all = [name for name in shared.kept if name.startswith("cas/")]
    shared.delete(lose_all)
    shutil.rmtree(root / "cache")
    [pack] = Harness(root).manifest_rows("sample")[0]["outputs"].values()
    assert Harness(root).store.need(pack[0]).read_bytes() == b"a table of the checkout" * 2


def test_explain_names_only_what_differs_and_says_where_a_result_is_gone(root, monkeypatch):
    knobs = dataclasses.make_dataclass("Knobs", [("gain", int, knob("what is written", low=1)), (
        "sizes_m", tuple[float, ...], knob("a range"))], frozen=True)
    for module in (INGEST, SAMPLE):
        monkeypatch.setattr(module, "Knobs", knobs)
    values = {stage: {"gain": 1, "sizes_m": [1.0, 2.0]} for stage in ("ingest", "sample")}

    def explain(gain):
        values["ingest"]["gain"] = gain
        (root / "params.yaml").write_text(yaml.safe_dump({**values, "cache": {"salt": "", "code_pins": {}}}))
        return why.explain(root, "a")

    monkeypatch.setattr(why, "ITEM_STAGES", ("ingest",))
    explain(1)
    run(root, "ingest")
    assert explain(1)[1:] == []
    assert explain(2)[1:] == ["  knobs.gain   1 -> 2"]
    shutil.rmtree(root / "data/store/ac")
    assert explain(1)[1:] == ["  made before, but its result is gone from the store: it will be made again"]


def test_fsck_does_again_what_is_damaged_and_is_clean_then(root, capsys):
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    [pack] = Harness(root).manifest_rows("sample")[0]["outputs"].values()
    path = root / "data/store/cas" / pack[0][:2] / pack[0]
    path.chmod(0o644)
    path.write_bytes(b"x")
    lines, is_right = damage.examine(root, repair=False)
    assert not is_right
    assert f"damaged  cas/{pack[0][:2]}/{pack[0]}   sample a" in lines
    lines, is_right = damage.examine(root, repair=True)
    assert is_right
    assert lines[-1].startswith("repaired: 1 blobs are whole again, 0 results are forgotten")
    assert f"sample: a was made again, {pack[0][:12]}… was gone" in capsys.readouterr().err
    assert damage.examine(root, repair=False)[0][-1] == "all whole"
