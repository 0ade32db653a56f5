"""The train stage on the merged world of tests/dataset_fixture.py: four reviewed and four automatic key frames."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
import yaml

from stages import train
from stages.lib import detector, knobs, ranks, tables, training
from stages.lib.checkpoints import NOTHING, StoppedError
from stages.lib.dataset import Dataset
from stages.lib.detector import Architecture, Net
from stages.lib.digests import digest_file
from stages.lib.errors import ConfigError, DataError
from stages.lib.ranks import ALONE
from stages.lib.stage import Blob, Item, Out, Result, Upstream
from stages.lib.training import Recipe
from tests import dataset_fixture

VALUES = yaml.safe_load((Path(__file__).parents[1] / "conf/train/default.yaml").read_text())
SMALL = {"range_m": [-16.0, -16.0, -1.0, 16.0, 16.0, 4.0], "pillar_m": 1.0, "pillar_channels": 8, "stages": [8, 8],
         "convs_per_stage": 1, "neck_channels": 8, "num_sweeps": 2, "steps": 4, "batch_size": 2, "bn_batches": 2,
         "min_points": 3, "min_auto_score": 0.4, "auto_weight": 0.25}


def cfg(**changes: object) -> train.Knobs:
    return knobs.load(train.Knobs, VALUES | SMALL | changes, "train")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dataset_fixture.World:
    return dataset_fixture.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def merged(world, tmp_path_factory) -> Path:
    """data/merge of the world."""
    out, _ = dataset_fixture.run_merge(world, tmp_path_factory.mktemp("merged"))
    return out.data


def planned(merged: Path, **changes: object) -> Item:
    (item,) = train.plan(cfg(**changes), {"merge": Upstream(merged)})
    return item


def trained(world: dataset_fixture.World, merged: Path, out: Path, checkpoints=NOTHING, **changes: object) -> Result:
    """The item planned and run, as the harness does it."""
    item = planned(merged, **changes)
    inputs = {role: what if isinstance(what, Path) else world.open_pack(what) for role, what in item.inputs.items()}
    out.mkdir()
    facts = json.loads(json.dumps(train.run(cfg(**changes), item, inputs, out, checkpoints)))
    outputs = {path.name: Blob(digest_file(path), path.stat().st_size) for path in sorted(out.iterdir())}
    return Result(item.name, facts, outputs, lambda name: out / name)


def collected(result: Result, folder: Path) -> tuple[Out, object]:
    out = Out(folder / "data", folder / "results")
    out.data.mkdir(parents=True)
    out.results.mkdir()
    return out, train.collect(cfg(), [result], out)


def with_table(merged: Path, folder: Path, name: str, change) -> Path:
    """A copy of data/merge in which one table is changed."""
    for path in sorted((merged / "tables").glob("*.parquet")):
        table = tables.read(path)
        tables.write(change(table) if path.stem == name else table, folder / "tables" / path.name)
    return folder


@pytest.fixture(scope="module")
def result(world, merged, tmp_path_factory) -> Result:
    return trained(world, merged, tmp_path_factory.mktemp("train") / "out")


# plan ---------------------------------------------------------------------------------------------------------------
def test_the_item_reads_the_packs_of_the_train_split_and_no_other(world, merged):
    scenes = tables.read(merged / "tables" / "scene.parquet")
    item = planned(merged)
    assert {role for role in item.inputs if role.startswith("pack/")} == {
        f"pack/{token}" for token in scenes.filter(pl.col("split") == "train")["token"]}
    assert {item.inputs[f"pack/{token}"] for token in scenes.filter(pl.col("split") == "train")["token"]} == set(
        scenes.filter(pl.col("split") == "train")["pack_digest"])
    assert len(item.params["dataset_digest"]) == 64


def test_another_label_is_another_dataset(merged, tmp_path):
    changed = with_table(merged, tmp_path, "sample_annotation", lambda t: t.with_columns(pl.col("x_m") + 0.001))
    assert planned(changed).params != planned(merged).params


def test_no_scene_to_learn_from_is_an_error_that_names_the_knob(merged, tmp_path):
    empty = with_table(merged, tmp_path, "scene", lambda t: t.with_columns(split=pl.lit("val")))
    with pytest.raises(ConfigError, match=r"split train has no scene: .*\n  set split.quotas.train above 0"):
        planned(empty)


# run ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_run_gives_the_same_bytes(world, merged, tmp_path, threads):
    one, two = (trained(world, merged, tmp_path / name, threads=threads) for name in ("one", "two"))
    assert set(one.outputs) == set(train.OUTPUTS)
    assert one.outputs == two.outputs
    assert one.facts == two.facts


def test_another_seed_gives_another_model(world, merged, result, tmp_path):
    assert trained(world, merged, tmp_path / "out", seed=1).outputs["model.pt"] != result.outputs["model.pt"]


def test_what_was_set_outside_does_not_matter(world, merged, result, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.manual_seed(99)
    np.random.seed(99)
    try:
        assert trained(world, merged, tmp_path / "out").outputs == result.outputs
    finally:
        torch.set_num_threads(threads)


def test_labels_of_other_splits_do_not_reach_the_weights(world, merged, result, tmp_path):
    train_scenes = tables.read(merged / "tables" / "scene.parquet").filter(pl.col("split") == "train")["token"]
    elsewhere = ~pl.col("scene_token").is_in(train_scenes.implode())
    changed = with_table(merged, tmp_path, "sample_annotation", lambda t: t.filter(~elsewhere))
    assert tables.read(changed / "tables/sample_annotation.parquet").height < tables.read(
        merged / "tables/sample_annotation.parquet").height
    weights = [detector.load(one.path("model.pt")).net.state_dict()
               for one in (result, trained(world, changed, tmp_path / "out"))]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values()))


def test_progress_is_told_ten_times_with_the_loss(world, merged, tmp_path, capsys):
    trained(world, merged, tmp_path / "out", steps=20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("train: step 2 of 20, loss ")
    assert lines[-1].startswith("train: step 20 of 20, loss ")


def test_it_learns_where_the_car_is(world, merged, tmp_path):
    """The car stands out by its five points in a row, 0.75 m high; the loss falls by half and more."""
    changes = {"steps": 120, "lr": 0.01, "pillar_m": 0.5, "min_auto_score": 0.0, "auto_weight": 1.0, "min_points": 5}
    learned = trained(world, merged, tmp_path / "out", **changes)
    curves = pl.read_csv(learned.path("curves.csv"))
    assert curves["loss"].tail(10).mean() < 0.4 * curves["loss"].head(10).mean()
    packs = {row[0]: world.open_pack(row[1]) for row in tables.read(
        merged / "tables" / "scene.parquet").select("token", "pack_digest").iter_rows()}
    dataset, model = Dataset(merged / "tables", packs), detector.load(learned.path("model.pt"))
    errors = []
    for token in dataset.sample_tokens("val"):
        best = model.detect(dataset.points_ego(token, 2, cfg().ego_box_m)).row(0, named=True)
        car = train.wanted(cfg(), dataset, token).boxes[0]
        errors.append(np.hypot(best["x_m"] - car[0], best["y_m"] - car[1]))
    assert max(errors) < 1.0


def test_the_onnx_file_is_the_saved_net(result):
    points = np.random.default_rng(0).uniform([-16, -16, -1, 0, 0], [16, 16, 4, 255, 0.2], (300, 5)).astype(np.float32)
    heat, code = onnxruntime.InferenceSession(result.path("model.onnx")).run(None, {"points": points})
    with torch.no_grad():
        net = detector.load(result.path("model.pt")).net
        logits, torch_code = net(torch.from_numpy(points), torch.zeros(300, dtype=torch.int64), 1)
    assert np.abs(heat - logits[0].sigmoid().numpy()).max() < 1e-4
    assert np.abs(code - torch_code[0].numpy()).max() < 1e-4


def test_the_model_says_what_it_was_made_from(merged, result):
    model = detector.load(result.path("model.pt"))
    assert model.provenance["dataset_digest"] == planned(merged).params["dataset_digest"]
    assert model.provenance["knobs"]["steps"] == 4
    assert model.arch.classes == ("vehicle.car",)


def test_the_curves_have_a_row_a_step(result):
    curves = pl.read_csv(result.path("curves.csv"))
    assert curves.columns == ["step", "lr", "loss", "heat", "offset", "z", "size", "heading", "velocity"]
    assert curves["step"].to_list() == [0, 1, 2, 3]
    assert np.isfinite(curves.to_numpy()).all()


def test_labels_of_people_count_in_full_and_automatic_ones_by_score_points_and_weight(world, merged, result):
    """Of each automatic key frame's two boxes one is the car, with 5 points, one the ghost, with 1."""
    assert result.facts["labels"] == [["auto", 4, "vehicle.car", 4, 4], ["human", 4, "vehicle.car", 4, 0]]
    packs = {row[0]: world.open_pack(row[1]) for row in tables.read(
        merged / "tables" / "scene.parquet").select("token", "pack_digest").iter_rows()}
    dataset = Dataset(merged / "tables", packs)
    by_source = {}
    for token in dataset.sample_tokens("train"):
        by_source.setdefault(dataset.label_source(token), train.wanted(cfg(), dataset, token))
    assert by_source["human"].background == 1
    assert by_source["human"].weights.tolist() == [1]
    assert by_source["auto"].background == 0.25
    assert by_source["auto"].weights.tolist() == [0.25, 0.25]
    assert sorted(by_source["auto"].ignored) == [False, True]
    # 5 m/s ego, 3 m/s car: it starts 10 m ahead and 4 m to the left, and is 9.8 m ahead after 0.1 s.
    np.testing.assert_allclose(by_source["human"].boxes[0, :2], [9.8, 4.0], atol=1e-6)
    strict = train.wanted(cfg(min_auto_score=0.6), dataset, dataset.sample_tokens("train")[-1])
    assert strict.ignored.all()


