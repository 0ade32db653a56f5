"""Boxes from those who don't look: what any model has to beat. Judged by the same judge with the same filters."""

from __future__ import annotations

import numpy as np
import polars as pl

from stages.lib import geometry
from stages.lib.dataset import BOX
from stages.lib.scoring import PREDICTIONS
from stages.lib.tables import POSE, frame

SIZE = ("length_m", "width_m", "height_m")
CELL_M = 2.0
NUM_CELLS = 100
NUM_HEADINGS = 16


def nothing() -> pl.DataFrame:
    """No box."""
    return frame([], PREDICTIONS)


def labels(boxes: pl.DataFrame, source: str) -> pl.DataFrame:
    """Automatic labels of one source as if they were predictions. boxes: rows of tables.BOXES, in the map frame."""
    return boxes.filter(pl.col("source") == source).select(*PREDICTIONS)


def mean_box(annotations: pl.DataFrame, poses: pl.DataFrame) -> pl.DataFrame:
    """The same boxes for every sample, in the ego frame: where objects most often were, whatever the sensors say.

    annotations  sample_annotation rows of the train split, in the map frame
    poses        sample_token and T_map_ego (tables.POSE) of every sample of the train split
    Space around the car falls into cells; each of a category's 100 fullest holds one box at the mean place, of the
    category's mean size and most frequent heading (of 16), standing, with the share of samples that had it as score.
    """
    rows = annotations.join(poses, on="sample_token", suffix="_ego", maintain_order="left")
    objects, egos = rows.select(*POSE).to_numpy(), rows.select(f"{name}_ego" for name in POSE).to_numpy()
    to_ego = geometry.rotation(egos[:, 3:]).inv()
    xyz = to_ego.apply(objects[:, :3] - egos[:, :3])
    heading = geometry.yaw_rad(geometry.wxyz(to_ego * geometry.rotation(objects[:, 3:])))
    headings = np.round(heading * NUM_HEADINGS / (2 * np.pi)).astype(int) % NUM_HEADINGS
    sizes = rows.select(*SIZE).to_numpy()
    boxes = []
    for category in rows["category"].unique().sort():
        of = (rows["category"] == category).to_numpy()
        boxes += _of_category(category, xyz[of], headings[of], sizes[of], poses.height)
    columns = ("category", *BOX, "score")
    return pl.DataFrame(boxes, orient="row", schema={name: PREDICTIONS[name] for name in columns})


def _of_category(category: str, xyz: np.ndarray, headings: np.ndarray, sizes: np.ndarray,
                 num_samples: int) -> list[tuple]:
    """Rows category, BOX, score, best first. Sums in order of the rows, so that threads can't change a bit."""
    _, cell, count = np.unique(xyz[:, :2] // CELL_M, axis=0, return_inverse=True, return_counts=True)
    x_m, y_m = (np.bincount(cell, xyz[:, axis]) / count for axis in (0, 1))
    yaw_rad = geometry.wrap_rad(np.argmax(np.bincount(headings)) * (2 * np.pi / NUM_HEADINGS))
    best = np.argsort(-count, kind="stable")[:NUM_CELLS]
    return [(category, x_m[i], y_m[i], xyz[:, 2].mean(), *sizes.mean(0), yaw_rad, 0.0, 0.0, count[i] / num_samples)
            for i in best]


def lidar_poses(samples: pl.DataFrame, sample_data: pl.DataFrame, ego_pose: pl.DataFrame) -> pl.DataFrame:
    """sample_token and T_map_ego (tables.POSE) at each sample's LIDAR_TOP key frame."""
    keys = sample_data.filter((pl.col("channel") == "LIDAR_TOP") & pl.col("is_key_frame"))
    return (keys.join(samples, left_on="sample_token", right_on="token", how="semi")
            .join(ego_pose, left_on="ego_pose_token", right_on="token")
            .select("sample_token", *POSE).sort("sample_token"))
