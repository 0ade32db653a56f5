"""A street made of boxes, seen by a turning lidar from a driving car, with numbers that can be checked by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from stages import autolabel
from stages.lib import geometry, knobs, objects, pack, sightings, tables
from stages.lib.stage import Blob, Item, Out, Result, Upstream

ROOT = Path(__file__).parents[1]
BEGIN_US, HZ, NUM_SWEEPS = 1_700_000_000_000_000, 10, 40
SENSOR_XYZ = np.array([0.9, 0.0, 1.8])
T_EGO_SENSOR = geometry.transform(SENSOR_XYZ, geometry.yaw_wxyz(np.pi / 2))
EGO_SPEED = np.array([6.0, 0.0])
CAR_SPEED_MPS, CAR_YAW = 8.0, np.deg2rad(10.0)
PARKED = (30.0, -6.0, np.deg2rad(3.0))
SIZE = (4.6, 1.9, 1.5)
SLOPE = 0.02


def car(x: float, y: float, yaw: float, size=SIZE) -> list[tuple]:
    """A body, low at the front, and a cabin over its rear: boxes as (x, y, yaw, bottom, top, length, width)."""
    back = -0.1 * size[0]
    return [(x, y, yaw, 0.2, 0.9, size[0], size[1]),
            (x + back * np.cos(yaw), y + back * np.sin(yaw), yaw, 0.9, size[2], 0.6 * size[0], 0.9 * size[1])]


def moving_car(t_s: float) -> tuple[float, float]:
    return 12 + CAR_SPEED_MPS * np.cos(CAR_YAW) * t_s, 3 + CAR_SPEED_MPS * np.sin(CAR_YAW) * t_s


def street(t_s: float) -> list[tuple]:
    """What stands at t_s, map frame: a car that drives, a parked one, a wall and a pole."""
    return [*car(*moving_car(t_s), CAR_YAW), *car(*PARKED), (20, -14, 0, 0, 4, 40, 0.4), (16, -4.5, 0, 0, 5, 0.2, 0.2)]


def cast(boxes: list[tuple], origin: np.ndarray, num_rings: int = 32, num_azimuths: int = 720) -> np.ndarray:
    """First hits (N, 3) of rays from origin with the boxes and the sloping ground, map frame."""
    azimuth, elevation = np.meshgrid(np.arange(num_azimuths) * 2 * np.pi / num_azimuths,
                                     np.deg2rad(np.linspace(-25, 10, num_rings)))
    ray = np.stack([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], -1)
    ray = ray.reshape(-1, 3)
    fall = ray[:, 2] - SLOPE * ray[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(fall < 0, (SLOPE * origin[0] - origin[2]) / fall, np.inf)
        for x, y, yaw, bottom, top, length, width in boxes:
            to_box = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
            base = SLOPE * x
            half = np.array([length, width, top - bottom]) / 2
            at, along = to_box @ (origin - (x, y, base + (bottom + top) / 2)), ray @ to_box.T
            entry = ((-np.sign(along) * half - at) / along).max(1)
            leave = ((np.sign(along) * half - at) / along).min(1)
            distance = np.where((entry < leave) & (entry > 0) & (entry < distance), entry, distance)
    hit = distance < 70
    return origin + ray[hit] * distance[hit, None]


def ego_pose(t_s: float) -> np.ndarray:
    """T_map_ego: on the slope, with the nose up by it."""
    pitch = -np.arctan(SLOPE)
    return geometry.transform([EGO_SPEED[0] * t_s, 0, SLOPE * EGO_SPEED[0] * t_s],
                              [np.cos(pitch / 2), 0, np.sin(pitch / 2), 0])


def write_scene(folder: Path, street=street, num_sweeps: int = NUM_SWEEPS,
                channel: str = "LIDAR_TOP") -> dict[str, Path]:
    """The pack and tables of a scene as `sample` writes them, key frames at every fifth sweep."""
    folder.mkdir(parents=True)
    sample, data, pose = [], [], []
    with pack.PackWriter(folder / "pack.tar") as writer:
        for number in range(num_sweeps):
            stamp_us, T = BEGIN_US + number * 1_000_000 // HZ, ego_pose(number / HZ)
            xyz = geometry.apply(geometry.invert(T @ T_EGO_SENSOR),
                                 cast(street(number / HZ), (T @ T_EGO_SENSOR)[:3, 3]))
            name, key = f"{channel}/{stamp_us}.pcd.bin", number % 5 == 0
            offset, num_bytes = writer.add(name, pack.points_bytes(np.column_stack([xyz, np.zeros((len(xyz), 2))])))
            if key:
                sample.append({"token": f"sample{number}", "stamp_us": stamp_us, "scene_token": "scene"})
            data.append({"token": f"data{number}", "sample_token": sample[-1]["token"],
                         "ego_pose_token": f"pose{number}", "calibrated_sensor_token": "sensor",
                         "scene_token": "scene", "channel": channel, "stamp_us": stamp_us, "is_key_frame": key,
                         "filename": name, "offset": offset, "bytes": num_bytes})
            pose.append(_pose(T) | {"token": f"pose{number}", "stamp_us": stamp_us})
    sensor = [_pose(T_EGO_SENSOR) | {"token": "sensor", "scene_token": "scene", "channel": channel}]
    for name, rows, schema in (("sample", sample, tables.SAMPLE), ("sample_data", data, tables.SAMPLE_DATA),
                               ("ego_pose", pose, tables.EGO_POSE),
                               ("calibrated_sensor", sensor, tables.CALIBRATED_SENSOR)):
        tables.write(pl.DataFrame(rows, schema=schema), folder / f"{name}.parquet")
    return {path.stem: path for path in folder.iterdir()}


def _pose(T: np.ndarray) -> dict[str, float]:
    translation, rotation = geometry.split(T)
    return dict(zip(tables.POSE, [*translation, *rotation]))


@pytest.fixture(scope="session")
def cfg() -> autolabel.Knobs:
    return knobs.load(autolabel.Knobs, yaml.safe_load((ROOT / "conf/autolabel/default.yaml").read_text()), "autolabel")


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> dict[str, Path]:
    return write_scene(tmp_path_factory.mktemp("scene") / "in")


@pytest.fixture(scope="session")
def labelled(cfg, scene, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("labelled")
    return autolabel.run(cfg, ITEM, scene, out), out


ITEM = Item(name="drive-1", params={"labeller": "geometric"}, inputs={})


def boxes_of(out: Path) -> pl.DataFrame:
    return tables.read(out / "boxes.parquet").with_columns(t_s=(pl.col("stamp_us") - BEGIN_US) / 1e6)


def near(boxes: pl.DataFrame, x: float, y: float) -> pl.DataFrame:
    return boxes.filter(((pl.col("x_m") - x) ** 2 + (pl.col("y_m") - y) ** 2).sqrt() < 3)


def test_a_moving_car_is_one_track_at_its_place_with_its_speed_and_heading(labelled):
    boxes = boxes_of(labelled[1]).filter(pl.col("vx_mps") > 0)
    assert boxes["track_id"].n_unique() == 1
    assert boxes.height == 8
    for row in boxes.iter_rows(named=True):
        x, y = moving_car(row["t_s"])
        assert np.hypot(row["x_m"] - x, row["y_m"] - y) < 0.4
        assert np.rad2deg(row["yaw_rad"]) == pytest.approx(10, abs=3)
        assert np.hypot(row["vx_mps"], row["vy_mps"]) == pytest.approx(8.0, abs=0.5)
        assert row["z_m"] == pytest.approx(SLOPE * x + 0.75, abs=0.2)
    assert boxes["category"].unique().to_list() == ["vehicle.car"]
    assert boxes["length_m"][0] == pytest.approx(4.6, abs=0.6)
    assert boxes["width_m"][0] == pytest.approx(1.9, abs=0.2)
    assert boxes["height_m"][0] == pytest.approx(1.5, abs=0.2)


def test_a_parked_car_has_one_box_at_all_key_frames(labelled):
    boxes = near(boxes_of(labelled[1]), *PARKED[:2])
    assert boxes.height == 8
    assert boxes["x_m"].n_unique() == boxes["y_m"].n_unique() == boxes["yaw_rad"].n_unique() == 1
    assert boxes["vx_mps"].to_list() == [0] * 8
    row = boxes.row(0, named=True)
    assert np.hypot(row["x_m"] - PARKED[0], row["y_m"] - PARKED[1]) < 0.15
    assert np.rad2deg(geometry.wrap_rad(row["yaw_rad"] - PARKED[2])) == pytest.approx(0, abs=2)  # bonnet in front


def test_walls_and_poles_get_no_box(labelled):
    boxes = boxes_of(labelled[1])
    assert boxes.height == 16  # the two cars, eight key frames
    assert boxes["track_id"].n_unique() == 2


def test_every_box_says_its_source_score_and_the_points_of_its_key_frame(labelled, scene):
    boxes = boxes_of(labelled[1])
    assert boxes["source"].unique().to_list() == ["geometric"]
    assert boxes["score"].is_between(0, 1, closed="none").all()
    row = near(boxes, *PARKED[:2]).filter(pl.col("t_s") == 1.5).row(0, named=True)
    frame = tables.read(scene["sample_data"]).row(15, named=True)
    assert (frame["stamp_us"] - BEGIN_US, frame["is_key_frame"]) == (1_500_000, True)
    points = pack.read_points(pack.read_member(scene["pack"], frame["offset"], frame["bytes"]))[:, :3].astype(float)
    xyz = geometry.apply(ego_pose(1.5) @ T_EGO_SENSOR, points) - (row["x_m"], row["y_m"], row["z_m"])
    along = xyz[:, 0] * np.cos(row["yaw_rad"]) + xyz[:, 1] * np.sin(row["yaw_rad"])
    across = xyz[:, 1] * np.cos(row["yaw_rad"]) - xyz[:, 0] * np.sin(row["yaw_rad"])
    inside = ((np.abs(along) <= row["length_m"] / 2) & (np.abs(across) <= row["width_m"] / 2)
              & (np.abs(xyz[:, 2]) <= row["height_m"] / 2))
    assert row["num_lidar_pts"] == inside.sum() > 20


def test_facts_count_what_was_written(labelled):
    facts, out = labelled
    assert facts == {"scene_token": "scene", "labeller": "geometric", "num_sweeps": 24,
                     "num_sightings": tables.read(out / "raw.parquet").height, "num_tracks": 2, "num_boxes": 16,
                     "num_boxes_by_category": {"vehicle.car": 16}, "mean_score": facts["mean_score"]}
    assert facts["mean_score"] == pytest.approx(boxes_of(out)["score"].mean(), abs=1e-6)


def test_raw_holds_what_was_seen_before_any_threshold_on_tracks(labelled):
    raw = tables.read(labelled[1] / "raw.parquet")
    assert raw.schema == sightings.RAW
    pole = near(raw, 16, -4.5)
    assert pole.height == 24
    assert pole["thing"].n_unique() == 1
    assert pole["top_m"].min() > 4
    moving = raw.filter(pl.col("x_m") > 10, pl.col("y_m") > 1)
    assert moving["thing"].null_count() == moving.height > 20
    assert moving["beside_share"].max() == 0


def test_labels_can_be_made_again_from_raw_with_other_knobs(cfg, labelled, scene):
    raw = tables.read(labelled[1] / "raw.parquet")
    stamps_us = tables.read(scene["sample"])["stamp_us"].to_numpy()
    rules = objects.Rules(cfg.tracking, cfg.motion, cfg.categories)
    assert [track.stands for track in objects.find(raw, stamps_us, rules)] == [False, True]
    no_cars = [kind for kind in cfg.categories if kind.name != "vehicle.car"]
    assert objects.find(raw, stamps_us, dataclasses.replace(rules, categories=no_cars)) == []


def test_two_tracks_of_one_thing_give_one_box(cfg, labelled, scene, tmp_path, monkeypatch):
    raw = tables.read(labelled[1] / "raw.parquet")
    twice = pl.concat([raw, raw.drop_nulls("thing").with_columns(pl.col("thing") + 1000)])
    monkeypatch.setattr(autolabel, "detect", lambda *given: twice)
    assert autolabel.run(cfg, ITEM, scene, tmp_path)["num_boxes"] == 16


def test_twice_gives_the_same_bytes(cfg, labelled, scene, tmp_path):
    assert autolabel.run(cfg, ITEM, scene, tmp_path) == labelled[0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["boxes.parquet", "picture.jpg", "raw.parquet"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (labelled[1] / name).read_bytes()


@pytest.mark.parametrize(("stride", "num_sweeps"), [(1, 40), (2, 24), (3, 19)])
def test_a_stride_looks_at_key_frames_and_every_nth_sweep(cfg, scene, tmp_path, stride, num_sweeps):
    facts = autolabel.run(dataclasses.replace(cfg, frame_stride=stride), ITEM, scene, tmp_path)
    assert facts["num_sweeps"] == num_sweeps  # with stride 2: 20 of even number and the key frames 5, 15, 25, 35
    assert facts["num_boxes_by_category"]["vehicle.car"] >= 14


@pytest.mark.parametrize(("name", "options"), [
    ("an empty street", {"street": lambda t_s: []}), ("another lidar", {"channel": "LIDAR_REAR"})])
def test_a_scene_without_objects_has_no_boxes_and_is_no_error(cfg, tmp_path, name, options):
    facts = autolabel.run(cfg, ITEM, write_scene(tmp_path / "in", num_sweeps=6, **options), tmp_path)
    assert facts["num_boxes"] == 0
    assert facts["mean_score"] is None
    assert boxes_of(tmp_path).schema == {**tables.BOXES, "t_s": pl.Float64}


def result_of(name: str, facts: dict, out: Path) -> Result:
    return Result(name=name, facts=facts, outputs={p.name: Blob(digest="", bytes=0) for p in out.iterdir()},
                  path=lambda file: out / file)


def test_plan_has_one_item_per_scene_with_the_digests_of_its_tables(cfg):
    names = ("sample", "sample_data", "ego_pose", "calibrated_sensor", "signals")
    files = ["pack.tar", *(f"{name}.parquet" for name in names)]
    sampled = Result("drive-1", {}, {file: Blob(f"digest of {file}", 1) for file in files}, path=Path)
    assert autolabel.plan(cfg, {"sample": Upstream(Path("data/sample"), (sampled,))}) == [
        Item(name="drive-1", params={"labeller": "geometric"}, inputs={
            "pack": "digest of pack.tar", "sample": "digest of sample.parquet",
            "sample_data": "digest of sample_data.parquet", "ego_pose": "digest of ego_pose.parquet",
            "calibrated_sensor": "digest of calibrated_sensor.parquet"})]


def collected(cfg: autolabel.Knobs, results: list[Result], folder: Path):
    out = Out(data=folder / "data", results=folder / "results")
    out.data.mkdir(parents=True)
    out.results.mkdir()
    return autolabel.collect(cfg, results, out), out


def test_collect_counts_boxes_by_category_and_shows_a_scene(cfg, labelled, tmp_path):
    facts, out = labelled
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = {**facts, "num_tracks": 0, "num_boxes": 0, "num_boxes_by_category": {}, "mean_score": None}
    results = [result_of("drive-1", facts, out), result_of("drive-2", nothing, empty)]
    summary, written = collected(cfg, results, tmp_path / "out")
    assert (summary.num_in, summary.num_out, summary.unit_in, summary.unit) == (2, 16, "scenes", "boxes")
    assert dict(summary.dropped) == {"scenes without boxes": 1}
    assert summary.notes == ()
    scenes = tables.read(written.data / "scenes.parquet")
    assert scenes["num_vehicle.car"].to_list() == [16, 0]
    assert scenes["mean_score"].to_list() == [facts["mean_score"], None]
    assert "data:image/jpeg" in (written.results / "report.html").read_text()
    _, again = collected(cfg, results, tmp_path / "again")
    assert (again.results / "report.html").read_bytes() == (written.results / "report.html").read_bytes()
    assert (again.data / "scenes.parquet").read_bytes() == (written.data / "scenes.parquet").read_bytes()


def test_no_box_in_any_scene_is_said(cfg, labelled, tmp_path):
    nothing = {**labelled[0], "num_tracks": 0, "num_boxes": 0, "num_boxes_by_category": {}, "mean_score": None}
    summary, _ = collected(cfg, [result_of("drive-1", nothing, tmp_path)], tmp_path / "out")
    assert summary.notes == ("no scene has any automatic box: look at the picture in results/autolabel/report.html, "
                             "then at the knobs autolabel.clustering.*",)
