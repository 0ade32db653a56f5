"""Tables as Parquet, with the columns of each kind in one place, and tokens.

Units are in the names. Poses are seven columns: x_m y_m z_m qw qx qy qz. Stamps are int64 µs since the Unix epoch.
Tokens are 32 hex digits of a sha256 over what the row is, never chance.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import polars as pl

from stages.lib import footer
from stages.lib.errors import DataError

# Values that a table may hold: so many, and so many more for each of its bytes. Ours have 2 a byte at most (regular
# stamps of one signal); a list of one number over and over has 10,000.
MAX_VALUES, MAX_VALUES_PER_BYTE = 2**24, 16

POSE = {"x_m": pl.Float64, "y_m": pl.Float64, "z_m": pl.Float64,
        "qw": pl.Float64, "qx": pl.Float64, "qy": pl.Float64, "qz": pl.Float64}

# ingest, per drive -------------------------------------------------------------------------------------------------
# One row per sensor message; a turn of single packets is one, its last. stamp_us: sensor time after the rig's clock
# offset. receive_ns and seq find the message in the recording: the bag's receive time, and its ordinal among its
# topic's messages of that same receive time (0 but for twins), so that a reader which seeks there finds it without
# counting from the start. decode_from_ns: receive time of the message at which decoding must begin: of video, the last
# key frame before; of a turn of single packets, one before its first; of all else, its own.
INDEX = {"channel": pl.String, "stamp_us": pl.Int64, "receive_ns": pl.Int64, "seq": pl.Int64, "bytes": pl.Int64,
         "decode_from_ns": pl.Int64}
# T_map_ego over time, stamps strictly increasing; velocity in the ego frame.
TRAJECTORY = {"stamp_us": pl.Int64, **POSE, "vx_mps": pl.Float64, "vy_mps": pl.Float64, "yaw_rate_radps": pl.Float64}
# Vehicle signals, long form: speed_mps, steering_tire_angle_rad, accel_x_mps2, …
SIGNALS = {"stamp_us": pl.Int64, "signal": pl.String, "value": pl.Float64}

# ingest, all drives ------------------------------------------------------------------------------------------------
# [start_us, end_us): where the ego pose and every required channel are known.
DRIVES = {"drive_token": pl.String, "drive_name": pl.String, "recording_digest": pl.String, "rig": pl.String,
          "vehicle": pl.String, "location": pl.String, "georeferenced": pl.Boolean,
          "start_us": pl.Int64, "end_us": pl.Int64}
CHANNELS = {"drive_token": pl.String, "channel": pl.String, "modality": pl.String, "topic": pl.String,
            "rate_hz": pl.Float64, "num_messages": pl.Int64, "num_duplicate": pl.Int64, "num_backward": pl.Int64,
            "num_dropped": pl.Int64, "max_gap_us": pl.Int64}
# Silences of a channel longer than the rig allows.
GAPS = {"drive_token": pl.String, "channel": pl.String, "start_us": pl.Int64, "end_us": pl.Int64}
# The trajectory at 10 Hz, for features and places.
MOTION = {"drive_token": pl.String, "stamp_us": pl.Int64, "x_m": pl.Float64, "y_m": pl.Float64, "yaw_rad": pl.Float64,
          "speed_mps": pl.Float64, "accel_mps2": pl.Float64, "yaw_rate_radps": pl.Float64}

# curate and split --------------------------------------------------------------------------------------------------
# curate's scenes.parquet has these and the features; its dropped.parquet has `rule` besides.
SCENES = {"scene_token": pl.String, "scene_name": pl.String, "drive_token": pl.String, "drive_name": pl.String,
          "start_us": pl.Int64, "end_us": pl.Int64}
# group: which scenes a worker takes together (neighbours in one recording).
SPLIT = {**SCENES, "split": pl.String, "group": pl.Int64}

# sample, per scene: the nuScenes tables of record ------------------------------------------------------------------
SAMPLE = {"token": pl.String, "stamp_us": pl.Int64, "scene_token": pl.String, "prev": pl.String, "next": pl.String}
SAMPLE_DATA = {"token": pl.String, "sample_token": pl.String, "ego_pose_token": pl.String,
               "calibrated_sensor_token": pl.String, "scene_token": pl.String, "channel": pl.String,
               "stamp_us": pl.Int64, "is_key_frame": pl.Boolean, "fileformat": pl.String, "filename": pl.String,
               "width_px": pl.Int64, "height_px": pl.Int64, "prev": pl.String, "next": pl.String,
               "pack_digest": pl.String, "offset": pl.Int64, "bytes": pl.Int64}
EGO_POSE = {"token": pl.String, "stamp_us": pl.Int64, **POSE}
# T_ego_sensor; camera_intrinsic: nine numbers row by row of the saved image, empty for other sensors;
# camera_distortion: what is left in the saved image (empty once undistorted).
CALIBRATED_SENSOR = {"token": pl.String, "scene_token": pl.String, "channel": pl.String, "modality": pl.String, **POSE,
                     "camera_intrinsic": pl.List(pl.Float64), "camera_distortion": pl.List(pl.Float64)}

# labels ------------------------------------------------------------------------------------------------------------
# A box in the map frame: centre, size, yaw about +z. source: human, truth, geometric, or model:<name>@<digest>.
# Velocity is NaN where unknown; score is 1 for human and truth. num_lidar_pts: points of the key frame inside the box.
BOXES = {"sample_token": pl.String, "stamp_us": pl.Int64, "track_id": pl.String, "category": pl.String,
         "x_m": pl.Float64, "y_m": pl.Float64, "z_m": pl.Float64,
         "length_m": pl.Float64, "width_m": pl.Float64, "height_m": pl.Float64, "yaw_rad": pl.Float64,
         "vx_mps": pl.Float64, "vy_mps": pl.Float64, "score": pl.Float64, "source": pl.String,
         "num_lidar_pts": pl.Int64}


def frame(rows: list[dict] | dict, schema: dict) -> pl.DataFrame:
    """A table with exactly the schema's columns, in its order."""
    return pl.DataFrame(rows, schema=schema)


def write(table: pl.DataFrame, path: Path) -> None:
    """Parquet with the same bytes for the same table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(path, compression="zstd", statistics=True)


def read(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """A table written by `write`. Raises DataError where the file is not one, or holds more than its size allows."""
    check(path)
    try:
        return pl.read_parquet(path, columns=columns)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path}: not a readable Parquet table: {error}") from None


def scan(path: Path) -> pl.LazyFrame:
    """The same, read as far as is asked for later. Raises DataError where the file is no Parquet, or holds too much."""
    check(path)
    return pl.scan_parquet(path)


def check(path: Path) -> None:
    """Raises DataError where the file is no Parquet, or declares more values than one of its size can need."""
    try:
        num_bytes, num_values = path.stat().st_size, footer.num_values(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet table: {error}") from None
    if num_values > MAX_VALUES + MAX_VALUES_PER_BYTE * num_bytes:
        raise DataError(f"{path}: {num_bytes} bytes that declare {num_values} values are not a table of this program\n"
                        "  make it again with the stage that wrote it: `dvc repro -f STAGE`")


def token(*what: str | int) -> str:
    """32 hex digits that stand for this tuple of names and integers."""
    return hashlib.sha256("\x1f".join(map(str, what)).encode()).hexdigest()[:32]
