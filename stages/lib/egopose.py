"""The ego trajectory that a rig asks for, from what one pass over a recording found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from stages.lib import clocks, drivelog, geodesy, geometry, trajectory
from stages.lib.drivelog import DriveLog, Read
from stages.lib.errors import DataError
from stages.lib.frames import Frames
from stages.lib.fusion import Fixes
from stages.lib.rig import EgoPose

MAX_FROM_ORIGIN_M = 100_000  # float32 readers keep 8 mm there
MAX_HEIGHT_M = 20_000
STILL = 1e-3  # m/s, rad/s: poses that change no faster do not contradict a velocity of 0
UNKNOWN_SIGMA_M = (1.0, 2.0)  # of what a receiver does not know; within seconds its errors are one error
TYPES = {"odometry": "nav_msgs/msg/Odometry", "gnss": "sensor_msgs/msg/NavSatFix", "imu": "sensor_msgs/msg/Imu"}
READERS: dict[str, Read] = {"odometry": drivelog.odometry, "gnss": drivelog.fix, "imu": drivelog.gyro}


Fault = tuple[str, str, int, str]
"""What is wrong, topic, how often, and what was done about it."""


@dataclass(frozen=True)
class EgoTrajectory:
    """table TRAJECTORY in the rig's clock; yaw_axis: the gyro's axis that was found to turn as the car does."""

    table: pl.DataFrame
    faults: tuple[Fault, ...]
    yaw_axis: str | None = None


def topics(source: EgoPose) -> dict[str, str]:
    """Role ("odometry", "gnss", "imu") -> topic of what the ego pose is made of."""
    if source.source == "odometry":
        return {"odometry": source.topic}
    return {"gnss": source.gnss_topic} | ({"imu": source.imu_topic} if source.imu_topic else {})


def ego_trajectory(source: EgoPose, log: DriveLog, where: Frames, ego_frame: str, drive: str) -> EgoTrajectory:
    """The trajectory, with what was left out. where: the frames of recording and rig.

    Raises DataError for a frame that is not joined to the ego frame and for positions far from the rig's origin.
    """
    faults: list[Fault] = []
    if source.source == "odometry":
        stamps_us, rows = _rows(source, log, "odometry", faults)
        child = log.first[source.topic].child_frame_id or ego_frame
        T_child_ego = geometry.invert(where.T_ego(ego_frame, child, source.topic, drive))
        velocities = [rows[:, 7:10], rows[:, 10:]]
        for number, derived in enumerate(trajectory.twist(stamps_us, rows[:, :3], rows[:, 3:7])):
            if not velocities[number].any() and np.abs(derived).max(initial=0) > STILL:
                faults.append(("no_twist", source.topic, len(rows),
                               f"{('linear', 'angular')[number]} velocity is 0 throughout; taken from the poses"))
                velocities[number] = derived
        table = trajectory.from_odometry(stamps_us, rows[:, :3], rows[:, 3:7], linear_mps=velocities[0],
                                         angular_radps=velocities[1], T_child_ego=T_child_ego)
        return EgoTrajectory(table, tuple(faults))
    height_m = log.values["gnss"][:, 3]
    if not np.any(np.abs(height_m) < MAX_HEIGHT_M):
        faults.append(("no_height", source.gnss_topic, len(height_m), f"altitude {height_m[0]:g} m is none; 0 instead"))
        height_m[:] = 0
    stamps_us, rows = _rows(source, log, "gnss", faults)
    xy_m = geodesy.grid_m(rows[:, 1], rows[:, 2], source.origin_deg)
    far_m = float(np.hypot(*xy_m.T).max(initial=0))
    if far_m > MAX_FROM_ORIGIN_M:
        raise DataError(f"{drive}: {source.gnss_topic} is {far_m / 1e3:.0f} km from the origin of the map, "
                        f"{source.origin_deg}\n  set ego_pose.origin_deg near "
                        f"[{rows[0, 1]:.2f}, {rows[0, 2]:.2f}] in a rig of that location")
    sigma_m = np.sqrt(rows[:, 4:6])
    sigma_m = np.where(np.isnan(sigma_m), UNKNOWN_SIGMA_M, sigma_m)
    antenna = log.first[source.gnss_topic].header.frame_id
    T_ego_antenna = where.T_ego(ego_frame, antenna, source.gnss_topic, drive)
    imu_us, gyro_radps = np.zeros(0, np.int64), np.zeros((0, 3))
    if source.imu_topic in log.arrivals:
        imu_us, gyro_radps = _rows(source, log, "imu", faults)
    table, found = trajectory.from_gnss(Fixes(stamps_us, np.column_stack([xy_m, rows[:, 3]]), sigma_m), imu_us,
                                        gyro_radps, T_ego_antenna[:3, 3], source.max_gap_us)
    faults += _fusion_faults(source, found)
    return EgoTrajectory(table, tuple(faults), found["yaw_axis"])


def _fusion_faults(source: EgoPose, found: dict[str, Any]) -> list[Fault]:
    faults = []
    if found["num_distrusted"]:
        faults.append(("contradicting_fix", source.gnss_topic, found["num_distrusted"],
                       "others around contradict them (a clock set back, a reflection); not believed"))
    if found["num_without_heading"]:
        faults.append(("no_heading", source.gnss_topic, found["num_without_heading"],
                       "a run of positions that stays on the spot shows no heading and gives no pose"))
    if source.imu_topic and not found["yaw_axis"]:
        faults.append(("gyro_unused", source.imu_topic, 1, "no axis of the gyro turns as the course does"))
    return faults


def _rows(source: EgoPose, log: DriveLog, role: str, faults: list[Fault]
          ) -> tuple[np.ndarray, np.ndarray]:
    """Strictly increasing stamps [µs] (N,) in the rig's clock and rows (N, k); what is left out goes to faults."""
    topic = topics(source)[role]
    stamps_us, rows = log.arrivals[topic].sensor_us + source.clock_offset_us, log.values[role]
    finite = np.isfinite(rows[:, :4]).all(1)
    usable = finite
    if role == "odometry":
        usable = finite = np.isfinite(rows).all(1) & (np.abs(np.linalg.norm(rows[:, 3:7], axis=1) - 1) < 0.01)
    elif role == "gnss":
        finite &= np.abs(rows[:, 3]) < MAX_HEIGHT_M
        usable = finite & (rows[:, 0] >= 0)
    kept = clocks.increasing(stamps_us[usable])
    for fault, count, detail in (
            ("not_finite", int((~finite).sum()), "values that are no numbers or no rotation; left out"),
            ("no_fix", int((finite & ~usable).sum()), "the receiver had no fix; left out"),
            ("duplicate", kept.num_duplicate, "stamp seen before; the first message stays"),
            ("backward", kept.num_backward, "stamp out of order; the fewest are left out")):
        if count:
            faults.append((fault, topic, count, detail))
    return stamps_us[usable][kept.keep], rows[usable][kept.keep]
