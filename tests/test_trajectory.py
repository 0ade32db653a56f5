"""Ego poses from odometry and from satellite positions, and the grid that they are on."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from stages.lib import geometry, trajectory
from stages.lib.fusion import Fixes, Turns, fuse, yaw_axis
from stages.lib.geodesy import A_M, F, grid_m

T0_US = 1_700_000_000_000_000
ANTENNA_M = np.array([1.0, 0.5, 1.5])
NO_TURNS = Turns(np.zeros(0, np.int64), np.zeros(0))


# the grid ---------------------------------------------------------------------------------------------------------
def test_the_grid_agrees_with_a_published_utm_coordinate():
    """The CN Tower: 43°38'33.24"N 79°23'13.7"W is 17T 630084 m E, 4833438 m N (en.wikipedia.org, UTM)."""
    east_m, north_m = grid_m(np.array([43 + 38 / 60 + 33.24 / 3600]), np.array([-(79 + 23 / 60 + 13.7 / 3600)]),
                             (0.0, -81.0))[0] * 0.9996
    assert (east_m + 500_000, north_m) == pytest.approx((630_084, 4_833_438), abs=1.5)


def test_distances_on_the_grid_are_those_through_space():
    places_deg = np.array([[55.8920, -3.3216], [55.8925, -3.3209]])
    latitude, longitude = np.radians(places_deg).T
    radius_m = A_M / np.sqrt(1 - F * (2 - F) * np.sin(latitude)**2)
    xyz_m = np.stack([radius_m * np.cos(latitude) * np.cos(longitude), radius_m * np.cos(latitude) * np.sin(longitude),
                      radius_m * (1 - F)**2 * np.sin(latitude)], -1)
    on_grid_m = grid_m(*places_deg.T, (55.95, -3.2))
    assert np.hypot(*(on_grid_m[1] - on_grid_m[0])) == pytest.approx(np.linalg.norm(xyz_m[1] - xyz_m[0]), abs=1e-3)


def test_x_is_east_and_y_is_north_of_the_origin():
    origin, east, north = grid_m(np.array([50.0, 50.0, 50.001]), np.array([8.0, 8.001, 8.0]), (50.0, 8.0))
    assert origin == pytest.approx([0, 0], abs=1e-6)
    assert east == pytest.approx([71.70, 0], abs=0.05)
    assert north == pytest.approx([0, 111.23], abs=0.05)


# odometry ---------------------------------------------------------------------------------------------------------
def test_odometry_of_another_frame_is_carried_over_to_the_ego_frame():
    """The odometry's frame is 1 m before the ego's, at (10, 0), looks along +y, drives 5 m/s, turns left, 0.1 rad/s."""
    T_child_ego = geometry.transform(np.array([-1.0, 0, 0]), np.array([1.0, 0, 0, 0]))
    row = trajectory.from_odometry(
        np.array([T0_US]), np.array([[10.0, 0, 0]]), geometry.yaw_wxyz(np.array([np.pi / 2])),
        linear_mps=np.array([[5.0, 0, 0]]), angular_radps=np.array([[0, 0, 0.1]]), T_child_ego=T_child_ego)
    assert row.select("x_m", "y_m", "z_m").row(0) == pytest.approx((10, -1, 0))
    assert row.select("qw", "qx", "qy", "qz").row(0) == pytest.approx((np.sqrt(0.5), 0, 0, np.sqrt(0.5)))
    assert row.select("vx_mps", "vy_mps", "yaw_rate_radps").row(0) == pytest.approx((5, -0.1, 0.1))


def test_the_twist_of_poses_on_a_circle_is_its_speed_and_turn_rate():
    """5 m/s on a radius of 50 m."""
    stamps_us = T0_US + np.arange(20) * 50_000
    yaw = np.arange(20) * 0.05 * 0.1
    xyz_m = np.stack([50 * np.sin(yaw), 50 * (1 - np.cos(yaw)), np.zeros(20)], -1)
    linear_mps, angular_radps = trajectory.twist(stamps_us, xyz_m, geometry.yaw_wxyz(yaw))
    assert linear_mps[1:-1] == pytest.approx(np.tile([5.0, 0, 0], (18, 1)), abs=1e-3)
    assert angular_radps == pytest.approx(np.tile([0, 0, 0.1], (20, 1)), abs=1e-9)


