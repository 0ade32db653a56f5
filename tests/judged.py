"""A merged dataset that a person can check by hand: three drives of one scene each, `a` in train, `b` and `c` in val.

A scene has four key frames 0.5 s apart. The ego vehicle goes 2 m/s along its heading (0, 90, 180 degrees) from
(0, 0), (200, 0), (400, 0). At every key frame there are three cars, seen from the ego vehicle: "ahead" stays 12 m ahead
(so it moves at 2 m/s) with 40 points, "left" was 8 m to the left at the first key frame and stands, with 20 points,
"far" is 25 m ahead and 5 m to the right with 3 points and moves along. All are 4.5 x 1.9 x 1.6 m and head as ego does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import polars as pl

from stages.lib import digests, geometry, pack, tables
from stages.lib.scoring import PREDICTIONS

DRIVES = {"a": ("train", 0.0, 0.0), "b": ("val", 200.0, np.pi / 2), "c": ("val", 400.0, -np.pi)}
CARS = {"ahead": (12.0, 0.0, 40), "left": (0.0, 8.0, 20), "far": (25.0, -5.0, 3)}
SIZE_M = (4.5, 1.9, 1.6)
SPEED_MPS = 2.0
NUM_SAMPLES = 4
START_US = 1_700_000_000_000_000
K = [[60.0, 0, 64], [0, 60, 48], [0, 0, 1]]
T_EGO_LIDAR = geometry.transform([1.0, 0, 1.8], [1.0, 0, 0, 0])
T_EGO_CAM = geometry.transform([1.5, 0, 1.5], [0.5, -0.5, 0.5, -0.5])
ANNOTATION = {"token": pl.String, "sample_token": pl.String, "scene_token": pl.String, "instance_token": pl.String,
              "category": pl.String, **tables.POSE, "length_m": pl.Float64, "width_m": pl.Float64,
              "height_m": pl.Float64, "vx_mps": pl.Float64, "vy_mps": pl.Float64, "num_lidar_pts": pl.Int64,
              "num_radar_pts": pl.Int64, "prev": pl.String, "next": pl.String, "source": pl.String}


@dataclass(frozen=True)
class World:
    """tables: name -> rows; packs: scene token -> file; truth: val's boxes as PREDICTIONS, with score 1."""

    tables: dict[str, pl.DataFrame]
    packs: dict[str, Path]
    truth: pl.DataFrame

    def read(self, name: str) -> pl.DataFrame:
        """A table by its name."""
        return self.tables[name]


def ego_xy_yaw(drive: str, seconds: float) -> tuple[float, float, float]:
    """Where the ego vehicle is: x, y [m], yaw [rad]."""
    _, x, yaw = DRIVES[drive]
    return x + SPEED_MPS * seconds * np.cos(yaw), SPEED_MPS * seconds * np.sin(yaw), yaw


