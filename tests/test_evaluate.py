"""The evaluate stage, on a dataset that can be checked by hand (tests/judged.py)."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from nuscenes import NuScenes
from nuscenes.eval.detection.evaluate import DetectionEval

from stages import evaluate
from stages.lib import baselines, detector, draw, geometry, knobs, scoring, tables
from stages.lib.dataset import TABLES
from stages.lib.detector import Architecture, Detector, Net
from stages.lib.digests import digest_file
from stages.lib.errors import ConfigError, DataError
from stages.lib.stage import Blob, Item, Out, Result, Upstream
from tests import dataset_fixture, judged

VALUES = yaml.safe_load((Path(__file__).parents[1] / "conf/evaluate/default.yaml").read_text())
ARCH = Architecture(
    classes=("vehicle.car",), range_m=(-32.0, -32.0, -2.0, 32.0, 32.0, 4.0), pillar_m=1.0, num_sweeps=1,
    ego_box_m=(-1.0, -1.0, 1.0, 1.0), intensity=False, pillar_channels=8, stages=(8, 8), convs_per_stage=1,
    neck_channels=8, bn_momentum=0.1, nms_radius_m=(2.0,), min_score=0.01, max_boxes=20)


def cfg(**values: object) -> evaluate.Knobs:
    return knobs.load(evaluate.Knobs, VALUES | {"class_range_m": {"car": 40.0}, "min_points": 5} | values, "evaluate")


class Ahead:
    """A detector that sees a car 12 m ahead, always, and is right; the two others it misses."""

    arch = ARCH

    def detect(self, points_ego: np.ndarray) -> pl.DataFrame:
        at_car = np.hypot(points_ego[:, 0] - 12, points_ego[:, 1]) < 1
        assert (points_ego[at_car, 2] > 1.5).sum() == 40
        box = ("vehicle.car", 12.0, 0.0, 0.8, *judged.SIZE_M, 0.0, judged.SPEED_MPS, 0.0, 0.9)
        return pl.DataFrame([box], orient="row", schema=[n for n in scoring.PREDICTIONS if n != "sample_token"])


def write(world: judged.World, folder: Path) -> dict[str, Path]:
    """The inputs of `run`: the world's tables, val's packs, true boxes as geometric labels, an untrained model."""
    inputs = {f"pack/{scene}": path for scene, path in world.packs.items() if scene != "scene_a"}
    for name, table in world.tables.items():
        tables.write(table, folder / "tables" / f"{name}.parquet")
        inputs[f"tables/{name}.parquet"] = folder / "tables" / f"{name}.parquet"
    for scene in ("scene_b", "scene_c"):
        boxes = world.truth.filter(pl.col("sample_token").str.starts_with(scene)).with_columns(
            stamp_us=pl.lit(0), track_id=pl.lit(""), source=pl.lit("geometric"), num_lidar_pts=pl.lit(1))
        tables.write(boxes.select(pl.col(name).cast(kind) for name, kind in tables.BOXES.items()),
                     folder / f"{scene}_boxes.parquet")
        inputs[f"labels/{scene}"] = folder / f"{scene}_boxes.parquet"
    with detector.reproducible(1, seed=0):
        detector.save(Detector(ARCH, Net(ARCH), {}), folder / "model.pt")
    return inputs | {"model.pt": folder / "model.pt"}


def evaluated(knobs_: evaluate.Knobs, inputs: dict[str, Path], out: Path) -> Result:
    out.mkdir()
    facts = evaluate.run(knobs_, Item("evaluate", {}, {}), inputs, out)
    outputs = {path.relative_to(out).as_posix(): Blob(digest_file(path), path.stat().st_size)
               for path in sorted(out.rglob("*")) if path.is_file()}
    return Result("evaluate", json.loads(json.dumps(facts)), outputs, lambda name: out / name)


def collected(knobs_: evaluate.Knobs, result: Result, folder: Path) -> tuple[Out, object]:
    out = Out(folder / "data", folder / "results")
    out.data.mkdir(parents=True)
    out.results.mkdir()
    return out, evaluate.collect(knobs_, [result], out)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    return write(judged.make(tmp_path), tmp_path)


def test_a_model_that_finds_one_of_two_cars_and_nothing_else(
        inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for are "ahead" and "left": recall 1/2 at precision 1 fills 40 of the 90 bins from 0.11 to 1."""
    monkeypatch.setattr(detector, "load", lambda path: Ahead())
    result = evaluated(cfg(), inputs, tmp_path / "out")
    found = result.facts["metrics"]
    assert [found[f"num_{what}"] for what in ("drives", "key_frames", "car_boxes")] == [2, 8, 16]
    assert [found[key] for key in ("car_ap", "car_ap_50cm", "car_ap_400cm", "mean_ap")] == pytest.approx(
        [40 / 90] * 4, abs=1e-6)
    assert [found[f"car_{error}"] for error in scoring.TP_ERRORS] == pytest.approx([0] * 4, abs=1e-6)
    assert found["car_ap_nothing"] == 0.0
    assert found["car_ap_any_points"] == pytest.approx(23 / 90, abs=1e-6)  # recall 1/3: bins 0.11 to 0.33
    assert found["car_best_f1_score"] == 0.9
    samples = pl.read_csv(tmp_path / "out" / "samples.csv")
    assert samples.select("num_boxes", "num_missed", "num_false").unique().rows() == [(2, 1, 0)]