def test_key_frames_without_labels_are_left_out_and_counted(world, merged, tmp_path):
    bare = with_table(merged, tmp_path, "sample", lambda t: t.with_columns(
        label_source=pl.when(pl.col("label_source") == "auto").then(pl.lit("")).otherwise("label_source")))
    result = trained(world, bare, tmp_path / "out")
    assert (result.facts["num_key_frames"], result.facts["num_labelled"]) == (8, 4)
    _, summary = collected(result, tmp_path / "collected")
    assert summary.dropped == {"without labels": 4}


def test_no_labels_at_all_is_an_error_that_names_the_knob(world, merged, tmp_path):
    bare = with_table(merged, tmp_path, "sample", lambda t: t.with_columns(label_source=pl.lit("")))
    with pytest.raises(DataError, match=r"none of 8 key frames of split train has labels\n  give merge.sources.train"):
        trained(world, bare, tmp_path / "out")


# several processes --------------------------------------------------------------------------------------------------
class StopAfter:
    """Checkpoints of an attempt that is asked to stop after a step, and of the next one."""

    def __init__(self, step: int) -> None:
        self.step, self.kept = step, None

    def load(self) -> bytes | None:
        return self.kept

    def offer(self, step: int, state) -> None:
        if step == self.step and self.kept is None:
            self.kept = state()
            raise StoppedError("stop")


