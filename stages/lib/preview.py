"""Pictures that show at a glance whether cameras, lidar and poses of a pack fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from stages.lib import cameras, geometry, images, pack, tables

FAR_M = 40.0
QUALITY = 85


def lidar_in_camera(data: pl.DataFrame, poses: pl.DataFrame, sensors: pl.DataFrame, pack_path: Path) -> bytes | None:
    """A JPEG of CAM_FRONT at the scene's middle key frame with the points of LIDAR_TOP drawn in, red near, blue far.

    data, poses, sensors  SAMPLE_DATA, EGO_POSE and CALIBRATED_SENSOR of the scene
    None where the scene has not both channels.
    """
    key_frames = data.filter("is_key_frame").join(poses, left_on="ego_pose_token", right_on="token").join(
        sensors, left_on="calibrated_sensor_token", right_on="token", suffix="_sensor").sort("channel", "stamp_us")
    clouds = key_frames.filter(pl.col("channel") == "LIDAR_TOP")
    cloud = clouds[len(clouds) // 2:][:1]
    image = key_frames.filter(pl.col("channel") == "CAM_FRONT").join(cloud.select("sample_token"), on="sample_token")
    if cloud.is_empty() or image.is_empty():
        return None
    (cloud,), (image,) = cloud.to_dicts(), image.to_dicts()
    points = pack.read_points(pack.read_member(pack_path, cloud["offset"], cloud["bytes"]))
    T_cam_lidar = geometry.invert(_T_map_sensor(image)) @ _T_map_sensor(cloud)
    xyz_cam = geometry.apply(T_cam_lidar, points[:, :3].astype(float))
    uv_px, depth_m = cameras.project(xyz_cam, np.reshape(image["camera_intrinsic"], (3, 3)))
    pixels = images.decode(pack.read_member(pack_path, image["offset"], image["bytes"]))
    return images.encode_jpeg(images.draw_points(pixels, uv_px, depth_m, FAR_M), QUALITY)


def _T_map_sensor(row: dict[str, float]) -> np.ndarray:
    T_map_ego, T_ego_sensor = (geometry.transform(numbers[:3], numbers[3:]) for numbers in (
        [row[name + suffix] for name in tables.POSE] for suffix in ("", "_sensor")))
    return T_map_ego @ T_ego_sensor