def test_labels_are_judged_as_predictions_and_the_mean_box_finds_what_is_always_there(
        inputs: dict[str, Path], tmp_path: Path) -> None:
    """True boxes as labels: all found. Of the mean boxes those at "ahead" and "far" hit, the others come after them."""
    found = evaluated(cfg(min_points=1), inputs, tmp_path / "out").facts["metrics"]
    assert found["car_ap_geometric"] == pytest.approx(1)
    assert 56 / 90 < found["car_ap_mean_box"] < 1


def test_the_stage_twice_gives_equal_bytes_and_facts(inputs: dict[str, Path], tmp_path: Path) -> None:
    first, second = (evaluated(cfg(), inputs, tmp_path / name) for name in ("one", "two"))
    assert (first.facts, first.outputs) == (second.facts, second.outputs)
    pages = [collected(cfg(), first, tmp_path / name)[0].results / "report.html" for name in ("three", "four")]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert not any("view" in name or "results.json" in name for name in first.outputs)


def test_the_report_opens_offline_and_shows_scenes_from_above_and_through_cameras(
        inputs: dict[str, Path], tmp_path: Path) -> None:
    out, summary = collected(cfg(), evaluated(cfg(), inputs, tmp_path / "out"), tmp_path)
    page = (out.results / "report.html").read_text()
    assert "://" not in page
    assert page.count("data:image/jpeg;base64,") == 2 * (VALUES["num_worst"] + VALUES["num_typical"])
    for words in ("geometric", "mean box", "nothing", "10-20 m", "drive_b", "b-0 at", "AP at 0.5 m"):
        assert words in page
    assert summary.notes[-1] == ("car is judged on too little for its score to mean much: key frames 8 (less than 80), "
                                 "boxes 16 (less than 300)")
    metrics = json.loads((out.results / "metrics.json").read_text())
    assert list(metrics) == sorted(metrics)
    rows = list(csv.DictReader((out.results / "pr.csv").open()))
    assert (len(rows), rows[50]["recall"], rows[50]["car_geometric_50cm"]) == (101, "0.500000", "1.000000")
    predictions = json.loads((out.data / "predictions.json").read_text())
    assert sorted(predictions["results"]) == [f"scene_{drive}_{n}" for drive in "bc" for n in range(4)]


def test_automatic_labels_in_the_truth_are_an_error(tmp_path: Path) -> None:
    inputs = write(judged.make(tmp_path, label_source="geometric"), tmp_path)
    with pytest.raises(ConfigError) as error:
        evaluated(cfg(), inputs, tmp_path / "out")
    assert str(error.value) == (
        "truth of split val has 32 automatic labels, which can't judge: the first is scene_b_0 from 'geometric'\n"
        "  set merge.sources.val to [truth, human] and run `roadmill compose`")


def test_one_automatic_box_among_true_ones_is_an_error(tmp_path: Path) -> None:
    world = judged.make(tmp_path)
    one = pl.col("token") == "scene_c_left_2"
    world.tables["sample_annotation"] = world.tables["sample_annotation"].with_columns(
        source=pl.when(one).then(pl.lit("model:m@1")).otherwise("source"))
    with pytest.raises(ConfigError, match=r"has 1 automatic labels.*scene_c_left_2 from 'model:m@1'"):
        evaluated(cfg(), write(world, tmp_path), tmp_path / "out")