def make(folder: Path, *, label_source: str = "truth") -> World:
    """The dataset; packs are written into `folder`."""
    rows: dict[str, list[dict]] = {name: [] for name in (
        "scene", "log", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sample_annotation")}
    packs = {}
    for drive, (split, _, _) in DRIVES.items():
        packs[f"scene_{drive}"] = folder / f"{drive}.tar"
        _scene(rows, drive, packs[f"scene_{drive}"], label_source)
        rows["scene"].append({
            "token": f"scene_{drive}", "name": f"{drive}-0", "log_token": f"log_{drive}", "split": split,
            "pack_digest": digests.digest_file(packs[f"scene_{drive}"]),
            "reviewed_us": [START_US, START_US + 2_000_000]})
        rows["log"].append({"token": f"log_{drive}", "logfile": f"drive_{drive}", "location": "testtown"})
    schema = {"sample": {**tables.SAMPLE, "label_source": pl.String}, "sample_data": tables.SAMPLE_DATA,
              "ego_pose": tables.EGO_POSE, "calibrated_sensor": tables.CALIBRATED_SENSOR,
              "sample_annotation": ANNOTATION}
    world = {name: pl.DataFrame(content, schema=schema.get(name)) for name, content in rows.items()}
    boxes = world["sample_annotation"]
    truth = boxes.filter(pl.col("scene_token") != "scene_a").with_columns(
        pl.Series("yaw_rad", geometry.yaw_rad(boxes.filter(pl.col("scene_token") != "scene_a").select(
            "qw", "qx", "qy", "qz").to_numpy())), pl.lit(1.0).alias("score")).select(*PREDICTIONS)
    return World(world, packs, truth)


def _scene(rows: dict[str, list[dict]], drive: str, path: Path, label_source: str) -> None:
    scene = f"scene_{drive}"
    mounts = {"LIDAR_TOP": ("lidar", T_EGO_LIDAR, []), "CAM_FRONT": ("camera", T_EGO_CAM, np.ravel(K).tolist())}
    for channel, (modality, T, intrinsic) in mounts.items():
        rows["calibrated_sensor"].append({
            "token": f"{scene}_{channel}", "scene_token": scene, "channel": channel, "modality": modality, **_pose(T),
            "camera_intrinsic": intrinsic, "camera_distortion": []})
    with pack.PackWriter(path) as writer:
        for n in range(NUM_SAMPLES):
            stamp_us = START_US + n * 500_000
            x, y, yaw = ego_xy_yaw(drive, n * 0.5)
            T_map_ego = geometry.transform([x, y, 0], geometry.yaw_wxyz(yaw))
            rows["sample"].append({"token": f"{scene}_{n}", "stamp_us": stamp_us, "scene_token": scene,
                                   **_chain(f"{scene}_", n), "label_source": label_source})
            boxes = _boxes(drive, n)
            for channel, suffix, content in (("LIDAR_TOP", "pcd.bin", _cloud(boxes, T_map_ego)),
                                             ("CAM_FRONT", "jpg", _image(n))):
                name = f"samples/{channel}/{drive}__{n}.{suffix}"
                offset, num_bytes = writer.add(name, content)
                rows["ego_pose"].append({"token": f"{scene}_{channel}_{n}", "stamp_us": stamp_us, **_pose(T_map_ego)})
                rows["sample_data"].append({
                    "token": f"{scene}_{channel}_{n}", "sample_token": f"{scene}_{n}", "scene_token": scene,
                    "ego_pose_token": f"{scene}_{channel}_{n}", "calibrated_sensor_token": f"{scene}_{channel}",
                    "channel": channel, "stamp_us": stamp_us, "is_key_frame": True, "fileformat": suffix[:3],
                    "filename": name, "width_px": 128, "height_px": 96, **_chain(f"{scene}_{channel}_", n),
                    "pack_digest": "", "offset": offset, "bytes": num_bytes})
            for car, (cx, cy, car_yaw) in boxes.items():
                moving = car != "left"
                rows["sample_annotation"].append({
                    "token": f"{scene}_{car}_{n}", "sample_token": f"{scene}_{n}", "scene_token": scene,
                    "instance_token": f"{scene}_{car}", "category": "vehicle.car",
                    **_pose(geometry.transform([cx, cy, 0.8], geometry.yaw_wxyz(car_yaw))),
                    "length_m": SIZE_M[0], "width_m": SIZE_M[1], "height_m": SIZE_M[2],
                    "vx_mps": SPEED_MPS * np.cos(yaw) * moving, "vy_mps": SPEED_MPS * np.sin(yaw) * moving,
                    "num_lidar_pts": CARS[car][2], "num_radar_pts": 0, **_chain(f"{scene}_{car}_", n),
                    "source": label_source})


def _boxes(drive: str, n: int) -> dict[str, tuple[float, float, float]]:
    """Car -> x, y [m], yaw [rad] in the map frame at the n-th key frame."""
    found = {}
    for car, (forward, left, _) in CARS.items():
        x, y, yaw = ego_xy_yaw(drive, 0.0 if car == "left" else n * 0.5)
        cos, sin = np.cos(yaw), np.sin(yaw)
        found[car] = (x + forward * cos - left * sin, y + forward * sin + left * cos, yaw)
    return found


def _chain(prefix: str, n: int) -> dict[str, str]:
    return {"prev": f"{prefix}{n - 1}" if n else "", "next": f"{prefix}{n + 1}" if n < NUM_SAMPLES - 1 else ""}


def _pose(T: np.ndarray) -> dict[str, float]:
    xyz, rotation = geometry.split(T)
    return dict(zip(tables.POSE, [*xyz.tolist(), *rotation.tolist()]))


def _cloud(boxes: dict[str, tuple[float, float, float]], T_map_ego: np.ndarray) -> bytes:
    """Ground every 2 m, and each car's points on its roof."""
    ground = np.stack(np.meshgrid(np.arange(-30, 31, 2.0), np.arange(-30, 31, 2.0), [0.0]), -1).reshape(-1, 3)
    clouds = [geometry.apply(T_map_ego, ground)]
    for car, (x, y, _) in boxes.items():
        angle = np.arange(CARS[car][2]) * 2.4
        clouds.append(np.stack([x + 0.8 * np.cos(angle), y + 0.8 * np.sin(angle), np.full(len(angle), SIZE_M[2])], -1))
    xyz = geometry.apply(geometry.invert(T_map_ego @ T_EGO_LIDAR), np.concatenate(clouds))
    return np.concatenate([xyz, np.zeros((len(xyz), 2))], 1).astype(np.float32).tobytes()


def _image(n: int) -> bytes:
    image = np.full((96, 128, 3), 90 + 20 * n, np.uint8)
    image[48:] = 60
    return cv2.imencode(".jpg", image)[1].tobytes()
