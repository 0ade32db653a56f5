"""Boxes and points: (M, 7) arrays of x, y, z of the middle, length, width, height [m] and yaw [rad], in any frame."""

from __future__ import annotations

import numpy as np


def rotate(xy: np.ndarray, angle_rad: np.ndarray | float) -> np.ndarray:
    """xy (…, 2) turned by angle_rad (…) about +z."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return np.stack([c * xy[..., 0] - s * xy[..., 1], s * xy[..., 0] + c * xy[..., 1]], -1)


def count_inside(xyz: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Numbers (M,) of points xyz (N, 3) [m] inside boxes (M, 7)."""
    xyz = xyz[np.argsort(xyz[:, 0], kind="stable")]
    reach_m = np.hypot(boxes[:, 3], boxes[:, 4]) / 2 + 1e-6
    first, last = np.searchsorted(xyz[:, 0], [boxes[:, 0] - reach_m, boxes[:, 0] + reach_m])
    counts = np.zeros(len(boxes), int)
    for number, (begin, end, box) in enumerate(zip(first, last, boxes)):
        near = xyz[begin:end] - box[:3]
        along = np.column_stack([rotate(near[:, :2], -box[6]), near[:, 2]])
        counts[number] = (np.abs(along) <= box[3:6] / 2).all(1).sum()
    return counts


def not_overlapped(boxes: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Mask (M,) of boxes (M, 7) that, of any two of which one holds the other's middle, leaves that of higher score."""
    keep = np.zeros(len(boxes), bool)
    for one in np.argsort(-score, kind="stable"):
        better = boxes[keep]
        keep[one] = not (_holds(better, boxes[one]) | _holds(boxes[one], better)).any()
    return keep


def _holds(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each of boxes (…, 7) holds the middle of each of others (…, 7) in its footprint."""
    return (np.abs(rotate(others[..., :2] - boxes[..., :2], -boxes[..., 6])) < boxes[..., 3:5] / 2).all(-1)