def test_automatic_labels_in_train_are_no_error(tmp_path: Path) -> None:
    world = judged.make(tmp_path)
    world.tables["sample_annotation"] = world.tables["sample_annotation"].with_columns(
        source=pl.when(pl.col("scene_token") == "scene_a").then(pl.lit("geometric")).otherwise("source"))
    assert evaluated(cfg(), write(world, tmp_path), tmp_path / "out").facts["truth"] == {"truth": 24}


def test_key_frames_that_nobody_labelled_are_left_out_and_said(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "load", lambda path: Ahead())
    world = judged.make(tmp_path)
    bare = "scene_b_1"
    world.tables["sample"] = world.tables["sample"].with_columns(
        label_source=pl.when(pl.col("token") == bare).then(pl.lit("")).otherwise("label_source"))
    boxes = world.tables["sample_annotation"].filter(pl.col("sample_token") != bare)
    skip = {f"scene_b_{car}_{a}": f"scene_b_{car}_{b}" for car in judged.CARS for a, b in ((0, 2), (2, 0))}
    world.tables["sample_annotation"] = boxes.with_columns(
        pl.when(pl.col(end).str.contains("^scene_b.*_1$")).then(pl.col("token").replace(skip)).otherwise(end).alias(end)
        for end in ("prev", "next"))
    result = evaluated(cfg(), write(world, tmp_path), tmp_path / "out")
    assert result.facts["num_unlabelled"] == 1
    assert [result.facts["metrics"][f"num_{what}"] for what in ("key_frames", "car_boxes")] == [7, 14]
    assert result.facts["metrics"]["car_ap"] == pytest.approx(40 / 90, abs=1e-6)
    assert "key frames of val that nobody labelled are left out: 1" in collected(cfg(), result, tmp_path)[1].notes


def test_a_class_that_is_not_in_the_truth_has_a_count_and_no_score(inputs: dict[str, Path], tmp_path: Path) -> None:
    both = cfg(class_range_m={"car": 40.0, "pedestrian": 30.0})
    result = evaluated(both, inputs, tmp_path / "out")
    assert result.facts["metrics"]["num_pedestrian_boxes"] == 0
    assert "pedestrian_ap" not in result.facts["metrics"]
    assert result.facts["metrics"]["mean_ap"] == result.facts["metrics"]["car_ap"]
    collected(both, result, tmp_path)


