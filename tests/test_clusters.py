"""Ground and clusters of sampled surfaces, with numbers that can be checked by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stages.lib import clusters, firing, ground
from stages.lib.clusters import Clustering

CFG = Clustering(min_range_m=2.0, max_range_m=60.0, low_m=0.3, high_m=2.2, gap_m=0.5, gap_per_m=0.008, gap_along_m=1.2,
                 min_points=4)


def plane(slope: float = 0.0, z_m: float = 0.0) -> np.ndarray:
    x, y = np.meshgrid(np.arange(-40, 40, 0.7), np.arange(-40, 40, 0.7))
    return np.column_stack([x.ravel(), y.ravel(), z_m + slope * x.ravel()])


def wall(begin: tuple[float, float], end: tuple[float, float], low: float = 0.1, high: float = 1.5,
         spacing: float = 0.2) -> np.ndarray:
    """Points of an upright rectangle."""
    num = int(np.hypot(end[0] - begin[0], end[1] - begin[1]) / spacing) + 1
    share, z = np.meshgrid(np.linspace(0, 1, num), np.arange(low, high + 1e-9, 0.2))
    xy = np.array(begin) + share.reshape(-1, 1) * np.subtract(end, begin)
    return np.column_stack([xy, z.ravel()])


def corner(x: float, y: float, yaw: float, length: float = 4.0, width: float = 1.8) -> np.ndarray:
    """The rear and the right side of a car whose right rear corner is at (x, y)."""
    ahead, left = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
    return np.vstack([wall((x, y), (x, y) + length * ahead), wall((x, y), (x, y) + width * left)])


def lifted(points: np.ndarray, by_m: float) -> np.ndarray:
    return points + np.array([0, 0, by_m])


def find(*things: np.ndarray, cfg: Clustering = CFG, slope: float = 0.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Points (N, 3) and heights (N,) of each cluster of a sweep over a plane, in order of x."""
    xyz = np.vstack([plane(slope), *things])
    rows, height = clusters.heights(xyz, np.zeros(2), cfg)
    over = height > cfg.low_m
    xyz, height = xyz[rows[over]], height[over]
    found = [rows for rows in clusters.find(xyz[:, :2], height, cfg) if len(rows) >= cfg.min_points]
    return sorted(((xyz[rows], height[rows]) for rows in found), key=lambda cluster: cluster[0][:, 0].mean())


def test_height_is_over_the_local_ground_wherever_the_origin_is():
    hump = plane(slope=0.04, z_m=-1.9)
    hump[:, 2] += 0.15 * np.exp(-((hump[:, 0] - 15) ** 2) / 50)
    height = ground.heights(np.vstack([hump, lifted(corner(10, 5, 0.3), 0.04 * 10 - 1.9)]), 60)
    np.testing.assert_allclose(height[:len(hump)], 0, atol=0.08)
    assert height[len(hump):].max() == pytest.approx(1.5, abs=0.2)


def test_most_points_on_walls_do_not_lift_the_ground():
    walls = [wall((-30, y), (30, y), high=6, spacing=0.1) for y in (-8, 8, 12)]
    points = np.vstack([plane(), *walls])
    height = ground.heights(points, 60)
    np.testing.assert_allclose(height[:len(plane())], 0, atol=0.05)


def test_a_plane_is_fitted_through_the_lower_half_of_the_points():
    xyz = plane(slope=0.03, z_m=-1.9)
    xyz[::2, 2] += np.linspace(0.4, 4, len(xyz[::2]))  # every other cell holds a wall, a car or a bush
    np.testing.assert_allclose(ground.fit_plane(xyz), [0.03, 0, -1.9], atol=0.01)


def test_ground_below_a_reflection_is_still_ground():
    ghosts = np.column_stack([np.linspace(5, 20, 40), np.full(40, 3.0), np.full(40, -1.5)])
    height = ground.heights(np.vstack([plane(), ghosts]), 60)
    np.testing.assert_allclose(height[:len(plane())], 0, atol=0.05)


