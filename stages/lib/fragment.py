"""A scene's fragment of the nuScenes tables: SAMPLE, SAMPLE_DATA, EGO_POSE and CALIBRATED_SENSOR of `lib.tables`.

All tokens follow from the scene's token, channels and stamps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from stages.lib import geometry, keyframes, tables
from stages.lib.calibration import Sensor
from stages.lib.cameras import Rectifier
from stages.lib.poses import Poses

# modality -> fileformat, ending of the file name
FORMATS = {"camera": ("jpg", "jpg"), "lidar": ("pcd", "pcd.bin")}


def member_name(drive_name: str, sensor: Sensor, stamp_us: int, is_key_frame: bool) -> str:
    """Where nuScenes keeps the frame: samples/CAM_FRONT/<drive>__CAM_FRONT__<stamp_us>.jpg; sweeps/ for the others."""
    drive, channel, folder = drive_name.replace("/", "-"), sensor.channel, "samples" if is_key_frame else "sweeps"
    return f"{folder}/{channel}/{drive}__{channel}__{stamp_us}.{FORMATS[sensor.modality][1]}"


def samples(scene_token: str, sample_us: np.ndarray) -> pl.DataFrame:
    """SAMPLE of key frames at sample_us (S,) int64, ascending."""
    tokens = [tables.token("sample", scene_token, stamp_us) for stamp_us in sample_us.tolist()]
    return tables.frame({"token": tokens, "stamp_us": sample_us, "scene_token": [scene_token] * len(tokens),
                         "prev": ["", *tokens[:-1]], "next": [*tokens[1:], ""]}, tables.SAMPLE)


def sample_data(frames: pl.DataFrame, sample: pl.DataFrame, sensors: Mapping[str, Sensor],
                rectifiers: Mapping[str, Rectifier], pack_digest: str) -> pl.DataFrame:
    """SAMPLE_DATA by channel and stamp: one chain per channel of key frames and sweeps.

    frames  channel, stamp_us, sample (number of the key frame, -1 for a sweep), filename, offset, bytes
    A sweep's sample is the one that follows, the last one's for those after it: devkit's `get_boxes` interpolates
    between that sample and the one before.
    """
    scene_token = sample["scene_token"][0]
    parts = []
    for channel in sorted(frames["channel"].unique()):
        rows = frames.filter(pl.col("channel") == channel).sort("stamp_us")
        stamps_us, own = rows["stamp_us"].to_numpy(), rows["sample"].to_numpy()
        owner = np.where(own >= 0, own, keyframes.following(sample["stamp_us"].to_numpy(), stamps_us))
        token, ego_pose = ([tables.token(what, scene_token, channel, at) for at in stamps_us.tolist()]
                           for what in ("sample_data", "ego_pose"))
        image = rectifiers.get(channel)
        parts.append(rows.select(
            pl.Series("token", token), sample["token"].gather(owner).alias("sample_token"),
            pl.Series("ego_pose_token", ego_pose),
            pl.lit(tables.token("calibrated_sensor", scene_token, channel)).alias("calibrated_sensor_token"),
            pl.lit(scene_token).alias("scene_token"), "channel", "stamp_us",
            (pl.col("sample") >= 0).alias("is_key_frame"),
            pl.lit(FORMATS[sensors[channel].modality][0]).alias("fileformat"), "filename",
            pl.lit(image and image.width_px, pl.Int64).alias("width_px"),
            pl.lit(image and image.height_px, pl.Int64).alias("height_px"),
            pl.Series("prev", ["", *token[:-1]]), pl.Series("next", [*token[1:], ""]),
            pl.lit(pack_digest).alias("pack_digest"), "offset", "bytes"))
    return pl.concat(parts).select(*tables.SAMPLE_DATA).cast(tables.SAMPLE_DATA)


def ego_poses(data: pl.DataFrame, poses: Poses) -> pl.DataFrame:
    """EGO_POSE: one row per sample_data row, interpolated at its own stamp. Raises ValueError off the trajectory."""
    xyz_m, rotations_wxyz = poses.at(data["stamp_us"].to_numpy())
    numbers = dict(zip(tables.POSE, np.hstack([xyz_m, rotations_wxyz]).T))
    return tables.frame({"token": data["ego_pose_token"], "stamp_us": data["stamp_us"], **numbers}, tables.EGO_POSE)


def calibrated_sensors(scene_token: str, channels: list[str], sensors: Mapping[str, Sensor],
                       rectifiers: Mapping[str, Rectifier]) -> pl.DataFrame:
    """CALIBRATED_SENSOR of the channels, with the intrinsics of the saved images."""
    rows = []
    for channel in channels:
        image = rectifiers.get(channel)
        numbers = np.hstack(geometry.split(sensors[channel].T_ego_sensor)).tolist()
        rows.append({"token": tables.token("calibrated_sensor", scene_token, channel), "scene_token": scene_token,
                     "channel": channel, "modality": sensors[channel].modality, **dict(zip(tables.POSE, numbers)),
                     "camera_intrinsic": image.K.flatten().tolist() if image else [],
                     "camera_distortion": image.D.tolist() if image else []})
    return tables.frame(rows, tables.CALIBRATED_SENSOR)
