"""Samples read from a merged dataset: Parquet tables, and packs by one ranged read a member.

Boxes as arrays are (M, 9): x, y, z [m], length, width, height [m], yaw [rad], vx, vy [m/s] (NaN where unknown).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from stages.lib import geometry, images, pack
from stages.lib.errors import DataError
from stages.lib.tables import POSE, read

TABLES = ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "sample_annotation")
LIDAR = "LIDAR_TOP"
BOX = ("x_m", "y_m", "z_m", "length_m", "width_m", "height_m", "yaw_rad", "vx_mps", "vy_mps")


class Dataset:
    """The scenes whose packs are given. Read-only; sensors are read from the packs when asked for.

    tables  folder of the merged tables, or table name -> Parquet file; at least those in `TABLES`
    packs   scene token -> pack
    Raises DataError for a table that is not one.
    """

    def __init__(self, tables: Path | Mapping[str, Path], packs: Mapping[str, Path]):
        paths = tables if isinstance(tables, Mapping) else {name: tables / f"{name}.parquet" for name in TABLES}

        def of_scenes(name: str, column: str = "scene_token") -> pl.DataFrame:
            return read(paths[name]).filter(pl.col(column).is_in(list(packs)))

        self._packs = dict(packs)
        self._scenes = _by_token(of_scenes("scene", "token"), "split", "name", "reviewed_us")
        self._samples = _by_token(of_scenes("sample"), "scene_token", "stamp_us", "label_source")
        sample_data = of_scenes("sample_data")
        self._data = _by_token(sample_data, "sample_token", "ego_pose_token", "calibrated_sensor_token", "scene_token",
                               "channel", "stamp_us", "is_key_frame", "filename", "prev", "offset", "bytes")
        self._keys = {(row["sample_token"], row["channel"]): row for row in self._data.values() if row["is_key_frame"]}
        poses = read(paths["ego_pose"]).join(sample_data, left_on="token", right_on="ego_pose_token", how="semi")
        self._poses = _by_token(poses, *POSE)
        self._sensors = _by_token(of_scenes("calibrated_sensor"), *POSE, "camera_intrinsic")
        annotations = of_scenes("sample_annotation")
        self._no_boxes = annotations.clear()
        self._boxes = {key[0]: rows for key, rows in
                       annotations.partition_by("sample_token", as_dict=True, maintain_order=True).items()}

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Path]) -> Dataset:
        """The dataset of a stage's inputs: roles `tables/<table>.parquet` and `pack/<scene token>`."""
        named = {name: inputs[f"tables/{name}.parquet"] for name in TABLES}
        return cls(named, {role.removeprefix("pack/"): path for role, path in inputs.items()
                           if role.startswith("pack/")})

    def sample_tokens(self, split: str) -> list[str]:
        """Tokens of the split's key frames, by scene name and stamp."""
        order = [(self._scenes[sample["scene_token"]]["name"], sample["stamp_us"], token)
                 for token, sample in self._samples.items()
                 if self._scenes[sample["scene_token"]]["split"] == split]
        return [token for _, _, token in sorted(order)]

    def scene_token(self, sample_token: str) -> str:
        """The scene that a key frame belongs to."""
        return self._samples[sample_token]["scene_token"]

    def label_source(self, sample_token: str) -> str:
        """Where the key frame's boxes come from: truth, human or auto; empty where nobody and nothing labelled it."""
        return self._samples[sample_token]["label_source"]

    def is_reviewed(self, sample_token: str) -> bool:
        """True where a person reviewed the labels at the key frame's stamp: what has no box there is no object."""
        sample = self._samples[sample_token]
        bounds_us = self._scenes[sample["scene_token"]]["reviewed_us"]
        return any(start <= sample["stamp_us"] < end for start, end in zip(bounds_us[::2], bounds_us[1::2]))

    def boxes(self, sample_token: str) -> pl.DataFrame:
        """The key frame's sample_annotation rows, in the map frame."""
        return self._boxes.get(sample_token, self._no_boxes)

    def T_map_ego(self, sample_token: str) -> np.ndarray:
        """(4, 4): the ego pose at the lidar key frame's stamp."""
        return self._pose(self._key(sample_token, LIDAR))

    def points_ego(self, sample_token: str, num_sweeps: int,
                   ego_box_m: tuple[float, float, float, float] | None = None) -> np.ndarray:
        """Lidar points (N, 5) float32: x, y, z [m] in the ego frame at the key frame's stamp, intensity, age [s] >= 0.

        The key frame and up to num_sweeps - 1 sweeps before it in its scene, moved by the ego motion in between.
        ego_box_m: x_min, y_min, x_max, y_max in each sweep's own ego frame; points in it are the vehicle's own and go.
        """
        key = row = self._key(sample_token, LIDAR)
        T_key_map = geometry.invert(self._pose(key))
        clouds = []
        while row is not None and len(clouds) < num_sweeps:
            points = pack.read_points(self._member(row))
            xyz = geometry.apply(self._mount(row), points[:, :3].astype(float))
            keep = np.isfinite(xyz).all(1)
            if ego_box_m is not None:
                x_min, y_min, x_max, y_max = ego_box_m
                keep &= ~((xyz[:, 0] > x_min) & (xyz[:, 0] < x_max) & (xyz[:, 1] > y_min) & (xyz[:, 1] < y_max))
            cloud = np.empty((int(keep.sum()), 5), np.float32)
            cloud[:, :3] = geometry.apply(T_key_map @ self._pose(row), xyz[keep])
            cloud[:, 3] = points[keep, 3]
            cloud[:, 4] = (key["stamp_us"] - row["stamp_us"]) * 1e-6
            clouds.append(cloud)
            row = self._data.get(row["prev"])
        return np.concatenate(clouds)

    def image(self, sample_token: str, channel: str) -> np.ndarray:
        """The channel's key frame, (H, W, 3) uint8 RGB."""
        row = self._key(sample_token, channel)
        try:
            return images.decode(self._member(row))
        except DataError as error:
            raise DataError(f"{row['filename']} of scene {row['scene_token']}: not a readable image: {error}\n"
                            "  make its pack again: `dvc repro -f sample`") from None

    def camera(self, sample_token: str, channel: str) -> tuple[np.ndarray, np.ndarray]:
        """K (3, 3) [px] of the saved image, and T_map_cam (4, 4) at the image's own stamp."""
        row = self._key(sample_token, channel)
        sensor = self._sensors[row["calibrated_sensor_token"]]
        return np.array(sensor["camera_intrinsic"], float).reshape(3, 3), self._pose(row) @ self._mount(row)

    def _key(self, sample_token: str, channel: str) -> dict:
        row = self._keys.get((sample_token, channel))
        if row is None:
            raise DataError(f"sample {sample_token} has no {channel} key frame\n"
                            f"  require the channel in the rig (required: true) or see `roadmill check`")
        return row

    def _member(self, row: dict) -> bytes:
        return pack.read_member(self._packs[row["scene_token"]], row["offset"], row["bytes"])

    def _pose(self, row: dict) -> np.ndarray:
        return _transform(self._poses[row["ego_pose_token"]])

    def _mount(self, row: dict) -> np.ndarray:
        return _transform(self._sensors[row["calibrated_sensor_token"]])