@pytest.mark.parametrize("yaw_deg", [0, 20, 45, 70, 89])
def test_an_l_shape_gives_its_sides_and_direction(yaw_deg):
    yaw = np.deg2rad(yaw_deg)
    outline = corner(10, 5, yaw)[:, :2]
    angle = clusters.fit_angle(outline)
    assert (np.rad2deg(angle) - yaw_deg + 45) % 90 - 45 == pytest.approx(0, abs=0.6)
    centre, size = clusters.rectangle(outline, angle)
    np.testing.assert_allclose(sorted(size), [1.8, 4.0], atol=0.06)
    middle = (10, 5) + np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]) @ (2.0, 0.9)
    np.testing.assert_allclose(centre, middle, atol=0.05)
    np.testing.assert_allclose(clusters.corners(np.array([4.0, 1.8]), 0.0)[0], [2.0, 0.9])


def test_a_car_on_a_slope_is_one_cluster_with_its_height():
    (_, height), = find(lifted(corner(10, 4, 0.2), 0.05 * 11), slope=0.05)
    assert clusters.top(height, 11) == pytest.approx(1.5, abs=0.1)


def test_two_cars_with_a_gap_between_them_are_two():
    assert len(find(corner(10, 4, 0.0), corner(10, 6.8, 0.0))) == 2  # 1.0 m from left side to right side


def test_a_side_whose_points_are_far_apart_along_the_ray_stays_whole():
    rear = wall((12, 2), (12, 3.8))
    side = np.array([[x, 2.0, z] for x in (13.0, 14.0, 15.0, 16.0) for z in (0.5, 0.9)])
    whole = len(rear[rear[:, 2] > 0.31]) + len(side)
    assert [len(xyz) for xyz, _ in find(rear, side)] == [whole]
    assert [len(xyz) for xyz, _ in find(rear, side, cfg=dataclasses.replace(CFG, gap_along_m=0.5))] == [whole - 8]


def test_a_branch_over_a_car_joins_it_but_is_not_its_roof():
    branch = np.column_stack([np.linspace(10, 13, 30), np.full(30, 4.0), np.full(30, 4.2)])
    (xyz, height), = find(corner(10, 4, 0.0), branch)
    assert xyz[:, 2].max() == pytest.approx(4.2)
    assert clusters.top(height, 10) == pytest.approx(1.5, abs=0.1)


def test_what_is_near_the_sensor_or_far_is_left_out():
    assert find(wall((0.5, 1), (1.5, 1)), wall((70, 0), (70, 3))) == []


def test_a_sweep_without_points_has_no_clusters():
    assert len(clusters.heights(np.zeros((0, 3)), np.zeros(2), CFG)[0]) == 0
    assert clusters.find(np.zeros((0, 2)), np.zeros(0), CFG) == []


def test_points_in_one_line_have_a_hull():
    line = np.column_stack([np.arange(5.0), -np.arange(5.0)])
    assert sorted(clusters.hull(line).tolist()) == [0, 4]
    assert sorted(clusters.hull(np.array([[0.0, 0], [2, 0], [1, 1], [2, 2], [0, 2]])).tolist()) == [0, 1, 3, 4]


def turn(num_azimuths: int = 360, num_beams: int = 8) -> np.ndarray:
    """Points of a clockwise turn from behind, in order of firing: xy (N, 2)."""
    azimuth = np.repeat(np.pi - (np.arange(num_azimuths) + 0.5) / num_azimuths * 2 * np.pi, num_beams)
    range_m = np.tile(np.linspace(5, 40, num_beams), num_azimuths)
    return np.column_stack([np.cos(azimuth), np.sin(azimuth)]) * range_m[:, None]


def test_the_order_of_points_tells_when_in_the_turn_they_were_measured():
    xy = turn()
    fraction = firing.turn_fraction(xy)
    for ahead, left, expected in ((1, 0, 0.0), (0, 1, -0.25), (0, -1, 0.25)):
        toward = (xy @ (ahead, left)) > 0.999 * np.hypot(*xy.T)
        assert fraction[toward].mean() == pytest.approx(expected, abs=0.01)
    assert fraction[0] == pytest.approx(-0.5, abs=0.01)
    assert fraction[-1] == pytest.approx(0.5, abs=0.01)


def test_points_in_order_of_beams_do_not_tell_when_they_were_measured():
    by_beam = turn().reshape(360, 8, 2).transpose(1, 0, 2).reshape(-1, 2)
    assert not firing.turn_fraction(by_beam).any()
    assert not firing.turn_fraction(turn()[:1440]).any()  # half a turn
    swapped = turn().reshape(48, -1, 2)
    swapped[[10, 11]] = swapped[[11, 10]]
    assert not firing.turn_fraction(swapped.reshape(-1, 2)).any()
    assert not firing.turn_fraction(np.zeros((0, 2))).any()
