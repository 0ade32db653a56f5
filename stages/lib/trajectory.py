"""The ego trajectory of a drive (tables.TRAJECTORY), from odometry or from satellite positions and a gyro."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy.spatial.transform import Rotation

from stages.lib import fusion, geometry, tables
from stages.lib.fusion import Fixes, Turns
from stages.lib.poses import Poses

MOTION_STEP_US = 100_000
DISTRUSTED_WEIGHT = 0.1


def from_odometry(stamps_us: np.ndarray, xyz_m: np.ndarray, rotations_wxyz: np.ndarray, *, linear_mps: np.ndarray,
                  angular_radps: np.ndarray, T_child_ego: np.ndarray) -> pl.DataFrame:
    """TRAJECTORY from the fields of nav_msgs/Odometry.

    stamps_us (N,) int64 strictly increasing; xyz_m (N, 3) and rotations_wxyz (N, 4): the child frame in the map;
    linear_mps, angular_radps (N, 3): its twist, in the child frame; T_child_ego (4, 4): the ego frame in the child's.
    """
    to_map = geometry.rotation(rotations_wxyz)
    from_child = Rotation.from_matrix(T_child_ego[:3, :3]).inv()
    velocity_mps = from_child.apply(linear_mps + np.cross(angular_radps, T_child_ego[:3, 3]))
    yaw_rate_radps = from_child.apply(angular_radps)[:, 2]
    return _table(stamps_us, xyz_m + to_map.apply(T_child_ego[:3, 3]), to_map * from_child.inv(),
                  velocity_mps[:, :2], yaw_rate_radps)


def twist(stamps_us: np.ndarray, xyz_m: np.ndarray, rotations_wxyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(linear [m/s] (N, 3), angular [rad/s] (N, 3)) velocity in the moving frame, by differences of its poses."""
    if len(stamps_us) < 2:
        return np.zeros((len(stamps_us), 3)), np.zeros((len(stamps_us), 3))
    since_s = (stamps_us - stamps_us[0]) / 1e6
    rotations = geometry.rotation(rotations_wxyz)
    step_radps = (rotations[:-1].inv() * rotations[1:]).as_rotvec() / np.diff(since_s)[:, None]
    turning = np.vstack([step_radps[:1], (step_radps[:-1] + step_radps[1:]) / 2, step_radps[-1:]])
    return rotations.inv().apply(np.gradient(xyz_m, since_s, axis=0)), turning


def from_gnss(fixes: Fixes, imu_us: np.ndarray, gyro_radps: np.ndarray, antenna_m: np.ndarray, max_gap_us: int
              ) -> tuple[pl.DataFrame, dict[str, int | str | None]]:
    """(TRAJECTORY, what was found) from satellite positions and a gyro whose axes need not be known.

    imu_us (M,) int64 strictly increasing, gyro_radps (M, 3), both may be empty; antenna_m (3,) in the ego frame.
    Runs of fixes that are parted by more than max_gap_us are fused one by one. Found: `yaw_axis` of the gyro (None: not
    used), `num_distrusted` fixes that contradict the others, `num_without_heading` fixes in runs that show none.
    """
    axis = fusion.yaw_axis(fixes, imu_us, gyro_radps)
    turns = Turns(imu_us[:0], np.zeros(0))
    if axis:
        column, sign = fusion.AXES[axis]
        turns = Turns(imu_us, sign * gyro_radps[:, column])
    found = {"yaw_axis": axis, "num_distrusted": 0, "num_without_heading": 0}
    parts = []
    for run in np.split(np.arange(len(fixes.stamps_us)), np.flatnonzero(np.diff(fixes.stamps_us) > max_gap_us) + 1):
        track = fusion.fuse(Fixes(fixes.stamps_us[run], fixes.xyz_m[run], fixes.sigma_m[run]), turns, antenna_m)
        if track is None:
            found["num_without_heading"] += len(run)
            continue
        found["num_distrusted"] += int((track.weights < DISTRUSTED_WEIGHT).sum())
        level = np.zeros(len(track.stamps_us))
        rotations = Rotation.from_euler("ZYX", np.stack([track.yaw_rad, track.pitch_rad, level], -1))
        parts.append(_table(track.stamps_us, track.xyz_m, rotations, np.stack([track.speed_mps, level], -1),
                            track.yaw_rate_radps))
    return pl.concat(parts) if parts else tables.frame([], tables.TRAJECTORY), found


def motion(trajectory: pl.DataFrame, drive_token: str, max_gap_us: int) -> pl.DataFrame:
    """MOTION: the trajectory at whole tenths of a second, none in silences longer than max_gap_us."""
    stamps_us = trajectory["stamp_us"].to_numpy()
    poses = Poses(stamps_us, trajectory.select("x_m", "y_m", "z_m").to_numpy(),
                  trajectory.select("qw", "qx", "qy", "qz").to_numpy())
    if len(stamps_us) < 2:
        return tables.frame([], tables.MOTION)
    at_us = np.arange(-(-stamps_us[0] // MOTION_STEP_US), stamps_us[-1] // MOTION_STEP_US + 1) * MOTION_STEP_US
    at_us = at_us[poses.covered(at_us, at_us, max_gap_us)]
    if not len(at_us):
        return tables.frame([], tables.MOTION)
    xyz_m, rotations_wxyz = poses.at(at_us)
    speed_mps = np.hypot(trajectory["vx_mps"].to_numpy(), trajectory["vy_mps"].to_numpy())
    speed_mps, yaw_rate_radps = (np.interp(at_us - stamps_us[0], stamps_us - stamps_us[0], values)
                                 for values in (speed_mps, trajectory["yaw_rate_radps"].to_numpy()))
    accel_mps2 = np.gradient(speed_mps, (at_us - at_us[0]) / 1e6) if len(at_us) > 1 else np.zeros(1)
    return tables.frame({"drive_token": [drive_token] * len(at_us), "stamp_us": at_us, "x_m": xyz_m[:, 0],
                         "y_m": xyz_m[:, 1], "yaw_rad": geometry.yaw_rad(rotations_wxyz), "speed_mps": speed_mps,
                         "accel_mps2": accel_mps2, "yaw_rate_radps": yaw_rate_radps}, tables.MOTION)


def _table(stamps_us: np.ndarray, xyz_m: np.ndarray, rotations: Rotation, velocity_mps: np.ndarray,
           yaw_rate_radps: np.ndarray) -> pl.DataFrame:
    values = np.column_stack([xyz_m, geometry.wxyz(rotations), velocity_mps, yaw_rate_radps])
    names = list(tables.TRAJECTORY)[1:]
    return tables.frame({"stamp_us": stamps_us, **dict(zip(names, values.T))}, tables.TRAJECTORY)
