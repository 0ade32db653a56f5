"""What a candidate scene is like, in numbers that a curation rule can ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from stages.lib.geometry import wrap_rad

STANDING_MPS = 0.5

FEATURES = {
    "duration_s": (pl.Float64, "length of the scene"),
    "distance_m": (pl.Float64, "way driven; those of a drive's scenes add up"),
    "mean_speed_mps": (pl.Float64, "mean speed"),
    "max_speed_mps": (pl.Float64, "highest speed"),
    "min_speed_mps": (pl.Float64, "lowest speed"),
    "stop_ratio": (pl.Float64, f"share of the time below {STANDING_MPS} m/s"),
    "mean_abs_accel_mps2": (pl.Float64, "mean of the absolute acceleration along the way"),
    "max_abs_accel_mps2": (pl.Float64, "highest absolute acceleration along the way"),
    "max_abs_yaw_rate_radps": (pl.Float64, "highest absolute yaw rate"),
    "turn_rad": (pl.Float64, "net change of heading, left positive; a full circle is 2 pi"),
    "max_pose_gap_s": (pl.Float64, "longest time without an ego pose"),
    "num_gaps": (pl.Int64, "silences of any channel that touch the scene"),
    "max_gap_s": (pl.Float64, "longest of them, the part inside the scene; 0 without any"),
    "num_cameras": (pl.Int64, "cameras of the drive"),
    "num_lidars": (pl.Int64, "lidars of the drive"),
    "hour_utc": (pl.Int64, "hour of the day at the start, 0 to 23, UTC"),
    "weekday_utc": (pl.Int64, "day of the week at the start, Monday 1 to Sunday 7, UTC"),
    "rig": (pl.String, "name of the rig"),
    "vehicle": (pl.String, "name of the vehicle"),
    "location": (pl.String, "name of the place"),
    "georeferenced": (pl.Boolean, "equal coordinates in two drives are one place"),
}
"""Feature -> (type, meaning). NULL where the scene has no value, e.g. no pose at all."""


MOTION_FEATURES = ("distance_m", "mean_speed_mps", "max_speed_mps", "min_speed_mps", "stop_ratio",
                   "mean_abs_accel_mps2", "max_abs_accel_mps2", "max_abs_yaw_rate_radps", "turn_rad", "max_pose_gap_s")


def features(scenes: pl.DataFrame, drives: pl.DataFrame, channels: pl.DataFrame, gaps: pl.DataFrame,
             motion: pl.LazyFrame) -> pl.DataFrame:
    """The scenes (SCENES) in their order, with the columns of FEATURES besides.

    drives DRIVES, channels CHANNELS, gaps GAPS; motion: MOTION, a drive's rows together and in order of stamp.
    """
    start_us, end_us = scenes["start_us"], scenes["end_us"]
    begun = pl.from_epoch(start_us, time_unit="us").dt
    sensors = channels.group_by("drive_token").agg(
        (pl.col("modality") == "camera").sum().alias("num_cameras"),
        (pl.col("modality") == "lidar").sum().alias("num_lidars"))
    table = scenes.with_columns(
        ((end_us - start_us) / 1e6).alias("duration_s"), begun.hour().alias("hour_utc"),
        begun.weekday().alias("weekday_utc"), *_motion_features(scenes, motion))
    table = table.join(drives.select("drive_token", "rig", "vehicle", "location", "georeferenced"),
                       on="drive_token", how="left", maintain_order="left")
    table = table.join(sensors, on="drive_token", how="left", maintain_order="left")
    table = table.join(_gap_features(scenes, gaps), on="scene_token", how="left", maintain_order="left")
    counts = pl.col("num_gaps", "max_gap_s", "num_cameras", "num_lidars")
    return table.with_columns(counts.fill_null(0)).select(
        *scenes.columns, *(pl.col(name).cast(dtype) for name, (dtype, _) in FEATURES.items()))


@dataclass(frozen=True)
class Rows:
    """Some scenes and their drives' rows of motion.

    scene     (S,) int64, rows of the scenes table
    begin     (S,) int64: a scene's own rows are [begin, end) of the columns; those of its drive are [first, last),
              first == last where motion has none
    columns   name -> values
    """

    scene: np.ndarray
    first: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    last: np.ndarray
    columns: dict[str, np.ndarray]


def rows_of(scenes: pl.DataFrame, motion: pl.LazyFrame, columns: list[str], num_rows: int = 1 << 20) -> Iterator[Rows]:
    """All scenes, in pieces of about num_rows rows of motion (160,000 scenes have 32 million), whole drives each."""
    token = pl.col("drive_token")
    runs = motion.select(token).with_row_index("first").filter(token.ne_missing(token.shift(1))).collect()
    if runs["drive_token"].is_duplicated().any():
        raise ValueError("motion: the rows of a drive do not stand together")
    length = motion.select(pl.len()).collect().item()
    runs = runs.cast({"first": pl.Int64}).with_columns(last=pl.col("first").shift(-1, fill_value=length))
    mine = scenes.select("drive_token").join(runs, on="drive_token", how="left", maintain_order="left").fill_null(0)
    first, last = mine["first"].to_numpy(), mine["last"].to_numpy()
    start_us, end_us = scenes["start_us"].to_numpy(), scenes["end_us"].to_numpy()
    piece = first // num_rows
    for number in np.unique(piece):
        scene = np.flatnonzero(piece == number)
        low, high = first[scene].min(), last[scene].max()
        table = motion.select("stamp_us", *columns).slice(low, high - low).collect()
        values = {name: table[name].to_numpy() for name in table.columns}
        bounds = first[scene] - low, last[scene] - low
        yield Rows(scene, bounds[0], _first_not_before(values["stamp_us"], *bounds, start_us[scene]),
                   _first_not_before(values["stamp_us"], *bounds, end_us[scene]), bounds[1], values)


def _first_not_before(stamps_us: np.ndarray, low: np.ndarray, high: np.ndarray, at_us: np.ndarray) -> np.ndarray:
    """(S,): the first row in [low, high) with a stamp >= at_us, else high: one bisection for all scenes at once."""
    while (undecided := low < high).any():
        middle = (low + high) // 2
        before = undecided & (stamps_us[np.minimum(middle, len(stamps_us) - 1)] < at_us)
        low, high = np.where(before, middle + 1, low), np.where(undecided & ~before, middle, high)
    return low


def _motion_features(scenes: pl.DataFrame, motion: pl.LazyFrame) -> list[pl.Series]:
    columns = ["x_m", "y_m", "yaw_rad", "speed_mps", "accel_mps2", "yaw_rate_radps"]
    start_us, end_us = scenes["start_us"].to_numpy(), scenes["end_us"].to_numpy()
    values = {name: np.full(len(scenes), np.nan) for name in MOTION_FEATURES}
    for rows in rows_of(scenes, motion, columns):
        for name, column in _features_of(rows, start_us[rows.scene], end_us[rows.scene]).items():
            values[name][rows.scene] = column
    return [pl.Series(name, column, nan_to_null=True) for name, column in values.items()]


def _features_of(rows: Rows, start_us: np.ndarray, end_us: np.ndarray) -> dict[str, np.ndarray]:
    """A step leads from a row to the next of its drive and belongs to the scene of the row that it leaves."""
    of, begin, end = rows.columns, rows.begin, rows.end
    step_end = np.minimum(end, np.maximum(rows.last - 1, begin))

    def mean(values: np.ndarray) -> np.ndarray:
        known = np.isfinite(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            return _over(np.add, np.where(known, values, 0), begin, end) / _over(np.add, known, begin, end)

    speed, accel = of["speed_mps"], np.abs(of["accel_mps2"])
    step_m = np.sqrt(np.diff(of["x_m"]) ** 2 + np.diff(of["y_m"]) ** 2)
    head_us = _over(np.fmin, of["stamp_us"], begin, end) - start_us
    tail_us = end_us - _over(np.fmax, of["stamp_us"], begin, end)
    inner_us = _over(np.fmax, np.diff(of["stamp_us"]), begin, np.maximum(end - 1, begin))
    gap_us = np.fmax(np.fmax(head_us, tail_us), inner_us)
    return {
        "max_pose_gap_s": np.where(np.isnan(gap_us), end_us - start_us, gap_us) / 1e6,
        "distance_m": _over(np.add, step_m, begin, step_end),
        "mean_speed_mps": mean(speed),
        "max_speed_mps": _over(np.fmax, speed, begin, end),
        "min_speed_mps": _over(np.fmin, speed, begin, end),
        "stop_ratio": mean(np.where(np.isfinite(speed), speed < STANDING_MPS, np.nan)),
        "mean_abs_accel_mps2": mean(accel),
        "max_abs_accel_mps2": _over(np.fmax, accel, begin, end),
        "max_abs_yaw_rate_radps": _over(np.fmax, np.abs(of["yaw_rate_radps"]), begin, end),
        "turn_rad": _over(np.add, wrap_rad(np.diff(of["yaw_rad"])), begin, step_end)}


def _over(ufunc: np.ufunc, values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(S,): ufunc over values[begin:end] of each scene, NaN where that is empty."""
    result = np.full(len(begin), np.nan)
    filled = end > begin
    if filled.any():
        pairs = np.stack([begin[filled], end[filled]], 1).ravel()
        result[filled] = ufunc.reduceat(np.append(values.astype(float), 0.0), pairs)[::2]
    return result


def _gap_features(scenes: pl.DataFrame, gaps: pl.DataFrame) -> pl.DataFrame:
    begin, end = pl.max_horizontal("start_us", "start_us_gap"), pl.min_horizontal("end_us", "end_us_gap")
    return (scenes.select("scene_token", "drive_token", "start_us", "end_us")
            .join(gaps, on="drive_token", suffix="_gap").filter(begin < end)
            .group_by("scene_token").agg(pl.len().alias("num_gaps"), ((end - begin).max() / 1e6).alias("max_gap_s")))
