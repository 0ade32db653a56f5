"""The judge: nuscenes-devkit, on numbers that can be checked by hand and on nuScenes' own data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from nuscenes import NuScenes
from nuscenes.eval.common.utils import quaternion_yaw
from pyquaternion import Quaternion

from stages.lib import baselines, geometry, mistakes, scoring, slices, tables
from stages.lib.errors import DataError
from stages.lib.scoring import Verdict
from tests import judged

RANGE_M = {"car": 40.0}


class Judge:
    """Verdicts on val of a world."""

    def __init__(self, world: judged.World, folder: Path):
        self.world, self.folder = world, folder
        self.nusc, self.split = scoring.open_view(world.read, "val", folder / "view")
        self.tokens = [sample["token"] for sample in self.nusc.sample]

    def __call__(self, boxes: pl.DataFrame, **options: object) -> Verdict:
        options = {"class_range_m": RANGE_M, **options}
        return scoring.judge(self.nusc, self.split, scoring.results(boxes, self.tokens), folder=self.folder, **options)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    folder = tmp_path_factory.mktemp("judged")
    return Judge(judged.make(folder), folder)


def test_perfect_boxes_have_ap_1_and_no_error(judge: Judge) -> None:
    verdict = judge(judge.world.truth)
    assert [verdict.ap("car", dist_th) for dist_th in scoring.DIST_THS_M] == pytest.approx([1, 1, 1, 1])
    assert verdict.ap("car") == pytest.approx(1)
    errors = [verdict.metrics.get_label_tp("car", name) for name in scoring.TP_ERRORS.values()]
    assert errors == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert len(verdict.truth.all) == 2 * 4 * 3


def test_boxes_shifted_by_70_cm_have_ap_0_at_50_cm_and_1_beyond(judge: Judge) -> None:
    verdict = judge(judge.world.truth.with_columns(pl.col("x_m") + 0.7))
    assert [verdict.ap("car", dist_th) for dist_th in scoring.DIST_THS_M] == pytest.approx([0, 1, 1, 1])
    assert verdict.ap("car") == pytest.approx(0.75)
    assert verdict.metrics.get_label_tp("car", "trans_err") == pytest.approx(0.7)


@pytest.mark.parametrize(("turn_rad", "error_rad"), [(0.3, 0.3), (-0.3, 0.3), (np.pi, np.pi), (2 * np.pi, 0.0)])
def test_a_wrong_heading_is_the_orientation_error(judge: Judge, turn_rad: float, error_rad: float) -> None:
    verdict = judge(judge.world.truth.with_columns(pl.col("yaw_rad") + turn_rad))
    assert verdict.ap("car") == pytest.approx(1)
    assert verdict.metrics.get_label_tp("car", "orient_err") == pytest.approx(error_rad, abs=1e-6)


def test_twice_the_length_is_a_scale_error_of_a_half_and_1_mps_too_much_a_velocity_error_of_1(judge: Judge) -> None:
    verdict = judge(judge.world.truth.with_columns(pl.col("length_m") * 2, pl.col("vy_mps") + 1))
    assert verdict.metrics.get_label_tp("car", "scale_err") == pytest.approx(0.5)
    assert verdict.metrics.get_label_tp("car", "vel_err") == pytest.approx(1.0)


def test_no_box_at_all_scores_0_and_does_not_raise(judge: Judge) -> None:
    verdict = judge(baselines.nothing())
    assert verdict.ap("car") == 0.0
    assert verdict.predicted.all == []
    assert len(verdict.truth.all) == 24


def test_boxes_with_few_points_are_not_asked_for(judge: Judge) -> None:
    """Without the far cars recall ends at 2/3: precision is 1 in 56 of the 90 recall bins from 0.11 to 1."""
    near = judge.world.truth.filter(pl.int_range(pl.len()) % 3 != 2)
    assert judge(near).ap("car") == pytest.approx(56 / 90)
    assert judge(near, min_points=5).ap("car") == pytest.approx(1)


def test_to_claim_a_box_that_is_not_asked_for_is_no_mistake_but_to_claim_one_beside_it_is(judge: Judge) -> None:
    """The far cars have 3 points. A false box of the highest score halves precision at the first true one."""
    truth = judge.world.truth
    assert len(judge(truth, min_points=5).predicted.all) == 16
    far = truth.filter(pl.int_range(pl.len()) % 3 == 2).head(1).with_columns(score=pl.lit(2.0))
    near_it, beside_it = (judge(pl.concat([truth, far.with_columns(pl.col("x_m") + shift_m)]), min_points=5).ap("car")
                          for shift_m in (1.9, 2.1))
    assert near_it == pytest.approx(1)
    assert beside_it < 0.95


def test_boxes_out_of_range_count_neither_as_truth_nor_as_mistakes(judge: Judge) -> None:
    verdict = judge(judge.world.truth, class_range_m={"car": 20.0})
    assert (len(verdict.truth.all), len(verdict.predicted.all), verdict.ap("car")) == pytest.approx((16, 16, 1))


def test_samples_that_are_not_judged_count_neither_as_truth_nor_as_mistakes(judge: Judge) -> None:
    wanted = [token for token in judge.tokens if token.startswith("scene_b")]
    false_elsewhere = judge.world.truth.with_columns(
        pl.col("x_m") + 5 * pl.col("sample_token").str.starts_with("scene_c"))
    verdict = judge(false_elsewhere, samples=wanted)
    assert (len(verdict.truth.all), verdict.ap("car")) == pytest.approx((12, 1))


def test_a_submission_names_every_sample_keeps_the_500_best_and_drops_what_nuscenes_does_not_score() -> None:
    row = {name: 1.0 for name in scoring.PREDICTIONS} | {"sample_token": "s", "category": "vehicle.car"}
    many = pl.DataFrame([row | {"score": n / 1000} for n in range(600)] + [row | {"category": "animal", "score": 1.0}],
                        schema=scoring.PREDICTIONS)
    found = scoring.results(many, ["s", "t"])
    assert found["t"] == []
    assert [len(found["s"]), found["s"][0]["detection_score"], found["s"][-1]["detection_score"]] == [500, 0.599, 0.1]
    assert {box["detection_name"] for box in found["s"]} == {"car"}


def test_a_box_turns_with_the_ego_vehicle_into_the_map() -> None:
    """Ego at (10, 20) heading +y: 5 m ahead is (10, 25), forward is +y."""
    ahead = pl.DataFrame([("vehicle.car", 5.0, 0.0, 1.0, 4.0, 2.0, 1.5, 0.0, 3.0, 0.0, 0.5)], orient="row",
                         schema=[name for name in scoring.PREDICTIONS if name != "sample_token"])
    T_map_ego = geometry.transform([10, 20, 0], geometry.yaw_wxyz(np.pi / 2))
    row = scoring.in_map(ahead, T_map_ego, "s").row(0, named=True)
    assert [row[c] for c in ("x_m", "y_m", "z_m", "yaw_rad", "vx_mps", "vy_mps")] == pytest.approx(
        [10, 25, 1, np.pi / 2, 0, 3])


def test_a_sample_without_lidar_key_frame_is_an_error_that_names_it(tmp_path: Path) -> None:
    world = judged.make(tmp_path)
    world.tables["sample_data"] = world.tables["sample_data"].filter(
        (pl.col("sample_token") != "scene_b_1") | (pl.col("channel") != "LIDAR_TOP"))
    with pytest.raises(DataError) as error:
        scoring.open_view(world.read, "val", tmp_path / "view")
    assert str(error.value) == (
        "1 of 8 samples of split val have no LIDAR_TOP key frame, the first is scene_b_1 at 1700000000500000 us: there "
        "is nothing to measure ranges from\n  set sample.reference_channel to LIDAR_TOP and run `roadmill compose`")


def test_slices_by_range_points_motion_and_drive_count_the_truth_and_score_their_own_part(judge: Judge) -> None:
    """Drive c is predicted 5 m off, so nothing of it is found; the standing cars are the ones to the left."""
    wrong = judge.world.truth.with_columns(pl.col("x_m") + 5 * pl.col("sample_token").str.starts_with("scene_c"))
    verdicts = {"model": judge(wrong), "nothing": judge(baselines.nothing())}
    drives = {token: token[:7] for token in judge.tokens}
    found = slices.table(verdicts, "car", [slices.by_range(10.0, 25.5), slices.by_points([1, 5, 30]),
                                           slices.by_motion(0.5), slices.by_sample("drive", drives)])
    counts = {(row["slice"], row["part"]): row["num_boxes"] for row in found.iter_rows(named=True)}
    # "left" is 8, 8.06, 8.25, 8.54 m away; "far" hypot(25, 5) = 25.495 m
    assert counts == {("range", "0-10 m"): 8, ("range", "10-20 m"): 8, ("range", "20-25.5 m"): 8,
                      ("points", "1-4"): 8, ("points", "5-29"): 8, ("points", "30 or more"): 8,
                      ("motion", "moving"): 16, ("motion", "standing"): 8,
                      ("drive", "scene_b"): 12, ("drive", "scene_c"): 12}
    by_drive = found.filter(pl.col("slice") == "drive")
    assert by_drive["model_ap"].to_list() == pytest.approx([1, 0])
    assert found["nothing_ap"].to_list() == [0.0] * len(counts)


def test_matches_are_greedy_by_score_and_take_a_true_box_once(judge: Judge) -> None:
    truth = judge(judge.world.truth).truth["scene_b_0"]
    twice = judge.world.truth.filter(pl.col("sample_token") == "scene_b_0").head(1)
    claimed = judge(pl.concat([twice.with_columns(pl.col("x_m") + 0.1, score=pl.lit(0.4)),
                               twice.with_columns(pl.col("x_m") + 0.5, score=pl.lit(0.9))])).predicted["scene_b_0"]
    matched = dict(zip([box.detection_score for box in claimed], scoring.matches(truth, claimed, 2.0)))
    assert matched == {0.9: 0, 0.4: -1}


@pytest.mark.parametrize("scene", ["scene_a", "scene_b", "scene_c"])
def test_mean_box_stands_where_trains_cars_are_most_often(scene: str, tmp_path: Path) -> None:
    """In the ego frame "ahead" and "far" are at one place in all 4 samples, "left" falls 1 m back each; cells are 2 m.

    In turned scenes a place on the edge of two cells may fall into either.
    """
    world = judged.make(tmp_path)
    samples = world.tables["sample"].filter(pl.col("scene_token") == scene)
    poses = baselines.lidar_poses(samples, world.tables["sample_data"], world.tables["ego_pose"])
    boxes = baselines.mean_box(world.tables["sample_annotation"], poses)
    assert boxes.select("x_m", "y_m", "score").head(3).to_numpy()[:, 1:] == pytest.approx(
        np.array([(0, 1), (-5, 1), (8, 0.5)]))
    assert boxes.select("length_m", "width_m", "height_m", "z_m", "yaw_rad").head(1).row(0) == pytest.approx(
        (4.5, 1.9, 1.6, 0.8, 0.0))
    if scene == "scene_a":
        assert boxes.select("x_m", "y_m", "score").to_numpy() == pytest.approx(
            np.array([(12, 0, 1), (25, -5, 1), (-1.5, 8, 0.5), (-3, 8, 0.25), (0, 8, 0.25)]))


def test_found_missed_and_false_boxes_are_told_apart_above_the_score(judge: Judge) -> None:
    """Of three cars one is found, one claimed 3 m off, one only with a score that is too low."""
    one = judge.world.truth.filter(pl.col("sample_token") == "scene_b_0")
    claimed = one.with_columns(pl.col("x_m") + pl.Series([0.0, 3.0, 0.0]), pl.Series("score", [0.9, 0.5, 0.2]))
    marked = mistakes.mark(judge(claimed), {"car": 0.4}, ["scene_b_0", "scene_b_1"])
    first, second = marked["scene_b_0"], marked["scene_b_1"]
    assert [len(first.truth), len(first.found), len(first.false), first.num_missed] == [3, 1, 1, 2]
    assert [len(second.truth), len(second.found), len(second.false), second.num_missed] == [3, 0, 0, 3]
    assert first.false[0, :2] == pytest.approx(one.select("x_m", "y_m").to_numpy()[1] + (3, 0))
    assert first.found[0, 3:7] == pytest.approx((*judged.SIZE_M, np.pi / 2))


def test_nuscenes_own_detections_score_as_published_by_the_devkit(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "evaluator"
    nusc = NuScenes("v1.0-mini", str(folder / "nuscenes_mini_val"), verbose=False)
    submission = json.loads((folder / "cc_3dt_detections.json").read_text())["results"]
    published = json.loads((folder / "cc_3dt_reference_metrics.json").read_text())
    verdict = scoring.judge(nusc, "mini_val", submission, class_range_m=published["cfg"]["class_range"],
                            folder=tmp_path)
    assert (round(verdict.metrics.mean_ap, 4), round(verdict.metrics.nd_score, 4)) == (0.2183, 0.2688)
    assert verdict.ap("car", 0.5) == pytest.approx(published["label_aps"]["car"]["0.5"], abs=1e-12)


def test_the_same_detections_score_the_same_through_our_tables_and_boxes(real_data: Path, tmp_path: Path) -> None:
    """nuScenes' JSON as tables of record and PREDICTIONS: all APs, and all errors but the attribute's."""
    folder = real_data / "evaluator"
    nusc = NuScenes("v1.0-mini", str(folder / "nuscenes_mini_val"), verbose=False)
    submission = json.loads((folder / "cc_3dt_detections.json").read_text())["results"]
    published = json.loads((folder / "cc_3dt_reference_metrics.json").read_text())
    world = _tables_of_record(nusc)
    view, split = scoring.open_view(world.__getitem__, "val", tmp_path / "view")
    verdict = scoring.judge(view, split, scoring.results(_predictions(submission), submission),
                            class_range_m=published["cfg"]["class_range"], folder=tmp_path)
    for name, aps in published["label_aps"].items():
        ours = [verdict.ap(name, dist_th) for dist_th in scoring.DIST_THS_M]
        assert ours == pytest.approx(list(aps.values()), abs=1e-9)
        errors = {key: verdict.metrics.get_label_tp(name, key) for key in scoring.TP_ERRORS.values()}
        theirs = {key: published["label_tp_errors"][name][key] for key in errors}
        assert errors == pytest.approx(theirs, abs=1e-6, nan_ok=True)


def _tables_of_record(nusc: NuScenes) -> dict[str, pl.DataFrame]:
    def pose(record: dict) -> dict[str, float]:
        return dict(zip(tables.POSE, [*record["translation"], *record["rotation"]]))

    scenes = [s for s in nusc.scene if s["name"] in ("scene-0103", "scene-0916")]
    scene_of = {s["token"]: s["scene_token"] for s in nusc.sample}
    return {
        "scene": pl.DataFrame([{"token": s["token"], "name": s["name"], "split": "val"} for s in scenes]),
        "sample": pl.DataFrame([{"token": s["token"], "stamp_us": s["timestamp"], "scene_token": s["scene_token"]}
                                for s in nusc.sample]),
        "sample_data": pl.DataFrame([{k: s[k] for k in ("token", "sample_token", "ego_pose_token", "channel",
                                                        "is_key_frame")} for s in nusc.sample_data]),
        "ego_pose": pl.DataFrame([{"token": p["token"], **pose(p)} for p in nusc.ego_pose]),
        "sample_annotation": pl.DataFrame([
            {k: a[k] for k in ("token", "sample_token", "instance_token", "num_lidar_pts", "num_radar_pts", "prev",
                               "next")} | pose(a) | dict(zip(("width_m", "length_m", "height_m"), a["size"]))
            | {"scene_token": scene_of[a["sample_token"]], "category": a["category_name"]}
            for a in nusc.sample_annotation])}


def _predictions(submission: dict[str, list[dict]]) -> pl.DataFrame:
    category = {"bus": "vehicle.bus.rigid", "pedestrian": "human.pedestrian.adult", "barrier": "movable_object.barrier",
                "traffic_cone": "movable_object.trafficcone", "construction_vehicle": "vehicle.construction"}
    rows = [(b["sample_token"], category.get(b["detection_name"], f"vehicle.{b['detection_name']}"), *b["translation"],
             b["size"][1], b["size"][0], b["size"][2], quaternion_yaw(Quaternion(b["rotation"])), *b["velocity"],
             b["detection_score"]) for boxes in submission.values() for b in boxes]
    return pl.DataFrame(rows, schema=scoring.PREDICTIONS, orient="row")
