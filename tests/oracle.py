"""What a dataset says about where things are, read with nuscenes-devkit's geometry instead of our own.

`python -m tests.oracle DATAROOT OUT.png` draws the lidar of an exported dataset into CAM_FRONT, as the devkit sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import cv2
import numpy as np
import polars as pl
from nuscenes import NuScenes
from nuscenes.utils.geometry_utils import transform_matrix
from pyquaternion import Quaternion
from scipy.spatial.transform import Rotation

from stages.lib import draw, images, pack

NUM_PICTURES, FAR_M = 4, 40.0
STEP_M, NEIGHBOUR_RAD = 1.0, np.radians(1.0)
REACH_PX, FADE, ROUND_PX = 6, 0.85, 61


@dataclass(frozen=True)
class Frame:
    """A row of sample_data with its pose and mount.

    T_map_ego, T_ego_sensor  (4, 4); K (3, 3) [px] and D (n,) of the saved image
    content                  reads the saved file
    """

    channel: str
    stamp_us: int
    is_key_frame: bool
    T_map_ego: np.ndarray
    T_ego_sensor: np.ndarray
    K: np.ndarray
    D: np.ndarray
    content: Callable[[], bytes]

    @property
    def T_map_sensor(self) -> np.ndarray:
        """(4, 4)."""
        return self.T_map_ego @ self.T_ego_sensor

    @cached_property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return cv2.imdecode(np.frombuffer(self.content(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

    @cached_property
    def points(self) -> np.ndarray:
        """(N, 5) x, y, z [m] in the sensor frame, intensity, ring."""
        return np.frombuffer(self.content(), np.float32).reshape(-1, 5).astype(float)

    def project(self, xyz_map: np.ndarray, turned: Rotation | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (N, 2) and depth (N,) [m] of points (N, 3) in the map frame; `turned`: the camera on its mount."""
        xyz = (xyz_map - self.T_map_sensor[:3, 3]) @ self.T_map_sensor[:3, :3]
        xyz = turned.apply(xyz, inverse=True) if turned else xyz
        x, y = (xyz[:, :2] / xyz[:, 2:]).T
        square = x**2 + y**2
        k1, k2, p1, p2, k3 = np.append(self.D, np.zeros(5))[:5]
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        bent = np.stack([x * radial + 2 * p1 * x * y + p2 * (square + 2 * x**2),
                         y * radial + p1 * (square + 2 * y**2) + 2 * p2 * x * y], -1)
        return bent @ self.K[:2, :2].T + self.K[:2, 2], xyz[:, 2]


def frames(folder: Path, open_pack: Callable[[str], Path]) -> list[Frame]:
    """All frames, by channel and stamp, of a folder's tables sample_data, ego_pose and calibrated_sensor (.parquet).

    open_pack: pack digest -> local file
    """
    data, poses, mounts = (pl.read_parquet(folder / f"{name}.parquet") for name in (
        "sample_data", "ego_pose", "calibrated_sensor"))
    pose = {row["token"]: row for row in poses.iter_rows(named=True)}
    mount = {row["token"]: row for row in mounts.iter_rows(named=True)}
    found = []
    for row in data.sort("channel", "stamp_us").iter_rows(named=True):
        sensor = mount[row["calibrated_sensor_token"]]
        found.append(Frame(
            row["channel"], row["stamp_us"], row["is_key_frame"], _matrix(pose[row["ego_pose_token"]]), _matrix(sensor),
            np.array(sensor["camera_intrinsic"], float).reshape(-1, 3), np.array(sensor["camera_distortion"], float),
            partial(pack.read_member, open_pack(row["pack_digest"]), row["offset"], row["bytes"])))
    return found


def _matrix(row: dict) -> np.ndarray:
    return transform_matrix([row["x_m"], row["y_m"], row["z_m"]],
                            Quaternion(row["qw"], row["qx"], row["qy"], row["qz"]))


def edge_contrast(pairs: Sequence[tuple[Frame, Frame]], *, turned_deg: tuple[float, float] = (0, 0),
                  still: bool = False) -> float:
    """How much stronger image edges are where the lidar sees a step in depth than where it sees a surface, as a ratio.

    It is greatest where lidar and camera fit together (Levinson and Thrun, Automatic Online Calibration of Cameras and
    Lasers, 2013).
    pairs       (camera frame, lidar frame)
    turned_deg  the camera's mount turned to the right and up
    still       as if the car stood still between the two
    """
    turned = Rotation.from_euler("yx", turned_deg, degrees=True)
    steps, surfaces = [], []
    for camera, lidar in pairs:
        T = (camera if still else lidar).T_map_ego @ lidar.T_ego_sensor
        uv, depth = camera.project(lidar.points[:, :3] @ T[:3, :3].T + T[:3, 3], turned)
        edge = _edges(camera)
        column, row = np.round(uv).T
        seen = (depth > 1) & (column >= 1) & (column < edge.shape[1] - 1) & (row >= 1) & (row < edge.shape[0] - 1)
        strength, is_step = edge[row[seen].astype(int), column[seen].astype(int)], _steps(lidar)[seen]
        steps.append(strength[is_step])
        surfaces.append(strength[~is_step])
    return float(np.concatenate(steps).mean() / np.concatenate(surfaces).mean())


def _edges(camera: Frame) -> np.ndarray:
    """(H, W) how strong the nearest upright edge is against those around, fading with its distance."""
    grey = cv2.GaussianBlur(cv2.cvtColor(np.ascontiguousarray(camera.image), cv2.COLOR_RGB2GRAY), (0, 0), 1.0)
    edge = np.abs(cv2.Sobel(grey, cv2.CV_32F, 1, 0))
    edge /= cv2.blur(edge, (ROUND_PX, ROUND_PX)) + 2
    return np.maximum.reduce([np.roll(edge, by, 1) * FADE ** abs(by) for by in range(-REACH_PX, REACH_PX + 1)])


def _steps(lidar: Frame) -> np.ndarray:
    """(N,) bool: points that lie before a neighbour on their ring, or before nothing."""
    xyz, ring = lidar.points[:, :3], lidar.points[:, 4]
    far, azimuth = np.linalg.norm(xyz, axis=1), np.arctan2(xyz[:, 1], xyz[:, 0])
    order = np.lexsort((azimuth, ring))
    step = np.zeros(len(xyz), bool)
    for one, other in ((order[:-1], order[1:]), (order[1:], order[:-1])):
        next_to = (ring[one] == ring[other]) & (np.abs(azimuth[one] - azimuth[other]) < NEIGHBOUR_RAD)
        step[one] |= ~next_to | (far[other] - far[one] > STEP_M)
    return step


def picture(dataroot: Path) -> np.ndarray:
    """Key frames of CAM_FRONT at twice their size with the points of LIDAR_TOP, red near and blue far: RGB."""
    nusc = NuScenes("v1.0-roadmill", str(dataroot), verbose=False)
    shown = []
    for number in np.unique(np.linspace(0, len(nusc.sample) - 1, NUM_PICTURES).round().astype(int)):
        sample = nusc.sample[number]
        points, depth, image = nusc.explorer.map_pointcloud_to_image(
            sample["data"]["LIDAR_TOP"], sample["data"]["CAM_FRONT"])
        large = cv2.resize(np.asarray(image), None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
        shown.append((str(sample["timestamp"]), images.draw_points(large, points[:2].T * 2 + 0.5, depth, FAR_M)))
    return draw.side_by_side(shown, 2)


if __name__ == "__main__":
    cv2.imwrite(sys.argv[2], picture(Path(sys.argv[1]))[..., ::-1])
