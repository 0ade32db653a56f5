"""What lies beside a video file: its stamps, and its camera's calibration.

A folder is a drive of video files where at least one has its stamps beside it:

    front.mp4                 .mp4 .mov .mkv, or a raw stream (Annex B) .h264 .264 .hevc .h265 .265
    front.timestamps.csv      or .txt: one row a picture, in the order of display
    front.camera_info.yaml    as ROS' camera_calibration writes it; camera_name is the tf frame
    drive.mcap                the other sensors and the ego pose: one bag of any kind, a rosbag2 folder too

Stamps: a single column, or the one whose name begins with stamp, timestamp or time (a # before it is passed over). Its
unit is the end of that name: _s _ms _us _ns; else it is told from seconds since 1970 by the number of digits before the
point: 9 or 10 for s, 12 or 13 for ms, 15 or 16 for us, 18 or 19 for ns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from stages.lib.errors import DataError

RAW = {".h264": "h264", ".264": "h264", ".hevc": "hevc", ".h265": "hevc", ".265": "hevc"}
SUFFIXES = (".mp4", ".mov", ".mkv", *RAW)
STAMPS, CAMERA_INFO = (".timestamps.csv", ".timestamps.txt"), ".camera_info.yaml"
UNITS_US = {"s": Decimal(1_000_000), "ms": Decimal(1000), "us": Decimal(1), "ns": Decimal(1) / 1000}
MAX_US = Decimal(2**32 * 1_000_000)  # what the seconds of a ROS stamp can hold
DIGITS = {9: "s", 10: "s", 12: "ms", 13: "ms", 15: "us", 16: "us", 18: "ns", 19: "ns"}


@dataclass(frozen=True)
class CameraInfo:
    """The fields of sensor_msgs/CameraInfo that count."""

    frame_id: str
    width: int
    height: int
    distortion_model: str
    k: np.ndarray
    d: np.ndarray


def stamps_names(name: str) -> set[str]:
    """What the file of a video's stamps may be called; none where `name` is no video's."""
    path = PurePosixPath(name)
    return {str(path.with_suffix(ending)) for ending in STAMPS} if path.suffix.lower() in SUFFIXES else set()


def stamps_path(video: Path) -> Path | None:
    """The stamps of a video file; None where it is none, or has none beside it."""
    found = [video.with_name(name) for name in sorted(stamps_names(video.name)) if video.with_name(name).is_file()]
    return found[0] if found else None


def videos(folder: Path) -> list[Path]:
    """The video files of a drive folder that have stamps, sorted."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and stamps_path(path)]


def read_stamps(path: Path, name: str) -> list[int]:
    """Stamps [us], one a picture in the order of display. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{name}: is no text in UTF-8; write one row a picture, under the column name stamp_us"
                        ) from None
    rows = [re.split(r"[,;\t ]+", line.strip().lstrip("#").strip()) for line in lines if line.strip()]
    column, unit = 0, None
    if rows and not all(re.match(r"[0-9.+-]", word) for word in rows[0]):
        names = [re.sub(r"[^a-z0-9]+", "_", word.lower()).strip("_") for word in rows.pop(0)]
        found = [number for number, word in enumerate(names) if re.match("stamp|timestamp|time", word)]
        if len(found) != 1:
            raise DataError(f"{name}: {len(found)} of its columns ({', '.join(names)}) are named as stamps are; call "
                            "one of them stamp_us, in microseconds since 1970")
        column = found[0]
        unit = next((end for end in UNITS_US if re.search(f"_{end}(_|$)", "_".join(names[column:column + 2]))), None)
    elif rows and len(rows[0]) > 1:
        raise DataError(f"{name}: has {len(rows[0])} columns without names; write names above, stamp_us one of them")
    if not rows:
        raise DataError(f"{name}: is empty; write one row a picture, under the column name stamp_us")
    try:
        values = [Decimal(row[column]) for row in rows]
    except (InvalidOperation, IndexError):
        raise DataError(f"{name}: holds a row that is no number; write one row a picture, in the order of "
                        "display") from None
    unit = unit or DIGITS.get(values[0].adjusted() + 1)
    if unit is None:
        raise DataError(f"{name}: the unit of its stamps ({values[0]}) is not known; name their column stamp_s, "
                        "stamp_ms, stamp_us or stamp_ns")
    for value in values:
        if not (value.is_finite() and 0 < value < MAX_US / UNITS_US[unit]):
            raise DataError(f"{name}: {value} {unit} is no time from 1970 to 2106; write one row a picture, in the "
                            "order of display")
    return [int(value * UNITS_US[unit]) for value in values]


def read_camera_info(path: Path, name: str) -> CameraInfo:
    """The calibration of a camera. Raises DataError."""
    try:
        row: dict[str, Any] = yaml.safe_load(path.read_text())
        return CameraInfo(str(row["camera_name"]), int(row["image_width"]), int(row["image_height"]),
                          str(row["distortion_model"]), np.array(row["camera_matrix"]["data"], float).reshape(9),
                          np.array(row["distortion_coefficients"]["data"], float).reshape(-1))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: is not a calibration as ROS' camera_calibration writes it "
                        f"({type(error).__name__} {error}): it needs camera_name, image_width, image_height, "
                        "camera_matrix, distortion_model and distortion_coefficients") from None