def in_parts(world, merged, **changes: object) -> tuple[Net, list[dict]]:
    """What this process alone learns that computes the parts of each batch one after another."""
    one = cfg(**changes)
    packs = {role: what if isinstance(what, Path) else world.open_pack(what)
             for role, what in planned(merged, **changes).inputs.items()}
    lessons = train._lessons(one, packs)
    return training.fit(train._part(Architecture, one), train._part(Recipe, one), len(lessons.tokens), lessons.read)


def test_two_processes_learn_the_bits_of_one_that_computes_both_parts_also_when_they_were_stopped(
        world, merged, result, tmp_path):
    net, rows = in_parts(world, merged, num_devices=2)
    stops = StopAfter(2)
    with pytest.raises(StoppedError):
        trained(world, merged, tmp_path / "stopped", checkpoints=stops, num_devices=2)
    shared = trained(world, merged, tmp_path / "out", checkpoints=stops, num_devices=2)
    state = detector.load(shared.path("model.pt")).net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert pl.DataFrame(rows).write_csv(float_precision=6) == shared.path("curves.csv").read_text()
    assert shared.outputs["model.onnx"] != result.outputs["model.onnx"], "another count learns something else"


def test_a_step_follows_the_mean_of_the_parts_gradients():
    """Of w x with w = 2: the losses are 2 and 8, the gradients 1 and 4."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 2.0)
    losses = training._gradients(net, [1.0, 4.0], ALONE, lambda x: {"loss": net.weight.sum() * x})
    assert losses == {"loss": 5.0}
    assert net.weight.grad.item() == 2.5


def _leave(status: int, own: object) -> None:
    os._exit(status)


def test_a_process_that_ends_early_is_named_and_not_waited_for():
    with (pytest.raises(RuntimeError, match="process 1 of the training ended with exit code 7"),
          ranks.shared(2, "cpu", _leave, (7,)) as own):
        own.gather(torch.zeros(1, 1))
    with (pytest.raises(RuntimeError, match="process 1 of the training ended with exit code 1"),
          ranks.shared(2, "cpu", _Unreadable(), ())):
        pytest.fail("the other never came")


class _Unreadable:
    """Can't be read back from a pickle."""

    def __reduce__(self):
        return int, ("x",)