def box_array(annotations: pl.DataFrame) -> np.ndarray:
    """Boxes (M, 9) of sample_annotation rows, in the map frame."""
    yaw = geometry.yaw_rad(annotations.select("qw", "qx", "qy", "qz").to_numpy())
    return annotations.with_columns(pl.Series("yaw_rad", yaw, pl.Float64)).select(BOX).to_numpy().astype(float)


def move_boxes(T_dst_src: np.ndarray, boxes_src: np.ndarray) -> np.ndarray:
    """The same boxes (M, 9) seen from another frame: centre, heading and velocity turned, size kept."""
    R = T_dst_src[:3, :3]
    boxes = boxes_src.copy()
    boxes[:, :3] = geometry.apply(T_dst_src, boxes_src[:, :3])
    heading = np.stack([np.cos(boxes_src[:, 6]), np.sin(boxes_src[:, 6])], -1) @ R[:2, :2].T
    boxes[:, 6] = np.arctan2(heading[:, 1], heading[:, 0])
    boxes[:, 7:9] = boxes_src[:, 7:9] @ R[:2, :2].T
    return boxes


def _by_token(table: pl.DataFrame, *columns: str) -> dict[str, dict]:
    return {row["token"]: row for row in table.select("token", *columns).iter_rows(named=True)}


def _transform(row: dict) -> np.ndarray:
    return geometry.transform([row["x_m"], row["y_m"], row["z_m"]], [row["qw"], row["qx"], row["qy"], row["qz"]])
