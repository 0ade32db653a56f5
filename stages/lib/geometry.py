"""Rigid transforms and quaternions as plain arrays.

A transform `T_dst_src` is a (4, 4) matrix: xyz_dst = T_dst_src @ xyz_src. Quaternions are (…, 4), w first.
Yaw is about +z, 0 along +x, in [-pi, pi).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation, Slerp


def transform(translation_m: np.ndarray, rotation_wxyz: np.ndarray) -> np.ndarray:
    """T_dst_src, (4, 4), from the position (3,) of src in dst [m] and the rotation (4,) from src to dst."""
    T = np.eye(4)
    T[:3, :3] = rotation(rotation_wxyz).as_matrix()
    T[:3, 3] = translation_m
    return T


def rotation(rotation_wxyz: np.ndarray) -> Rotation:
    """scipy's Rotation for quaternions (…, 4) in wxyz."""
    return Rotation.from_quat(np.asarray(rotation_wxyz, float)[..., [1, 2, 3, 0]])


def wxyz(rot: Rotation) -> np.ndarray:
    """Unit quaternions (…, 4) in wxyz with w >= 0."""
    q = rot.as_quat(canonical=True)
    return q[..., [3, 0, 1, 2]]


def split(T_dst_src: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(translation (3,) [m], rotation (4,) wxyz) of a transform (4, 4)."""
    return T_dst_src[:3, 3].copy(), wxyz(Rotation.from_matrix(T_dst_src[:3, :3]))


def invert(T_dst_src: np.ndarray) -> np.ndarray:
    """T_src_dst, (…, 4, 4), of rigid transforms (…, 4, 4)."""
    T = np.zeros_like(T_dst_src)
    R_t = np.swapaxes(T_dst_src[..., :3, :3], -1, -2)
    T[..., :3, :3] = R_t
    T[..., :3, 3] = -(R_t @ T_dst_src[..., :3, 3:])[..., 0]
    T[..., 3, 3] = 1
    return T


def apply(T_dst_src: np.ndarray, xyz_src: np.ndarray) -> np.ndarray:
    """xyz_dst, (N, 3) [m], of points xyz_src, (N, 3) [m]."""
    return xyz_src @ T_dst_src[:3, :3].T + T_dst_src[:3, 3]


def wrap_rad(angle_rad: np.ndarray | float) -> np.ndarray | float:
    """The same angle in [-pi, pi)."""
    return (np.asarray(angle_rad) + np.pi) % (2 * np.pi) - np.pi


def yaw_rad(rotation_wxyz: np.ndarray) -> np.ndarray:
    """Yaw (…,) [rad] of quaternions (…, 4) wxyz: the direction of the rotated x axis in the plane."""
    w, x, y, z = np.moveaxis(np.asarray(rotation_wxyz, float), -1, 0)
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def yaw_wxyz(yaw: np.ndarray | float) -> np.ndarray:
    """Quaternions (…, 4) wxyz of rotations by yaw (…,) [rad] about +z."""
    half = np.asarray(yaw, float) / 2
    zero = np.zeros_like(half)
    return np.stack([np.cos(half), zero, zero, np.sin(half)], -1)


def interpolate_poses(stamps_us: np.ndarray, xyz_m: np.ndarray, rotations_wxyz: np.ndarray,
                      at_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (M, 3) [m], linear, and rotations (M, 4) wxyz, slerp, at the stamps at_us (M,) int64.

    stamps_us (N,) int64 strictly increasing, N >= 2; xyz_m (N, 3); rotations_wxyz (N, 4).
    Raises ValueError where a stamp lies outside [stamps_us[0], stamps_us[-1]]: poses are never extrapolated.
    """
    at_us = np.asarray(at_us, np.int64)
    if at_us.size and (at_us.min() < stamps_us[0] or at_us.max() > stamps_us[-1]):
        raise ValueError(f"pose wanted at {at_us.min()}..{at_us.max()} us, known {stamps_us[0]}..{stamps_us[-1]} us")
    since_us = (stamps_us - stamps_us[0]).astype(float)
    wanted_us = (at_us - stamps_us[0]).astype(float)
    xyz = np.stack([np.interp(wanted_us, since_us, xyz_m[:, axis]) for axis in range(3)], -1)
    return xyz, wxyz(Slerp(since_us, rotation(rotations_wxyz))(wanted_us))
