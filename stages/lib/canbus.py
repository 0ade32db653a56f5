"""The nuScenes CAN bus expansion: `can_bus/<scene>_<message>.json`, of what the recordings hold and nothing else.

Format: nuscenes-devkit, python-sdk/nuscenes/can_bus/README.md. Written are

    pose                the ego trajectory as recorded; keys in nuScenes' order, which BEVFormer reads by position.
                        accel: the vehicle's acceleration from its velocity, without gravity;
                        rotation_rate: about z alone
    steeranglefeedback  where the signal steering_wheel_angle_rad was recorded
    vehicle_monitor     twice a second where speed_mps was recorded: vehicle_speed [km/h]
    signals             no nuScenes message: every signal under its own name, with its own stamps
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stages.lib import tables

MONITOR_PERIOD_US = 500_000
POSE_KEYS = ("accel", "orientation", "pos", "rotation_rate", "utime", "vel")


def write(dataset: Path, names: Mapping[str, str], folder: Path) -> None:
    """The files of the scenes in `names` (scene token -> name of the scene in the files).

    dataset  has trajectory.parquet and signals.parquet: TRAJECTORY and SIGNALS with a column scene_token, by scene
    """
    folder.mkdir()
    for table, messages in (("trajectory", _pose_messages), ("signals", _signal_messages)):
        rows = tables.scan(dataset / f"{table}.parquet")
        bounds = rows.select("scene_token").with_row_index("row").group_by("scene_token").agg(
            pl.col("row").min().alias("first"), pl.len().alias("num")).collect()
        for token, first, num in bounds.sort("first").iter_rows():
            if token in names:
                for message, content in messages(rows.slice(first, num).collect()).items():
                    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
                    (folder / f"{names[token]}_{message}.json").write_text(text + "\n")


def _pose_messages(rows: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    known = rows.drop_nans(["vx_mps", "vy_mps", "yaw_rate_radps"])
    return {"pose": pose(known)} if known.height > 1 else {}


def pose(trajectory: pl.DataFrame) -> list[dict[str, Any]]:
    """The messages of a TRAJECTORY of two rows or more, with keys in nuScenes' order."""
    time_s = (trajectory["stamp_us"] - trajectory["stamp_us"][0]).to_numpy() / 1e6
    vx, vy, rate = (trajectory[name].to_numpy() for name in ("vx_mps", "vy_mps", "yaw_rate_radps"))
    zero = np.zeros_like(vx)
    accel_x = np.gradient(vx, time_s) - rate * vy
    accel_y = np.gradient(vy, time_s) + rate * vx
    columns = {"accel": (accel_x, accel_y, zero),
               "orientation": [trajectory[name].to_numpy() for name in ("qw", "qx", "qy", "qz")],
               "pos": [trajectory[name].to_numpy() for name in ("x_m", "y_m", "z_m")],
               "rotation_rate": (zero, zero, rate), "utime": trajectory["stamp_us"].to_list(), "vel": (vx, vy, zero)}
    values = {key: column if key == "utime" else np.column_stack(column).tolist() for key, column in columns.items()}
    return [dict(zip(POSE_KEYS, row)) for row in zip(*(values[key] for key in POSE_KEYS))]


def _signal_messages(rows: pl.DataFrame) -> dict[str, Any]:
    signals = {name[0]: part.sort("stamp_us") for name, part in
               rows.drop_nans("value").partition_by("signal", as_dict=True).items()}
    messages: dict[str, Any] = {"signals": {
        name: {"utime": part["stamp_us"].to_list(), "value": part["value"].to_list()}
        for name, part in sorted(signals.items())}}
    if "steering_wheel_angle_rad" in signals:
        wheel = signals["steering_wheel_angle_rad"].select("stamp_us", "value").iter_rows()
        messages["steeranglefeedback"] = [{"utime": stamp_us, "value": value} for stamp_us, value in wheel]
    if "speed_mps" in signals:
        speed = signals["speed_mps"].filter((pl.col("stamp_us") // MONITOR_PERIOD_US).is_first_distinct())
        messages["vehicle_monitor"] = [{"utime": stamp_us, "vehicle_speed": value * 3.6}
                                       for stamp_us, value in speed.select("stamp_us", "value").iter_rows()]
    return messages
