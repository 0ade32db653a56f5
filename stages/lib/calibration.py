"""A drive's calibration, as `calibration.json` keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.lib import documents


@dataclass(frozen=True)
class CameraModel:
    """Pinhole intrinsics and lens distortion of the raw image, as ROS names them.

    model  plumb_bob, rational_polynomial or equidistant
    K      (3, 3) [px]
    D      (n,) in OpenCV's order
    """

    model: str
    width_px: int
    height_px: int
    K: np.ndarray
    D: np.ndarray


@dataclass(frozen=True)
class Video:
    """What a decoder must know of a camera's video beforehand.

    codec    h264 or hevc
    headers  the parameter sets at its first key frame, Annex B
    """

    codec: str
    headers: bytes


@dataclass(frozen=True)
class Sensor:
    """Where a sensor sits, and how it sees. T_ego_sensor (4, 4); camera is None for other sensors, video for those and
    for cameras that send single images.

    clock_offset_us  the rig's: added to the sensor's own stamps, and to those of its points, to reach the common clock
    required         the rig's: a key frame without this channel is none
    """

    channel: str
    modality: str
    topic: str
    frame_id: str
    T_ego_sensor: np.ndarray
    camera: CameraModel | None
    clock_offset_us: int
    required: bool
    video: Video | None = None


def write(sensors: dict[str, Sensor], path: Path) -> None:
    """calibration.json: channel -> sensor, canonical JSON."""
    rows = {}
    for channel, sensor in sorted(sensors.items()):
        camera = sensor.camera and {
            "model": sensor.camera.model, "width_px": sensor.camera.width_px, "height_px": sensor.camera.height_px,
            "K": sensor.camera.K.tolist(), "D": sensor.camera.D.tolist()}
        rows[channel] = {"modality": sensor.modality, "topic": sensor.topic, "frame_id": sensor.frame_id,
                         "T_ego_sensor": sensor.T_ego_sensor.tolist(), "camera": camera,
                         "clock_offset_us": sensor.clock_offset_us, "required": sensor.required,
                         "video": sensor.video and {"codec": sensor.video.codec, "headers": sensor.video.headers.hex()}}
    path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def read(path: Path) -> dict[str, Sensor]:
    """Channel -> Sensor from calibration.json. Raises DataError where the file is no JSON of a bearable size."""
    sensors = {}
    for channel, row in documents.read(path, "`dvc repro -f ingest` makes it again").items():
        camera = row["camera"] and CameraModel(
            row["camera"]["model"], row["camera"]["width_px"], row["camera"]["height_px"],
            np.array(row["camera"]["K"], float), np.array(row["camera"]["D"], float))
        video = row["video"] and Video(row["video"]["codec"], bytes.fromhex(row["video"]["headers"]))
        sensors[channel] = Sensor(channel, row["modality"], row["topic"], row["frame_id"],
                                  np.array(row["T_ego_sensor"], float), camera, row["clock_offset_us"],
                                  row["required"], video)
    return sensors