# satellite positions and a gyro -----------------------------------------------------------------------------------
def circle(num: int = 200, *, sigma_m: float = 0.2, seed: int = 0, antenna_m: np.ndarray = ANTENNA_M
           ) -> tuple[Fixes, np.ndarray, np.ndarray, np.ndarray]:
    """20 Hz fixes of an antenna on a car that drives 10 m/s on a radius of 100 m from (1000, 2000, 50) towards +x,
    up a grade of 5 %: fixes, and the truth of the car's xyz_m, yaw_rad, and a gyro (N, 3) whose z points down."""
    dice = np.random.default_rng(seed)
    t_s = np.arange(num) / 20
    yaw = 0.1 * t_s
    xyz_m = np.stack([1000 + 100 * np.sin(yaw), 2000 + 100 * (1 - np.cos(yaw)), 50 + 0.5 * t_s], -1)
    c, s = np.cos(yaw), np.sin(yaw)
    arm_m = np.stack([c * antenna_m[0] - s * antenna_m[1], s * antenna_m[0] + c * antenna_m[1],
                      np.full(num, antenna_m[2] + 0.05 * antenna_m[0])], -1)
    seen_m = xyz_m + arm_m + dice.normal(0, sigma_m, xyz_m.shape)
    gyro = np.stack([dice.normal(0, 0.02, num), dice.normal(0, 0.02, num), -0.1 + dice.normal(0, 0.005, num)], -1)
    return Fixes(T0_US + np.arange(num) * 50_000, seen_m, np.full((num, 2), sigma_m)), xyz_m, yaw, gyro


def test_a_noisy_circle_is_recovered_with_heading_speed_and_climb():
    fixes, xyz_m, yaw, gyro = circle()
    track = fuse(fixes, Turns(fixes.stamps_us, -gyro[:, 2]), ANTENNA_M)
    error_m = track.xyz_m - xyz_m
    assert np.sqrt(np.mean(error_m[:, :2]**2)) < 0.12
    assert np.sqrt(np.mean(error_m[:, 2]**2)) < 0.12
    assert np.degrees(np.abs(geometry.wrap_rad(track.yaw_rad - yaw))).max() < 0.7
    assert track.speed_mps[20:-20] == pytest.approx(10.0, abs=0.15)
    assert track.yaw_rate_radps.mean() == pytest.approx(0.1, abs=0.001)
    assert track.yaw_rate_radps.std() < 0.006
    assert np.degrees(track.pitch_rad).mean() == pytest.approx(-np.degrees(np.arctan(0.05)), abs=0.3)


def test_the_antennas_place_is_taken_out():
    """Without it the origin would be the antenna, 1.1 m away, and the heading off by 0.6 degrees in this turn."""
    fixes, xyz_m, yaw, gyro = circle(sigma_m=0.01)
    track = fuse(fixes, Turns(fixes.stamps_us, -gyro[:, 2]), ANTENNA_M)
    assert np.abs(track.xyz_m - xyz_m).max() < 0.03
    assert np.degrees(np.abs(geometry.wrap_rad(track.yaw_rad - yaw))).max() < 0.2


def test_a_gyros_bias_is_learned_from_the_course():
    """0.2 degrees a second for 40 s would be 8 degrees of heading, or a car that skids."""
    fixes, xyz_m, yaw, gyro = circle(800, antenna_m=np.zeros(3))
    track = fuse(fixes, Turns(fixes.stamps_us, -gyro[:, 2] + np.radians(0.2)), np.zeros(3))
    assert track.yaw_rate_radps.mean() == pytest.approx(0.1, abs=0.001)
    assert np.degrees(np.abs(geometry.wrap_rad(track.yaw_rad - yaw))).max() < 0.4
    assert np.sqrt(np.mean((track.xyz_m - xyz_m)**2)) < 0.12


@pytest.mark.parametrize("axis", ["x", "y", "z", "-x", "-y", "-z"])
def test_the_gyros_yaw_axis_is_found_from_the_course(axis):
    fixes, _, _, gyro = circle()
    sign, column = (-1 if axis[0] == "-" else 1), "xyz".index(axis[-1])
    turned = np.roll(gyro * (1, 1, -sign), column - 2, axis=1)
    assert yaw_axis(fixes, fixes.stamps_us, turned) == axis


def test_a_gyro_that_does_not_turn_with_the_car_is_not_used():
    fixes, _, _, gyro = circle()
    assert yaw_axis(fixes, fixes.stamps_us, gyro * 0) is None
    assert yaw_axis(fixes, np.zeros(0, np.int64), np.zeros((0, 3))) is None


