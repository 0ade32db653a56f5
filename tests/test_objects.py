"""Objects among sightings that are written down by hand: what was seen of a car, and from where."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from stages import autolabel
from stages.lib import boxes, knobs, objects, sightings
from stages.lib.objects import Rules

ROOT = Path(__file__).parents[1]
BEGIN_US, SWEEP_US = 1_700_000_000_000_000, 200_000
CFG = knobs.load(autolabel.Knobs, yaml.safe_load((ROOT / "conf/autolabel/default.yaml").read_text()), "autolabel")
RULES = Rules(CFG.tracking, CFG.motion, CFG.categories)


def sighting(number: int, seen: tuple[float, float, float, float], sensor: tuple[float, float] = (0.0, 0.0),
             **others) -> dict:
    """A row of RAW in sweep `number` of which the part seen = (x from, x to, y from, y to) of something was seen."""
    x0, x1, y0, y1 = seen
    row = {"stamp_us": BEGIN_US + number * SWEEP_US, "thing": None, "after_s": 0.0, "x_m": (x0 + x1) / 2,
           "y_m": (y0 + y1) / 2, "ground_z_m": 0.2, "length_m": x1 - x0, "width_m": y1 - y0, "top_m": 1.5,
           "yaw_rad": 0.0, "lean_m": -0.5, "num_lidar_pts": 50, "beside_share": 0.0, "sensor_x_m": sensor[0],
           "sensor_y_m": sensor[1]} | others
    corners = np.array([(x1, y1), (x0, y1), (x0, y0), (x1, y0)]) - (row["x_m"], row["y_m"])
    return {"outline_dx_m": corners[:, 0], "outline_dy_m": corners[:, 1], "outline_after_s": np.zeros(4)} | row


def find(rows: list[dict], rules: Rules = RULES) -> list[objects.Track]:
    """Objects at the stamps of the sweeps 0 to 19."""
    raw = pl.DataFrame([{name: row[name] for name in sightings.RAW} for row in rows], schema=sightings.RAW)
    return objects.find(raw, BEGIN_US + np.arange(20) * SWEEP_US, rules)


def driving(begin_m: float, speed_mps: float, seen: tuple[float, float, float, float], num: int = 20,
            **others) -> list[dict]:
    """Sightings of something whose middle is at begin_m + speed_mps t; `seen` from there."""
    return [sighting(n, (x + seen[0], x + seen[1], seen[2], seen[3]), **others)
            for n in range(num) for x in [begin_m + speed_mps * n * 0.2]]


def test_a_car_seen_from_behind_grows_away_from_the_sensor_to_its_typical_length():
    track, = find(driving(12, 8, (-2.2, -1.9, -0.9, 0.9)))
    assert track.category == "vehicle.car"
    assert track.size_lwh_m.tolist() == pytest.approx([4.4, 1.8, 1.5], abs=1e-3)
    np.testing.assert_allclose(track.states[:, 0], np.column_stack([12 + 1.6 * np.arange(20), np.zeros(20)]), atol=0.06)
    np.testing.assert_allclose(track.states[:, 1], [[8, 0]] * 20, atol=0.05)
    np.testing.assert_allclose(track.yaw_rad, 0, atol=1e-3)
    assert track.box(0)[2] == pytest.approx(0.2 + 0.75)


def test_an_oncoming_car_seen_from_the_front_grows_away_too():
    track, = find(driving(60, -8, (-2.2, -1.9, -0.9, 0.9)))
    np.testing.assert_allclose(track.states[:, 0, 0], 60 - 1.6 * np.arange(20), atol=0.06)
    np.testing.assert_allclose(np.abs(track.yaw_rad), np.pi, atol=1e-3)


def test_a_length_seen_from_the_side_is_the_length_and_one_seen_from_behind_is_not():
    beside, = find(driving(-10, 8, (-2.0, 2.0, 3.0, 4.8)))
    assert beside.size_lwh_m[0] == pytest.approx(4.0)
    behind, = find(driving(12, 8, (-2.2, 1.2, -0.9, 0.9)))  # its rear and its roof, 3.4 m
    assert behind.size_lwh_m[0] == pytest.approx(4.4)


def test_complete_keeps_the_edge_towards_the_sensor():
    low, high, size = np.array([10.0, -1.0]), np.array([10.5, 1.0]), np.array([4.0, 2.0])
    assert objects.complete(low, high, np.array([0.0, 0.0]), size).tolist() == [12.0, 0.0]
    assert objects.complete(low, high, np.array([30.0, 0.0]), size).tolist() == [8.5, 0.0]
    assert objects.complete(low, high, np.array([10.2, -5.0]), size).tolist() == [10.25, 0.0]


def test_points_measured_late_in_the_turn_put_the_car_where_it_was_at_the_stamp():
    late = driving(12, 10, (-2.2 + 0.5, -1.9 + 0.5, -0.9, 0.9), after_s=0.05)  # seen 0.5 m further ahead, 50 ms later
    track, = find(late)
    np.testing.assert_allclose(track.states[:, 0, 0], 12 + 2 * np.arange(20), atol=0.06)


def test_a_parked_car_has_one_box_with_its_front_where_it_is_low():
    rows = [sighting(n, (18, 22.4, 3, 4.8), sensor=(n * 1.6, 0), thing=7, lean_m=lean)
            for n, lean in enumerate([-0.4] * 20)]
    track, = find(rows)
    assert (track.category, track.stands) == ("vehicle.car", True)
    assert track.box(3).tolist() == track.box(9).tolist() == pytest.approx([20.2, 3.9, 0.95, 4.4, 1.8, 1.5, 0.0])
    turned, = find([row | {"lean_m": 0.4} for row in rows])
    assert abs(turned.yaw_rad[0]) == pytest.approx(np.pi)


@pytest.mark.parametrize(("what", "seen", "others"), [
    ("a post", (18, 18.2, 3, 3.2), {"top_m": 5.0}), ("a person-sized bin", (18, 18.6, 3, 3.6), {"top_m": 1.6}),
    ("a hedge", (18, 22, 3, 3.4), {"top_m": 1.2}), ("a wall", (18, 22, 3, 5), {"top_m": 5.5}),
    ("a kerb", (18, 22, 3, 4.8), {"top_m": 0.4}), ("a house", (10, 22, 3, 9), {"top_m": 4.0})])
def test_other_things_that_stand_are_no_objects(what, seen, others):
    assert find([sighting(n, seen, thing=3, **others) for n in range(20)]) == []


@pytest.mark.parametrize(("what", "rows", "category"), [
    ("walks", driving(5, 1.4, (-0.3, 0.3, 2, 2.6), top_m=1.7), "human.pedestrian.adult"),
    ("cycles", driving(5, 5, (-0.9, 0.9, 2, 2.6), top_m=1.7), "vehicle.bicycle"),
    ("is long and high", driving(-20, 8, (-3.5, 3.5, 3, 5.4), top_m=3.0), "vehicle.truck"),
    ("is longer", driving(-20, 8, (-5.5, 5.5, 3, 5.5), top_m=3.1), "vehicle.bus.rigid")])
def test_what_moves_gets_its_category_by_size_height_and_speed(what, rows, category):
    assert [track.category for track in find(rows)] == [category]


def test_what_does_not_get_away_or_is_a_splinter_of_what_stands_does_not_move():
    assert find(driving(12, 0.3, (-2.2, -1.9, -0.9, 0.9))) == []
    assert find(driving(12, 8, (-2.2, -1.9, -0.9, 0.9), beside_share=0.9)) == []
    assert find(driving(12, 8, (-0.05, 0.05, -0.05, 0.05))) == []  # too little of anything was seen


def test_a_car_that_stops_keeps_its_heading():
    x = np.concatenate([12 + 1.6 * np.arange(10), np.full(10, 12 + 1.6 * 9)])
    track, = find([sighting(n, (x[n] - 2.2, x[n] - 1.9, -0.9, 0.9)) for n in range(20)])
    np.testing.assert_allclose(track.yaw_rad, 0, atol=0.06)
    assert np.hypot(*track.states[-1, 1]) < 0.2


def test_a_long_side_says_the_heading_in_a_bend_and_a_far_off_one_does_not():
    rows = driving(-10, 8, (-2.0, 2.0, 3.0, 4.8))
    turned, = find([row | {"yaw_rad": 0.1} for row in rows])
    np.testing.assert_allclose(turned.yaw_rad, 0.1, atol=1e-3)
    not_turned, = find([row | {"yaw_rad": 0.7} for row in rows])
    np.testing.assert_allclose(not_turned.yaw_rad, 0, atol=1e-3)


def test_the_score_grows_with_sightings_and_with_what_was_seen():
    whole, = find(driving(-10, 8, (-2.0, 2.0, 3.0, 4.8)))
    brief, = find(driving(-10, 8, (-2.0, 2.0, 3.0, 4.8), num=5))
    rear, = find(driving(12, 8, (-2.2, -1.9, -0.9, 0.9)))
    assert 0 < brief.score < whole.score < 1
    assert rear.score < whole.score


def test_boxes_are_only_where_sightings_enclose_the_sample():
    track, = find(driving(12, 8, (-2.2, -1.9, -0.9, 0.9))[4:9])
    assert track.sample.tolist() == [4, 5, 6, 7, 8]


def test_tracks_of_few_sightings_are_no_objects():
    assert find(driving(12, 8, (-2.2, -1.9, -0.9, 0.9), num=2)) == []
    few = dataclasses.replace(RULES, tracking=dataclasses.replace(RULES.tracking, min_hits=2))
    assert len(find(driving(12, 14, (-2.2, -1.9, -0.9, 0.9), num=2), few)) == 1
    assert find([]) == []


def test_points_are_counted_inside_turned_boxes():
    box = np.array([[10.0, 5.0, 1.0, 4.0, 2.0, 1.5, np.pi / 2]])  # 2 m along x, 4 m along y
    inside, outside = [[10.9, 6.9, 1.7], [9.1, 3.1, 0.3], [10, 5, 1]], [[11.1, 5, 1], [10, 7.1, 1], [10, 5, 1.8]]
    assert boxes.count_inside(np.array(inside + outside), box).tolist() == [3]
    assert boxes.count_inside(np.zeros((0, 3)), box).tolist() == [0]


def test_of_two_boxes_in_one_place_the_better_one_stays():
    one, same, next_to_it = [[x, y, 0.0, 4.4, 1.8, 1.5, 0.0] for x, y in ((0, 0), (0.5, 0.3), (0, 2.0))]
    keep = boxes.not_overlapped(np.array([one, same, next_to_it]), np.array([0.5, 0.9, 0.1]))
    assert keep.tolist() == [False, True, True]
