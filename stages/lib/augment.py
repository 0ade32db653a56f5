"""A sample mirrored, turned and scaled about the ego's origin: points and boxes alike.

Points are (N, 5): x, y, z [m], intensity, age [s]; boxes (M, 9): x, y, z, length, width, height [m], yaw [rad],
vx, vy [m/s].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.lib.geometry import wrap_rad


@dataclass(frozen=True)
class Motion:
    """One change of the scene: mirror x (front to back) and y (left to right), then turn by yaw_rad, then scale."""

    mirror_x: bool
    mirror_y: bool
    yaw_rad: float
    scale: float


def draw(rng: np.random.Generator, flip: bool, max_yaw_rad: float, max_scale_ratio: float) -> Motion:
    """A random motion: if flip, each mirror at even odds; yaw and scale uniform in 0 and 1 +- their maximum."""
    mirror = rng.random(2) < 0.5
    return Motion(flip and bool(mirror[0]), flip and bool(mirror[1]), float(rng.uniform(-max_yaw_rad, max_yaw_rad)),
                  float(rng.uniform(1 - max_scale_ratio, 1 + max_scale_ratio)))


def move(motion: Motion, points: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(points, boxes) after the motion, as new arrays."""
    cos, sin = np.cos(motion.yaw_rad), np.sin(motion.yaw_rad)
    sign = np.array([-1.0 if motion.mirror_x else 1.0, -1.0 if motion.mirror_y else 1.0])
    turn = np.array([[cos, -sin], [sin, cos]]) * sign  # of the plane, mirror first
    points, boxes = points.copy(), boxes.copy()
    points[:, :2] = points[:, :2] @ (turn * motion.scale).T.astype(points.dtype)
    points[:, 2] *= motion.scale
    boxes[:, :2] = boxes[:, :2] @ (turn * motion.scale).T
    boxes[:, 2:6] *= motion.scale
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) @ turn.T
    boxes[:, 6] = wrap_rad(np.arctan2(heading[:, 1], heading[:, 0]))
    boxes[:, 7:9] = boxes[:, 7:9] @ (turn * motion.scale).T
    return points, boxes
