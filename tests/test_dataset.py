"""Samples read from tables and packs, in the world of tests/judged.py: every frame and unit by numbers known there."""

import cv2
import numpy as np
import polars as pl
import pytest

from stages.lib import geometry, tables
from stages.lib.dataset import Dataset, box_array, move_boxes
from stages.lib.errors import DataError
from tests import judged

EGO_BOX_M = (-1.0, -1.0, 1.0, 1.0)


def opened(world: judged.World, folder, drives: str = "abc") -> Dataset:
    for name, table in world.tables.items():
        tables.write(table, folder / "tables" / f"{name}.parquet")
    return Dataset(folder / "tables", {f"scene_{d}": world.packs[f"scene_{d}"] for d in drives})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    return opened(judged.make(folder), folder)


def roofs(points: np.ndarray) -> np.ndarray:
    return points[points[:, 2] > 1.0]


@pytest.mark.parametrize("drive", "abc")
def test_a_standing_car_stays_in_place_when_sweeps_are_gathered_and_a_moving_one_leaves_a_trail(dataset, drive):
    cars = roofs(dataset.points_ego(f"scene_{drive}_2", 3))
    left = cars[cars[:, 1] > 5]
    assert len(left) == 3 * 20
    assert np.abs(left[:, :3] - [-2.0, 8.0, 1.6]).max() < 0.801
    ahead = cars[abs(cars[:, 1]) < 2]
    for age_s, x_m in ((0.0, 12.0), (0.5, 11.0), (1.0, 10.0)):
        trail = ahead[np.isclose(ahead[:, 4], age_s)]
        assert len(trail) == 40
        assert np.abs(trail[:, :2] - [x_m, 0.0]).max() < 0.801


def test_gathering_stops_at_the_scenes_start(dataset):
    points = dataset.points_ego("scene_a_0", 5)
    assert points.dtype == np.float32
    assert len(points) == 31 * 31 + 40 + 20 + 3
    assert not points[:, 4].any()


def test_the_vehicles_own_points_go_from_every_sweep_in_its_own_frame(dataset):
    # One ground point of each sweep lies at that sweep's own origin: 0, 1 and 2 m behind the key frame's.
    every, rest = dataset.points_ego("scene_b_2", 3), dataset.points_ego("scene_b_2", 3, EGO_BOX_M)
    gone = {tuple(row) for row in every.round(3)} - {tuple(row) for row in rest.round(3)}
    assert sorted((round(float(x)), round(float(y)), round(float(age), 1)) for x, y, _, _, age in gone) == [
        (-2, 0, 1.0), (-1, 0, 0.5), (0, 0, 0.0)]


@pytest.mark.parametrize("drive", "abc")
def test_boxes_come_to_the_ego_frame_with_heading_and_velocity_turned(dataset, drive):
    rows = dataset.boxes(f"scene_{drive}_1")
    boxes = move_boxes(geometry.invert(dataset.T_map_ego(f"scene_{drive}_1")), box_array(rows))
    by_car = dict(zip(rows["token"].str.extract("_(ahead|left|far)_"), boxes))
    assert by_car["ahead"] == pytest.approx([12, 0, 0.8, *judged.SIZE_M, 0, 2, 0], abs=1e-9)
    assert by_car["left"] == pytest.approx([-1, 8, 0.8, *judged.SIZE_M, 0, 0, 0], abs=1e-9)
    assert by_car["far"] == pytest.approx([25, -5, 0.8, *judged.SIZE_M, 0, 2, 0], abs=1e-9)


