"""merge: one dataset of fragments, automatic labels, people's labels and the truth."""

import dataclasses
import json
import math

import numpy as np
import polars as pl
import pytest

from stages import merge
from stages.lib import annotations, geometry, labels, openlabel, tables
from stages.lib.boxes import count_inside
from stages.lib.dataset import Dataset
from stages.lib.errors import ConfigError, DataError
from stages.lib.stage import Result, Upstream
from stages.tools.check import check

from . import dataset_fixture as fixture
from .dataset_fixture import GHOST, PEDESTRIAN

T = fixture.START_US


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    world = fixture.build(root / "up")
    out, summary = fixture.run_merge(world, root)
    return world, out, summary


def table(out, name):
    return tables.read(out.data / "tables" / f"{name}.parquet")


def boxes_by_split(out):
    scenes = table(out, "scene").select(pl.col("token").alias("scene_token"), "split", pl.col("name").alias("scene"))
    return table(out, "sample_annotation").join(scenes, on="scene_token")


# which labels count ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("splits", [("val", "test", "train"), ("train", "train", "val"), ("test", "val", "val")])
def test_no_automatic_label_reaches_the_ground_truth_of_val_or_test(tmp_path, splits):
    world = fixture.build(tmp_path / "up", splits)
    out, _ = fixture.run_merge(world, tmp_path)
    judged = boxes_by_split(out).filter(pl.col("split") != "train")
    assert judged.height
    assert set(judged["source"]) <= {"human", "truth"}
    view = {name: json.loads((out.data / "nuscenes" / "v1.0-roadmill" / f"{name}.json").read_text())
            for name in ("splits", "scene", "sample", "sample_annotation")}
    scenes = {s["token"] for s in view["scene"] for name in ("roadmill_val", "roadmill_test")
              if s["name"] in view["splits"].get(name, [])}
    samples = {s["token"] for s in view["sample"] if s["scene_token"] in scenes}
    rows = [a for a in view["sample_annotation"] if a["sample_token"] in samples]
    assert len(rows) == judged.height
    assert not any(a["automatic_annotation"] or a["autolabel_metadata"] for a in rows)


def test_val_without_truth_or_human_labels_stays_empty_and_merge_says_so(tmp_path):
    world = fixture.build(tmp_path / "up")
    (world.inputs["labels"].folder / "truth" / "drive_b.json").unlink()
    out, summary = fixture.run_merge(world, tmp_path)
    assert boxes_by_split(out).filter(pl.col("split") == "val").is_empty()
    assert "val: 4 of 4 samples have no labels from truth, human" in summary.notes


@pytest.mark.parametrize("split", ["val", "test", "holdout"])
def test_automatic_ground_truth_is_a_settings_error(split):
    with pytest.raises(ConfigError, match=rf"merge.sources.{split} is \['human', 'auto'\]: automatic labels are no "
                                          rf"ground truth.*\n  take `auto` out of merge.sources.{split}"):
        merge.check_sources({"train": ["auto"], split: ["human", "auto"]}, ["train"])


def test_the_truth_is_never_trained_on(merged):
    with pytest.raises(ConfigError, match=r"merge.sources.train is \['truth'\].*\n  take `truth` out of merge"):
        merge.check_sources({"train": ["truth"]}, ["train"])
    assert "truth" not in set(boxes_by_split(merged[1]).filter(pl.col("split") == "train")["source"])


def test_a_split_without_sources_and_an_unknown_source_are_named():
    with pytest.raises(ConfigError, match=r"no entry for split test, which data/split asks for\n  set merge.sources"):
        merge.check_sources({"train": ["auto"]}, ["train", "test"])
    with pytest.raises(ConfigError, match=r"merge.sources.train.* is 'humans', expected one of truth, human, auto"):
        fixture.merge_knobs(sources={"train": ["humans"]})


def test_human_labels_win_where_they_were_reviewed_and_nowhere_else(merged):
    found = boxes_by_split(merged[1]).group_by("scene").agg(pl.col("source").unique().sort()).sort("scene")
    assert found.rows() == [("drive_a-1700000000000000", ["human"]), ("drive_a-1700000002000000", ["geometric"]),
                            ("drive_b-1700000060000000", ["truth"])]
    samples = table(merged[1], "sample")
    assert samples["label_source"].to_list() == ["human"] * 4 + ["auto"] * 4 + ["truth"] * 4


