"""ingest on real recordings: a car without localization, a highway drive without cameras, a robot's ROS 1 bag."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
import pytest
import yaml
from scipy.spatial import cKDTree

from stages.lib import calibration, cameras, geometry, images
from stages.lib.bag import open_bag
from stages.lib.errors import DataError
from stages.lib.pointcloud import decode
from stages.lib.poses import Poses
from tests.tinydrive import Ingested, collected, with_rig

CONF = Path(__file__).parents[1] / "conf" / "rig"


def radiate_rig() -> dict[str, Any]:
    return yaml.safe_load((CONF / "radiate.yaml").read_text())["radiate"]


def test_real_car_without_localization_gets_poses_from_satellites_and_gyro(real_data, tmp_path):
    drive = Ingested(real_data / "drives/radiate_fog6", tmp_path / "out", radiate_rig(), "radiate")
    start_us, end_us = drive.interval_us
    assert (end_us - start_us) / 1e6 == pytest.approx(3.307, abs=0.001)
    assert drive.facts["yaw_axis"] == "-z"
    assert drive.faults() == {("duplicate", "ego_pose"): 125, ("contradicting_fix", "ego_pose"): 11,
                              ("dropped", "CAM_FRONT"): 1, ("dropped", "CAM_FRONT_RIGHT"): 1}
    inside = drive.table("motion").filter(pl.col("stamp_us").is_between(start_us, end_us))
    assert inside["speed_mps"].min() > 9
    assert inside["speed_mps"].max() < 11.5
    assert inside["accel_mps2"].abs().max() < 2
    assert inside["yaw_rate_radps"].abs().max() < 0.06


def test_real_sweeps_meet_in_the_map(real_data, tmp_path):
    """Walls of sweeps 1 s and 10 m apart: the median distance to the nearest point falls from 0.8 m without poses to
    less than a quarter; from one sweep to the next it is halved, down to what the spacing of points leaves."""
    drive = Ingested(real_data / "drives/radiate_fog6", tmp_path / "out", radiate_rig(), "radiate")
    seen, placed = real_sweeps(real_data / "drives/radiate_fog6", drive)
    assert apart_m(placed, 1) < 0.55 * apart_m(seen, 1)
    assert apart_m(seen, 10) > 0.7
    assert apart_m(placed, 10) < 0.18


def real_sweeps(recording: Path, drive: Ingested) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per sweep the points of walls, off the road and above it, in the ego frame and in the map."""
    sensor = calibration.read(drive.out / "calibration.json")["LIDAR_TOP"]
    index = drive.table("index").filter(pl.col("channel") == "LIDAR_TOP")
    poses = Poses.read(drive.out / "trajectory.parquet").T_map_ego(index["stamp_us"].to_numpy())
    seen, placed = [], []
    with open_bag(recording) as bag:
        for T_map_ego, message in zip(poses, bag.messages([sensor.topic])):
            xyz = decode(bag.decode(message), 0).points[:, :3].astype(float)
            far_m = np.linalg.norm(xyz, axis=1)
            xyz = geometry.apply(sensor.T_ego_sensor, xyz[(far_m > 4) & (far_m < 30)])
            xyz = xyz[(xyz[:, 2] > -1.3) & (np.abs(xyz[:, 1]) > 3)]
            seen.append(xyz)
            placed.append(geometry.apply(T_map_ego, xyz))
    return seen, placed


def apart_m(sweeps: list[np.ndarray], lag: int) -> float:
    """Mean over sweeps of the median distance of a point to the nearest one of the sweep `lag` before."""
    return float(np.mean([np.median(cKDTree(sweeps[k]).query(sweeps[k + lag][::3])[0])
                          for k in range(9, len(sweeps) - lag, 4)]))


def test_real_lidar_and_camera_see_the_oncoming_car_at_the_same_place(real_data, tmp_path):
    """In camera frame 26 and the turn 3 ms after it, the car is 6 m ahead and comes nearer by 22 m/s: 50 ms of clock
    would move its right edge by 35 px or more. There it ends at its right lamp, the brightest spot."""
    recording = real_data / "drives/radiate_fog6"
    drive = Ingested(recording, tmp_path / "out", radiate_rig(), "radiate")
    sensors = calibration.read(drive.out / "calibration.json")
    index, poses = drive.table("index"), Poses.read(drive.out / "trajectory.parquet")
    frame = index.filter(pl.col("channel") == "CAM_FRONT").row(26, named=True)
    turn = index.filter(pl.col("channel") == "LIDAR_TOP").sort((pl.col("stamp_us") - frame["stamp_us"]).abs())
    seen = {"CAM_FRONT": frame, "LIDAR_TOP": turn.row(0, named=True)}
    with open_bag(recording) as bag:
        message = {name: next(bag.messages([sensors[name].topic], row["receive_ns"], row["receive_ns"] + 1))
                   for name, row in seen.items()}
        pixels = images.from_message(bag.decode(message["CAM_FRONT"]))
        points = decode(bag.decode(message["LIDAR_TOP"]), 0).points[:, :3].astype(float)
    T_map = {name: poses.T_map_ego(np.array([row["stamp_us"]]))[0] @ sensors[name].T_ego_sensor
             for name, row in seen.items()}
    x, y, z = geometry.apply(sensors["LIDAR_TOP"].T_ego_sensor, points).T
    car = (x > 4) & (x < 16) & (np.abs(y + 3) < 1.2) & (z > -1.4) & (z < -0.4)
    xyz_cam = geometry.apply(geometry.invert(T_map["CAM_FRONT"]) @ T_map["LIDAR_TOP"], points[car])
    camera = sensors["CAM_FRONT"].camera
    uv_px, _ = cameras.project(xyz_cam, camera.K, camera.D)
    value = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[190:290, 380:560, 2]
    right_lamp_px = 380 + np.flatnonzero((value > 180).any(0)).max()
    assert right_lamp_px == pytest.approx(513, abs=3)
    assert np.percentile(uv_px[:, 0], 98) == pytest.approx(right_lamp_px, abs=8)