def test_fixes_of_a_clock_that_was_set_back_are_not_believed():
    """Eleven fixes carry stamps 0.4 s too early, between the others: 4 m ahead of where the car was then."""
    fixes, _, _, gyro = circle(antenna_m=np.zeros(3))
    early = slice(20, 31)
    stamps_us = fixes.stamps_us.copy()
    stamps_us[early] -= 410_000
    order = np.argsort(stamps_us, kind="stable")
    mixed = Fixes(stamps_us[order], fixes.xyz_m[order], fixes.sigma_m[order])
    track = fuse(mixed, Turns(mixed.stamps_us, -gyro[order, 2]), np.zeros(3))
    distrusted = np.sort(order[track.weights < trajectory.DISTRUSTED_WEIGHT])
    assert distrusted.tolist() == list(range(20, 31))
    truth_m = 1000 + 100 * np.sin(0.1 * (track.stamps_us - T0_US) / 1e6)
    assert np.abs(track.xyz_m[:, 0] - truth_m).max() < 0.4


def test_runs_parted_by_a_silence_are_fused_apart_and_leave_it_empty():
    fixes, _, _, gyro = circle()
    keep = np.r_[0:80, 120:200]
    apart = Fixes(fixes.stamps_us[keep], fixes.xyz_m[keep], fixes.sigma_m[keep])
    table, found = trajectory.from_gnss(apart, fixes.stamps_us, gyro, ANTENNA_M, max_gap_us=500_000)
    silent = table.filter(pl.col("stamp_us").is_between(T0_US + 79 * 50_000, T0_US + 120 * 50_000, closed="none"))
    assert silent.is_empty()
    assert len(table) == 160
    assert found == {"yaw_axis": "-z", "num_distrusted": 0, "num_without_heading": 0}


def test_a_car_that_stays_on_the_spot_has_no_pose_because_it_shows_no_heading():
    fixes, _, _, gyro = circle()
    parked = Fixes(fixes.stamps_us, fixes.xyz_m * 0 + np.random.default_rng(1).normal(0, 0.1, (200, 3)), fixes.sigma_m)
    table, found = trajectory.from_gnss(parked, fixes.stamps_us, gyro, ANTENNA_M, 500_000)
    assert table.is_empty()
    assert found["num_without_heading"] == 200


def test_position_and_heading_hold_through_a_stop():
    """10 m/s, brakes by 2 m/s2 to a stop at 7.5 s, stands 5 s: positions scatter, the heading must not."""
    t_s = np.arange(250) / 20
    speed = np.clip(10 - 2 * np.maximum(t_s - 2.5, 0), 0, None)
    way = np.cumsum(speed) / 20
    dice = np.random.default_rng(2)
    xyz_m = np.stack([way, np.zeros(250), np.zeros(250)], -1) + dice.normal(0, 0.1, (250, 3))
    fixes = Fixes(T0_US + np.arange(250) * 50_000, xyz_m, np.full((250, 2), 0.1))
    track = fuse(fixes, Turns(fixes.stamps_us, dice.normal(0, 0.005, 250)), np.zeros(3))
    assert np.degrees(np.abs(track.yaw_rad)).max() < 1.0
    assert np.abs(track.speed_mps[170:]).max() < 0.3


# motion -----------------------------------------------------------------------------------------------------------
def test_motion_is_at_whole_tenths_with_the_acceleration_along_the_way():
    """Speed grows by 1 m/s2 from 5 m/s; the first stamp is 30 ms past a tenth."""
    t_s = np.arange(40) * 0.05
    stamps_us = T0_US + 30_000 + np.arange(40) * 50_000
    table = trajectory.from_odometry(
        stamps_us, np.stack([5 * t_s + t_s**2 / 2, 0 * t_s, 0 * t_s], -1), geometry.yaw_wxyz(np.zeros(40)),
        linear_mps=np.stack([5 + t_s, 0 * t_s, 0 * t_s], -1), angular_radps=np.zeros((40, 3)), T_child_ego=np.eye(4))
    motion = trajectory.motion(table, "d" * 32, 500_000)
    assert motion["stamp_us"].to_list() == [T0_US + k * 100_000 for k in range(1, 20)]
    assert motion["speed_mps"][0] == pytest.approx(5.07)
    assert motion["accel_mps2"].to_numpy() == pytest.approx(1.0)


def test_motion_has_no_rows_in_a_silence_of_the_ego_pose():
    stamps_us = T0_US + np.r_[0:10, 30:40] * 100_000
    x_m = (stamps_us - T0_US) / 1e5
    table = trajectory.from_odometry(
        stamps_us, np.stack([x_m, 0 * x_m, 0 * x_m], -1), geometry.yaw_wxyz(0 * x_m),
        linear_mps=np.ones((20, 3)), angular_radps=np.zeros((20, 3)), T_child_ego=np.eye(4))
    motion = trajectory.motion(table, "d" * 32, 500_000)
    assert ((motion["stamp_us"] - T0_US) // 100_000).to_list() == [*range(10), *range(30, 40)]