def test_moving_boxes_there_and_back_changes_nothing():
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.normal(0, 20, (50, 3)), rng.uniform(1, 5, (50, 3)), rng.uniform(-3.1, 3.1, 50),
                             rng.normal(0, 5, (50, 2))])
    boxes[::7, 7:] = np.nan
    T = geometry.transform([100.0, -7.0, 3.0], geometry.yaw_wxyz(2.5))
    moved = move_boxes(T, boxes)
    np.testing.assert_allclose(move_boxes(geometry.invert(T), moved), boxes, atol=1e-9)
    ahead = boxes[:, :2] + np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
    nose = geometry.apply(T, np.column_stack([ahead, boxes[:, 2]]))[:, :2]
    np.testing.assert_allclose(nose - moved[:, :2], np.stack([np.cos(moved[:, 6]), np.sin(moved[:, 6])], 1), atol=1e-9)


def test_a_camera_knows_its_intrinsics_and_where_it_was(dataset):
    K, T_map_cam = dataset.camera("scene_b_1", "CAM_FRONT")
    assert K.tolist() == judged.K
    # Drive b heads along +y from (200, 0); the camera sits 1.5 m ahead and high and looks forward (its z).
    np.testing.assert_allclose(T_map_cam[:3, 3], [200, 1 + 1.5, 1.5], atol=1e-9)
    np.testing.assert_allclose(T_map_cam[:3, 2], [0, 1, 0], atol=1e-9)


def test_an_image_is_rgb_of_its_own_key_frame(tmp_path, monkeypatch):
    blue_green_red = np.array([30, 60, 90])
    monkeypatch.setattr(judged, "_image", lambda n: cv2.imencode(
        ".jpg", np.full((96, 128, 3), blue_green_red + 20 * n, np.uint8))[1].tobytes())
    image = opened(judged.make(tmp_path), tmp_path).image("scene_a_2", "CAM_FRONT")
    assert image.shape == (96, 128, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.mean((0, 1)) - [130, 100, 70]).max() < 2


def test_samples_come_by_scene_and_stamp_and_only_from_scenes_whose_pack_is_there(dataset, tmp_path):
    assert dataset.sample_tokens("val") == [f"scene_{d}_{n}" for d in "bc" for n in range(4)]
    part = opened(judged.make(tmp_path), tmp_path, "ac")
    assert part.sample_tokens("val") == [f"scene_c_{n}" for n in range(4)]
    assert part.scene_token("scene_c_0") == "scene_c"
    assert part.label_source("scene_c_0") == "truth"


def test_a_stamp_is_reviewed_from_the_start_of_an_interval_to_just_before_its_end(tmp_path):
    world = judged.make(tmp_path)
    start = judged.START_US
    bounds = pl.Series("reviewed_us", [[start + 1, start + 1_000_000, start + 1_500_000, start + 1_500_001]] * 3)
    world.tables["scene"] = world.tables["scene"].with_columns(bounds)
    dataset = opened(world, tmp_path)
    assert [dataset.is_reviewed(f"scene_a_{n}") for n in range(4)] == [False, True, False, True]


def test_a_sample_without_boxes_has_an_empty_table_with_the_same_columns(tmp_path):
    world = judged.make(tmp_path)
    world.tables["sample_annotation"] = world.tables["sample_annotation"].filter(pl.col("sample_token") != "scene_a_1")
    dataset = opened(world, tmp_path)
    assert dataset.boxes("scene_a_1").columns == dataset.boxes("scene_a_0").columns
    assert box_array(dataset.boxes("scene_a_1")).shape == (0, 9)


def test_a_missing_channel_is_named_with_the_way_out(dataset):
    with pytest.raises(DataError, match=r"sample scene_a_0 has no RADAR key frame\n  require the channel in the rig"):
        dataset.camera("scene_a_0", "RADAR")


def test_a_broken_image_is_named_with_the_way_out(tmp_path):
    world = judged.make(tmp_path)
    world.tables["sample_data"] = world.tables["sample_data"].with_columns(pl.col("offset") + 40)
    dataset = opened(world, tmp_path)
    with pytest.raises(DataError, match=r"samples/CAM_FRONT/a__0.jpg of scene scene_a: not a readable image: .*\n.*sa"):
        dataset.image("scene_a_0", "CAM_FRONT")