def test_conflicts_of_reviewed_samples_are_listed(merged):
    rows = tables.read(merged[1].data / "conflicts.parquet")
    assert rows.schema == labels.CONFLICTS
    assert sorted(rows.select("what", "source", "category", "overruled_source", "overruled_category").rows(),
                  key=str) == sorted([
        *[("extra", None, None, "geometric", "vehicle.car")] * 4,
        *[("missing", "human", "human.pedestrian.adult", None, None)] * 4,
        ("category", "human", "vehicle.car", "geometric", "vehicle.truck")], key=str)
    assert rows.filter(pl.col("what") == "category")["distance_m"].to_list() == pytest.approx([0.3])
    assert rows["stamp_us"].max() < T + fixture.SCENE_US


def test_a_box_that_no_lidar_point_shows_is_no_conflict(tmp_path):
    world = fixture.build(tmp_path / "up")
    path = world.inputs["labels"].folder / "human" / "drive_a.json"
    found = openlabel.read(path)
    hidden = pl.col("object_id") == PEDESTRIAN
    openlabel.write(dataclasses.replace(found, boxes=found.boxes.with_columns(
        pl.when(hidden).then(-50.0).otherwise("y_m").alias("y_m"))), path)
    out, _ = fixture.run_merge(world, tmp_path)
    assert set(tables.read(out.data / "conflicts.parquet")["what"]) == {"extra", "category"}
    boxes = boxes_by_split(out).filter((pl.col("source") == "human") & pl.col("category").str.starts_with("human"))
    assert boxes.select("num_lidar_pts", "visibility").unique().rows() == [(0, "1")], "it stays in the tables"


def test_the_truth_comes_before_people_in_val_and_people_where_there_is_no_truth(tmp_path):
    world = fixture.build(tmp_path / "up", ("val", "val", "train"))
    out, _ = fixture.run_merge(world, tmp_path / "both")
    assert table(out, "sample")["label_source"].to_list()[:8] == ["truth"] * 8
    (world.inputs["labels"].folder / "truth" / "drive_a.json").unlink()
    out, _ = fixture.run_merge(world, tmp_path / "human")
    assert table(out, "sample")["label_source"].to_list()[:8] == ["human"] * 4 + [""] * 4


# interpolation --------------------------------------------------------------------------------------------------------
def label_rows(*rows):
    """Boxes of drive d from (stamp_us, object, x_m, yaw_rad)."""
    fixed = {"drive_token": "d", "category": "vehicle.car", "y_m": 0.0, "z_m": 1.0, "length_m": 4.0, "width_m": 2.0,
             "height_m": 1.5, "vx_mps": 1.0, "vy_mps": 0.0}
    rows = [{**fixed, "stamp_us": t, "object_id": what, "x_m": x, "yaw_rad": yaw} for t, what, x, yaw in rows]
    return pl.DataFrame(rows, schema={"drive_token": pl.String, **openlabel.BOXES})


def boxes_at(boxes, *stamps, gap=200):
    samples = pl.DataFrame({"drive_token": "d", "sample_token": [str(t) for t in stamps], "stamp_us": stamps})
    found = labels.at_stamps(boxes, samples, gap).select("stamp_us", "object_id", "x_m", "yaw_rad").rows()
    return {(t, what): (x, round(yaw, 9)) for t, what, x, yaw in found}


def test_boxes_are_interpolated_linearly_and_yaw_by_the_shorter_arc():
    boxes = label_rows((1000, "a", 10.0, 3.1), (1100, "a", 20.0, -3.1))
    turned = 2 * math.pi - 6.2
    assert boxes_at(boxes, 1000, 1025, 1100) == {
        (1000, "a"): (10.0, 3.1), (1025, "a"): (12.5, round(3.1 + turned / 4, 9)), (1100, "a"): (20.0, -3.1)}
    (_, yaw), = boxes_at(boxes, 1075).values()
    assert -math.pi <= yaw < -3.1, "wrapped into [-pi, pi)"


def test_boxes_are_never_extrapolated_nor_carried_over_a_gap():
    boxes = label_rows((1000, "a", 0.0, 0.0), (1100, "a", 1.0, 0.0), (1100, "b", 5.0, 0.0), (1500, "a", 9.0, 0.0))
    assert boxes_at(boxes, 999, 1501) == {}
    assert boxes_at(boxes, 1300) == {}
    assert boxes_at(boxes, 1300, gap=400) == {(1300, "a"): (5.0, 0.0)}
    assert boxes_at(boxes, 1050) == {(1050, "a"): (0.5, 0.0)}, "b is not there before"
    assert set(boxes_at(boxes, 1100)) == {(1100, "a"), (1100, "b")}