def test_real_clock_offset_is_found_with_its_size_where_the_rig_does_not_state_it(real_data, tmp_path):
    values = radiate_rig()
    values["ego_pose"]["clock_offset_us"] = 0
    drive = Ingested(real_data / "drives/radiate_fog6", tmp_path / "out", values, "radiate")
    assert drive.interval_us[0] == drive.interval_us[1]
    (tmp_path / "collected").mkdir()
    out, summary = collected(tmp_path / "collected", drive)
    assert summary.notes == (
        "radiate_fog6: the ego pose's stamps run 64.1 to 66.2 s ahead of the sensors': no usable time; state it in "
        "conf/rig/radiate.yaml: ego_pose.clock_offset_us, from -66183444 to -64118974 (now 0)",)
    assert "64.1 to 66.2 s ahead" in (out.results / "report.html").read_text()


def test_real_truncated_twin_fails_alone_with_a_text_of_one_line(real_data, tmp_path):
    with pytest.raises(DataError, match=r"ends early, at byte 3000000 .*`mcap recover") as caught:
        Ingested(real_data / "bad_inputs/derived/radiate_mcap_truncated", tmp_path / "out", radiate_rig(), "radiate")
    assert len(str(caught.value).splitlines()) == 1


POSE_ONLY = with_rig(channels={}, signals={}, mounts={
    "gps": {"translation_m": [0.0, 0.0, 0.0], "rotation_wxyz": [1.0, 0.0, 0.0, 0.0]},
    "gnss": {"translation_m": [0.0, 0.0, 0.0], "rotation_wxyz": [1.0, 0.0, 0.0, 0.0]}})


def test_real_highway_drive_gives_trajectory_and_signals_though_it_has_no_camera(real_data, tmp_path):
    values = copy.deepcopy(POSE_ONLY)
    values["ego_pose"]["topic"] = "/localization/kinematic_state"
    values["signals"] = {
        "speed_mps": {"topic": "/vehicle/status/velocity_status", "field": "longitudinal_velocity", "scale": 1.0,
                      "clock_offset_us": 0},
        # The field holds the steering wheel's angle; a RAV4's steering ratio is 14.3.
        "steering_tire_angle_rad": {"topic": "/vehicle/status/steering_status", "field": "steering_tire_angle",
                                    "scale": 1 / 14.3, "clock_offset_us": 0}}
    drive = Ingested(real_data / "drives/comma2k19_40", tmp_path / "out", values)
    table, signals = drive.table("trajectory"), drive.table("signals")
    assert len(table) == 1200
    assert drive.interval_us == (1_533_224_092_000_000, 1_533_224_151_949_161)
    assert drive.faults() == {("no_twist", "ego_pose"): 1200}
    assert dict(signals.group_by("signal").len().sort("signal").iter_rows()) == {
        "speed_mps": 4974, "steering_tire_angle_rad": 4974}
    speed = signals.filter(pl.col("signal") == "speed_mps")
    inside = speed.filter(pl.col("stamp_us").is_between(*drive.interval_us))
    by_pose = np.interp(inside["stamp_us"], table["stamp_us"], table["vx_mps"])
    assert np.abs(by_pose - inside["value"].to_numpy()).mean() < 0.3


def test_real_satellite_positions_follow_the_published_localization(real_data, tmp_path):
    """60 s and 1 km of highway: heading within 0.3 degrees, position within 0.5 m (rms, less a constant offset)."""
    values = copy.deepcopy(POSE_ONLY)
    values["ego_pose"]["topic"] = "/localization/kinematic_state"
    published = Ingested(real_data / "drives/comma2k19_40", tmp_path / "published", values).table("trajectory")
    values["ego_pose"] |= {"source": "gnss_imu", "gnss_topic": "/sensing/gnss/fix", "imu_topic": "/sensing/imu/data",
                           "origin_deg": [37.7, -122.4], "max_gap_us": 2_000_000}
    drive = Ingested(real_data / "drives/comma2k19_40", tmp_path / "fused", values)
    assert drive.faults()["no_height", "ego_pose"] == 579
    fused = drive.table("trajectory").filter(pl.col("stamp_us").is_between(*published["stamp_us"].to_numpy()[[0, -1]]))
    xyz_m, rotations_wxyz = Poses.read(tmp_path / "published/trajectory.parquet").at(fused["stamp_us"].to_numpy())
    turned = geometry.yaw_rad(fused.select("qw", "qx", "qy", "qz").to_numpy()) - geometry.yaw_rad(rotations_wxyz)
    assert np.degrees(np.abs(geometry.wrap_rad(turned - np.median(turned)))).max() < 0.4
    apart = fused.select("x_m", "y_m").to_numpy() - xyz_m[:, :2]
    assert np.sqrt(np.mean((apart - np.median(apart, 0))**2)) < 0.5


def test_real_ros1_bag_is_indexed_through_the_same_door(real_data, tmp_path):
    values = copy.deepcopy(POSE_ONLY)
    values["ego_pose"]["topic"] = "/husky_velocity_controller/odom"
    drive = Ingested(real_data / "drives/husky_outdoor.bag", tmp_path / "out", values)
    assert len(drive.table("trajectory")) == 3952
    assert (drive.interval_us[1] - drive.interval_us[0]) / 1e6 == pytest.approx(395, abs=1)