UNDER_TORCHRUN = """
import os, pickle, sys
from pathlib import Path
from stages import train
folder = Path(sys.argv[1])
out = folder / os.environ["RANK"]
out.mkdir()
train.run(*pickle.loads((folder / "action").read_bytes()), out)
"""


def test_processes_that_torchrun_starts_learn_the_same_bits_each(world, merged, tmp_path):
    (tmp_path / "script.py").write_text(UNDER_TORCHRUN)

    def under_torchrun(num: int) -> subprocess.CompletedProcess:
        changes = {"num_devices": num, "batch_size": 6, "steps": 2}
        item = planned(merged, **changes)
        inputs = {role: what if isinstance(what, Path) else world.open_pack(what)
                  for role, what in item.inputs.items()}
        (tmp_path / "action").write_bytes(pickle.dumps((cfg(**changes), item, inputs)))
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             tmp_path / "script.py", tmp_path], text=True, capture_output=True, timeout=300,
            env={**os.environ, "PYTHONPATH": os.getcwd()})

    refused = under_torchrun(3)
    assert "ConfigError: torchrun started 2 processes, train.num_devices is 3" in refused.stderr
    assert "torchrun --standalone --nproc-per-node 3" in refused.stderr
    for rank in (0, 1):
        (tmp_path / str(rank)).rmdir()
    done = under_torchrun(2)
    assert done.returncode == 0, done.stderr
    net, _ = in_parts(world, merged, num_devices=2, batch_size=6, steps=2)
    for rank in ("0", "1"):
        state = detector.load(tmp_path / rank / "model.pt").net.state_dict()
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


# collect ------------------------------------------------------------------------------------------------------------
def test_collect_gives_the_model_its_card_and_a_page_with_the_curve(result, tmp_path):
    out, summary = collected(result, tmp_path / "a")
    assert sorted(path.name for path in out.data.iterdir()) == sorted(train.OUTPUTS)
    assert sorted(path.name for path in out.results.iterdir()) == ["curves.csv", "report.html"]
    page = (out.results / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert (summary.num_in, summary.num_out, summary.unit) == (8, 1, "model")
    again, _ = collected(result, tmp_path / "b")
    assert (again.results / "report.html").read_bytes() == (out.results / "report.html").read_bytes()


def test_the_card_names_data_settings_interface_and_limits(result, merged):
    card = result.path("model_card.md").read_text()
    for words in ("# Model card", "8 of 8 key frames of split train", planned(merged).params["dataset_digest"],
                  "| auto | 4 | vehicle.car | 4 | 4 |", "| batch_size | 2 |", "| range_m | [-16.0, -16.0, -1.0",
                  "points (N, 5)", "## Limits"):
        assert words in card


# settings -----------------------------------------------------------------------------------------------------------
def test_settings_are_refused_with_the_knobs_name():
    with pytest.raises(ConfigError, match=r"train.pillar_m is -1.0, expected more than 0"):
        cfg(pillar_m=-1.0)
    with pytest.raises(ConfigError, match=r"train.range_m -16..16 m along x is 45.7143 pillars of 0.7 m"):
        cfg(pillar_m=0.7)
    with pytest.raises(ConfigError, match=r"train.batch_size is 2, expected a multiple of train.num_devices, 3"):
        cfg(num_devices=3)
    with pytest.raises(ConfigError, match=r"train.device is 'gpu', expected one of cpu, cuda"):
        cfg(device="gpu")
    with pytest.raises(ConfigError, match=r"train.step is not a knob, did you mean steps\?"):
        cfg(step=3)


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(world, merged, tmp_path):
    with pytest.raises(ConfigError, match=r"train.num_devices is 1 and train.device cuda, but torch sees 0 GPUs here\n"
                                          r"  set train.device=cpu, or run it on a machine with GPUs"):
        trained(world, merged, tmp_path / "out", device="cuda")


def test_every_knob_decides_the_result():
    assert set(knobs.keyed(cfg())) == set(VALUES)