def test_merged_boxes_stand_where_the_objects_were_at_the_samples_stamp(merged):
    _, out, _ = merged
    boxes = boxes_by_split(out).filter(pl.col("source") == "truth").join(
        table(out, "sample").select(pl.col("token").alias("sample_token"), "stamp_us"), on="sample_token")
    for row in boxes.iter_rows(named=True):
        car = row["category"] == "vehicle.car"
        wanted = fixture.car_xyz("drive_b", row["stamp_us"]) if car else fixture.pedestrian_xyz()
        assert (row["x_m"], row["y_m"], row["z_m"]) == pytest.approx(wanted, abs=1e-6)
    assert boxes.height == 8


@pytest.mark.parametrize(("stamps", "reviewed", "covered"), [
    ([100, 200, 300], [(0, 400)], [(100, 301)]),
    ([100, 200, 300], [(150, 250)], [(150, 250)]),
    ([100, 200, 600, 700], [(100, 701)], [(100, 201), (600, 701)]),
    ([], [(0, 400)], [(0, 400)]),
])
def test_what_lies_between_labels_is_covered_and_what_would_be_extrapolated_is_not(stamps, reviewed, covered):
    boxes = label_rows(*[(t, "a", 0.0, 0.0) for t in stamps])
    assert labels.covered_us(reviewed, boxes, 150) == covered


def test_a_long_silence_is_an_empty_street_unless_an_object_outlasts_it():
    empty = label_rows((100, "a", 0.0, 0.0), (1000, "b", 0.0, 0.0))
    assert labels.covered_us([(0, 1100)], empty, 150) == [(100, 101), (250, 851), (1000, 1001)]
    same = label_rows((100, "a", 0.0, 0.0), (1000, "a", 0.0, 0.0))
    assert labels.covered_us([(100, 1001)], same, 150) == [(100, 101), (1000, 1001)]


def test_reviewed_intervals_of_a_scene_hold_exactly_its_labelled_samples(merged):
    world, out, _ = merged
    dataset = Dataset(out.data / "tables", {row[0]: world.open_pack(row[1]) for row in
                                            table(out, "scene").select("token", "pack_digest").iter_rows()})
    sources = table(out, "sample").select("token", "label_source").iter_rows()
    by_person = {token: source in ("human", "truth") for token, source in sources}
    assert {token: dataset.is_reviewed(token) for token in by_person} == by_person
    assert sum(by_person.values()) == 8


# annotations ----------------------------------------------------------------------------------------------------------
def test_points_are_counted_in_the_key_frame_for_labels_without_counts(merged):
    counts = boxes_by_split(merged[1]).group_by("source", "category").agg(pl.col("num_lidar_pts").unique())
    assert {(s, c): n for s, c, n in counts.iter_rows() if s != "geometric"} == {
        ("human", "vehicle.car"): [5], ("human", "human.pedestrian.adult"): [3],
        ("truth", "vehicle.car"): [5], ("truth", "human.pedestrian.adult"): [3]}


def test_points_are_counted_as_if_each_box_were_held_against_all_of_them():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-10, 10, (5000, 3))
    boxes = np.column_stack([rng.uniform(-9, 9, (40, 3)), rng.uniform(0.5, 6, (40, 3)), rng.uniform(-4, 4, 40)])
    inside = [np.abs(geometry.apply(geometry.invert(geometry.transform(box[:3], geometry.yaw_wxyz(box[6]))), xyz))
              <= box[3:6] / 2 for box in boxes]
    found = count_inside(xyz, boxes)
    assert found.tolist() == [int(within.all(1).sum()) for within in inside]
    assert found.sum() > 100
    assert count_inside(xyz, boxes[:0]).tolist() == []


def test_an_instance_is_one_track_of_one_source_with_its_most_frequent_category(merged):
    _, out, _ = merged
    boxes = boxes_by_split(out).filter(pl.col("source") == "geometric")
    assert set(boxes["category"]) == {"vehicle.car"}, "one truck of four is outvoted"
    assert boxes["instance_token"].n_unique() == 2
    rows = table(out, "instance")
    assert rows["nbr_annotations"].to_list() == [4] * 6
    assert rows["token"].n_unique() == 6
    for row in rows.iter_rows(named=True):
        chain = table(out, "sample_annotation").filter(pl.col("instance_token") == row["token"])
        assert chain["token"].to_list() == [*chain["prev"].to_list()[1:], row["last_annotation_token"]]
        assert chain["next"].to_list() == [*chain["token"].to_list()[1:], ""]
        assert chain["token"][0] == row["first_annotation_token"]