def test_no_box_of_the_classes_asked_for_is_an_error(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        evaluated(cfg(class_range_m={"truck": 40.0}), inputs, tmp_path / "out")
    assert str(error.value) == ("split val has no box of truck by a person or a simulator\n  add labels beside the "
                                "recordings and run `roadmill scan`, or change evaluate.class_range_m")


def test_a_class_that_nuscenes_does_not_score_is_an_error_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.class_range_m has 'cars', did you mean car"):
        evaluate.plan(cfg(class_range_m={"cars": 40.0}), {})


def test_points_that_do_not_rise_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.slice_points is \[5, 5\]"):
        evaluate.plan(cfg(slice_points=[5, 5]), {})


def test_the_plan_takes_the_packs_and_labels_of_the_split_alone(tmp_path: Path) -> None:
    world = judged.make(tmp_path)
    write(world, tmp_path)
    labelled = tuple(Result(scene, {"scene_token": scene}, {"boxes.parquet": Blob(f"digest of {scene}", 1)}, Path)
                     for scene in world.packs)
    (item,) = evaluate.plan(cfg(), {"merge": Upstream(tmp_path), "autolabel": Upstream(tmp_path, labelled),
                                    "train": Upstream(tmp_path)})
    roles = {role for role in item.inputs if not role.startswith("tables/")}
    assert roles == {"model.pt", "pack/scene_b", "pack/scene_c", "labels/scene_b", "labels/scene_c"}
    assert item.inputs["labels/scene_c"] == "digest of scene_c"
    assert item.inputs["pack/scene_b"] == digest_file(world.packs["scene_b"])
    assert item.inputs["tables/log.parquet"] == tmp_path / "tables" / "log.parquet"


def test_a_split_without_scenes_is_an_error(tmp_path: Path) -> None:
    write(judged.make(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match=r"split test has no scene: .*\n  set split\.quotas"):
        evaluate.plan(cfg(split="test"), {"merge": Upstream(tmp_path)})


def camera_view(layers: list[draw.Layer]) -> np.ndarray:
    """What is drawn into a black image of the world's camera; boxes in the ego frame."""
    K, T_cam_ego = np.array(judged.K, float), geometry.invert(judged.T_EGO_CAM)
    return draw.through_camera(np.zeros((96, 128, 3), np.uint8), K, T_cam_ego, layers, width_px=128)


def test_a_box_in_front_of_a_camera_is_drawn_where_it_projects() -> None:
    """A 2 m cube 11 m ahead: its near face is 10 m away, so its edges are 60 / 10 = 6 px from the middle (64, 48)."""
    image = camera_view([draw.Layer(np.array([[12.5, 0, 1.5, 2, 2, 2, 0.0]]), draw.GREEN)])
    rows, columns = np.nonzero(image.sum(2) > 150)
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == pytest.approx([42, 54, 58, 70], abs=1)


def test_a_box_behind_a_camera_is_not_drawn_and_one_around_it_does_no_harm() -> None:
    behind, around = (draw.Layer(np.array([[x, 0, 1.5, 4, 2, 2, 0.3]]), draw.GREEN) for x in (-10.0, 1.5))
    assert not camera_view([behind]).any()
    camera_view([around])


def test_forward_is_up_from_above() -> None:
    """range 36 m on 720 px: 10 px/m, ego in the middle. A point 20 m ahead and 10 m to the left."""
    image = draw.from_above(np.array([[20.0, 10.0, 2.0]]), [], range_m=36.0)
    assert image[360 - 200 - 1:360 - 200 + 1, 360 - 100 - 1:360 - 100 + 1].max() > 200
    box = draw.from_above(np.zeros((0, 3)), [draw.Layer(np.array([[-20.0, -10, 0, 4, 2, 1, 0]]), draw.ORANGE)], 36.0)
    rows, columns = np.nonzero((box[..., 0] > 150) & (box[..., 2] < 90))
    assert (rows.min() > 520, rows.max() < 590, columns.min() > 440, columns.max() < 475) == (True,) * 4


def test_the_stage_says_what_the_devkit_says_of_the_merged_datasets_own_view(tmp_path: Path) -> None:
    """What merge wrote, through this stage and, from its nuScenes JSON, through DetectionEval alone."""
    world = dataset_fixture.build(tmp_path)
    merged, _ = dataset_fixture.run_merge(world, tmp_path)
    inputs = {f"tables/{name}.parquet": merged.data / "tables" / f"{name}.parquet" for name in (*TABLES, evaluate.LOG)}
    scenes = tables.read(merged.data / "tables" / "scene.parquet").filter(pl.col("split") == "val")
    inputs |= {f"pack/{token}": world.open_pack(digest)
               for token, digest in scenes.select("token", "pack_digest").iter_rows()}
    inputs |= {f"labels/{r.name}": r.path("boxes.parquet") for r in world.inputs["autolabel"].results
               if r.facts["scene_token"] in scenes["token"]}
    inputs["model.pt"] = tmp_path / "model.pt"
    detector.save(Detector(ARCH, Net(ARCH), {}), inputs["model.pt"])
    both = {"car": 30.0, "pedestrian": 30.0}
    result = evaluated(cfg(min_points=1, class_range_m=both), inputs, tmp_path / "out")

    nusc = NuScenes("v1.0-roadmill", str(merged.data / "nuscenes"), verbose=False)
    boxes = pl.concat([tables.read(path) for role, path in inputs.items() if role.startswith("labels/")])
    samples = nusc.field2token("sample", "scene_token", scenes["token"][0])
    (tmp_path / "results.json").write_text(json.dumps(
        {"meta": {}, "results": scoring.results(baselines.labels(boxes, "geometric"), samples)}))
    metrics, _ = DetectionEval(nusc, scoring.config(both), str(tmp_path / "results.json"), "roadmill_val",
                               str(tmp_path / "devkit"), verbose=False).evaluate()
    rows = {row["class"]: row for row in result.facts["aps"] if row["source"] == "geometric"}
    for name in both:
        ours = [rows[name][f"AP at {dist_th:g} m"] for dist_th in scoring.DIST_THS_M]
        assert ours == pytest.approx([metrics.get_label_ap(name, dist_th) for dist_th in scoring.DIST_THS_M])
    assert 0 < metrics.mean_dist_aps["car"] < 1


def test_the_model_is_not_left_with_other_threads(inputs: dict[str, Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    evaluated(cfg(), inputs, tmp_path / "out")
    assert torch.get_num_threads() == before