def test_unknown_velocities_come_from_the_neighbours_and_known_ones_stay():
    nan = float("nan")
    boxes = pl.DataFrame({
        "token": list("abcde"), "instance_token": ["i", "i", "i", "i", "j"], "category": "vehicle.car",
        "stamp_us": [0, 500_000, 1_000_000, 3_000_000, 0], "x_m": [0.0, 1.0, 4.0, 9.0, 0.0], "y_m": [0.0] * 5,
        "vx_mps": [nan, nan, 7.0, nan, nan], "vy_mps": [nan, nan, 0.0, nan, nan]})
    found = annotations.chain(boxes)["vx_mps"].to_list()
    assert found[:3] == [2.0, 4.0, 7.0]
    assert np.isnan(found[3:]).all(), "2 s from its neighbour, and alone"


@pytest.mark.parametrize(("category", "speed", "wanted"), [
    ("vehicle.car", 0.6, "vehicle.moving"), ("vehicle.truck", 0.4, "vehicle.parked"), ("vehicle.bicycle", 3.0, ""),
    ("human.pedestrian.adult", 1.0, "pedestrian.moving"), ("human.pedestrian.child", 0.0, "pedestrian.standing"),
    ("vehicle.car", float("nan"), ""), ("movable_object.barrier", 0.0, "")])
def test_attributes_say_what_category_and_speed_tell_and_no_more(category, speed, wanted):
    row = pl.DataFrame({"category": [category], "vx_mps": [speed], "vy_mps": [0.0]})
    assert row.select(annotations.attribute(0.5)).item() == wanted


def test_one_object_twice_in_a_sample_is_the_labels_fault(tmp_path):
    world = fixture.build(tmp_path / "up")
    inputs = dict(world.inputs)
    twice = [two_boxes_of_one_track(result) for result in inputs["autolabel"].results]
    inputs["autolabel"] = Upstream(inputs["autolabel"].folder, tuple(twice))
    with pytest.raises(DataError, match=r"geometric labels have object \w+ twice at \d+ us of scene \w+\n  give each"):
        fixture.run_merge(dataclasses.replace(world, inputs=inputs), tmp_path)


def two_boxes_of_one_track(result: Result) -> Result:
    rows = tables.read(result.path("boxes.parquet"))
    path = result.path("boxes.parquet").with_name("twice.parquet")
    tables.write(rows.with_columns(track_id=pl.lit(GHOST)), path)
    return dataclasses.replace(result, path=lambda name: path)


# the dataset ----------------------------------------------------------------------------------------------------------
def test_merge_passes_every_rule_of_check(merged):
    world, out, summary = merged
    assert [(f.rule, f.sentence) for f in check(out.data, open_pack=world.open_pack) if f.count] == []
    assert (summary.num_in, summary.num_out, summary.unit, dict(summary.dropped)) == (3, 3, "scenes", {})
    assert summary.notes == ("9 boxes differ between label sources: data/merge/conflicts.parquet",)


def test_the_thirteen_tables_and_the_named_splits_are_there(merged):
    _, out, _ = merged
    names = {path.stem for path in (out.data / "tables").iterdir()}
    assert names == {"attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
                     "sample_annotation", "sample_data", "scene", "sensor", "visibility"}
    assert json.loads((out.data / "splits.json").read_text()) == {
        "train": ["drive_a-1700000000000000", "drive_a-1700000002000000"], "val": ["drive_b-1700000060000000"]}
    assert table(out, "log").select("logfile", "vehicle", "date_captured", "location").rows() == [
        (name, "tiny-car", "2023-11-14", "tiny-town") for name in ("drive_a", "drive_b")]
    assert {path.name for path in out.data.iterdir()} == {
        "tables", "nuscenes", "conflicts.parquet", "trajectory.parquet", "signals.parquet", "splits.json", "README.md"}


def test_every_box_says_where_it_came_from_also_in_the_view(merged):
    rows = json.loads((merged[1].data / "nuscenes" / "v1.0-roadmill" / "sample_annotation.json").read_text())
    assert {(r["source"], r["automatic_annotation"], json.dumps(r["autolabel_metadata"])) for r in rows} == {
        ("human", False, "null"), ("truth", False, "null"),
        ("geometric", True, '[{"name": "geometric", "score": 0.5}]')}


def test_twice_the_same_bytes(merged, tmp_path):
    world, out, _ = merged
    again, _ = fixture.run_merge(world, tmp_path)
    for folder, other in ((out.data, again.data), (out.results, again.results)):
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
        for name in files:
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_how_many_scenes_are_merged_at_once_changes_nothing(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "CHUNK_SCENES", 1)
    again, _ = fixture.run_merge(merged[0], tmp_path)
    for path in sorted(merged[1].data.rglob("*.parquet")):
        assert path.read_bytes() == (again.data / path.relative_to(merged[1].data)).read_bytes(), path.name


def test_the_json_view_is_bounded_and_merge_says_so(merged, tmp_path):
    world = merged[0]
    out, summary = fixture.run_merge(world, tmp_path, view_max_scenes=2)
    assert len(json.loads((out.data / "nuscenes" / "v1.0-roadmill" / "scene.json").read_text())) == 2
    assert table(out, "scene").height == 3
    assert [(f.rule, f.sentence) for f in check(out.data, open_pack=world.open_pack) if f.count] == []
    assert ("the nuScenes JSON view has 2 of 3 scenes (merge.view_max_scenes); "
            "`roadmill export OUT` makes a view of any others") in summary.notes
    assert "The nuScenes JSON view has 2 of 3 scenes." in (out.data / "README.md").read_text()


def test_scenes_that_were_not_sampled_are_dropped_and_counted_and_none_at_all_is_an_error(tmp_path):
    world = fixture.build(tmp_path / "up")
    sample = world.inputs["sample"]
    fewer = dataclasses.replace(world, inputs={**world.inputs, "sample": Upstream(sample.folder, sample.results[1:])})
    out, summary = fixture.run_merge(fewer, tmp_path / "fewer")
    assert (summary.num_out, dict(summary.dropped)) == (2, {"not sampled": 1})
    assert check(out.data, open_pack=world.open_pack)[12].count == 0
    none = dataclasses.replace(world, inputs={**world.inputs, "sample": Upstream(sample.folder)})
    with pytest.raises(DataError, match=r"none of the 3 scenes of .*split\n  make them: `dvc repro sample`"):
        fixture.run_merge(none, tmp_path / "none")


def test_the_card_says_what_there_is_and_what_the_split_promises(merged, tmp_path):
    card = (merged[1].data / "README.md").read_text()
    assert "| train | 2 | 1 | 8 | 8 | 0.001111 | 0.0198 |" in card, "two scenes of 2 s, 99 steps of 0.1 m each"
    assert "| train | human | vehicle.car | 4 | 4 | 1 |" in card
    assert "Scenes of different splits are at least 50 m apart" in card
    assert "| curate | min_speed | 1 |" in card
    assert "People reviewed 0.0006 h of these scenes." in card
    assert merge.card.folder_digest(merged[0].inputs["sample"].folder) in card
    world = fixture.build(tmp_path / "up", georeferenced=False)
    out, _ = fixture.run_merge(world, tmp_path)
    empty = dataclasses.replace(merged[0], inputs={**merged[0].inputs, "autolabel": Upstream(tmp_path)})
    out_without, _ = fixture.run_merge(empty, tmp_path / "without")
    assert "they name different things.\n\nNone.\n\n## Split" in (out_without.data / "README.md").read_text()
    assert "one place may be in two splits" in (out.data / "README.md").read_text()


def test_a_camera_only_scene_has_boxes_without_counts_and_visibility_that_says_nothing(tmp_path):
    world = fixture.build(tmp_path / "up")
    for result in world.inputs["sample"].results:
        for name in ("sample_data", "calibrated_sensor"):
            path = result.path(f"{name}.parquet")
            tables.write(tables.read(path).filter(pl.col("channel") == "CAM_FRONT"), path)
    out, _ = fixture.run_merge(world, tmp_path)
    people = boxes_by_split(out).filter(pl.col("source") != "geometric")
    assert people.select("num_lidar_pts", "visibility").unique().rows() == [(0, "4")]
    assert {f.rule for f in check(out.data, open_pack=world.open_pack) if f.count} == {"E2", "E4"}


def test_out_is_all_that_merge_writes(merged, tmp_path):
    world, _, _ = merged
    before = {path: path.stat().st_mtime_ns for path in world.inputs["labels"].folder.parent.rglob("*")}
    fixture.run_merge(world, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in world.inputs["labels"].folder.parent.rglob("*")} == before


