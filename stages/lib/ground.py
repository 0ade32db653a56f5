"""Height of lidar points above the ground, without chance: a robust plane, then what the ground departs from it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

CELL_M = 1.0
STEPS = ((8.0, 0.5), (3.0, 0.2))  # (smoothing radius, largest departure from the step before) [m], coarse to fine
PLANE_RANGE_M = 25.0
PLANE_SCALE_M = 0.1
PRIOR_SLOPE = 0.05
MODE_M = 0.2  # bin of the height that most of the ground shares


def heights(xyz_ego: np.ndarray, max_range_m: float) -> np.ndarray:
    """Height (N,) [m] over the local ground of points (N, 3) [m] in the ego frame, whose z axis is about upright.

    The lowest point of each BEV cell is a candidate for ground. A plane is fitted to the candidates near the vehicle
    by reweighting that forgives what stands above it more than what lies below; candidates near the plane bend it, by
    normalised convolution over ever smaller neighbourhoods. Points beyond max_range_m get the height over its edge.
    """
    if not len(xyz_ego):
        return np.zeros(0)
    half = int(np.ceil(max_range_m / CELL_M))
    cell = np.clip(np.floor(xyz_ego[:, :2] / CELL_M).astype(int) + half, 0, 2 * half - 1)
    flat = cell[:, 0] * 2 * half + cell[:, 1]
    low_cell, low_xyz = _lowest(flat, xyz_ego)
    plane = fit_plane(low_xyz[np.hypot(low_xyz[:, 0], low_xyz[:, 1]) < PLANE_RANGE_M])
    departure = low_xyz[:, 2] - _plane_z(plane, low_xyz)
    bend = np.zeros((2 * half, 2 * half))
    for radius_m, tolerance_m in STEPS:
        near = np.abs(departure - bend.ravel()[low_cell]) < tolerance_m
        weight, value = np.zeros(bend.shape), np.zeros(bend.shape)
        weight.ravel()[low_cell[near]] = 1
        value.ravel()[low_cell[near]] = departure[near]
        sigma = radius_m / CELL_M / 2
        weight, value = (ndimage.gaussian_filter(a, sigma, mode="constant", truncate=2.5) for a in (weight, value))
        bend = (value + 1e-3 * bend) / (weight + 1e-3)
    return xyz_ego[:, 2] - _plane_z(plane, xyz_ego) - _bilinear(bend, xyz_ego[:, :2] / CELL_M + half - 0.5)


def fit_plane(xyz: np.ndarray, num_rounds: int = 12) -> np.ndarray:
    """(a, b, c) of z = a x + b y + c through points (N, 3), with outliers mostly above it.

    Iteratively reweighted least squares with Geman-McClure weights whose scale shrinks from 1 m, begun at the height
    that most points share (the vehicle's origin may be on its roof). Slopes have a prior of 0 with a deviation of 5 %;
    without points the plane is z = 0.
    """
    if not len(xyz):
        return np.zeros(3)
    bins = np.round(xyz[:, 2] / MODE_M).astype(int)
    counts = np.convolve(np.bincount(bins - bins.min()), [1, 2, 1], mode="same")
    begin = np.array([0, 0, (counts.argmax() + bins.min()) * MODE_M])
    design = np.column_stack([xyz[:, :2], np.ones(len(xyz))])
    prior = np.diag([PRIOR_SLOPE**-2, PRIOR_SLOPE**-2, 1.0])
    plane = begin
    for scale in np.geomspace(1.0, PLANE_SCALE_M, num_rounds):
        residual = xyz[:, 2] - design @ plane
        tolerance = np.where(residual > 0, scale, 2 * scale)
        weight = (1 + (residual / tolerance) ** 2) ** -2 / scale**2
        plane = np.linalg.solve(design.T @ (design * weight[:, None]) + prior,
                                design.T @ (weight * xyz[:, 2]) + prior @ begin)
    return plane


def _lowest(cell: np.ndarray, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cells (M,), their lowest point (M, 3))."""
    order = np.lexsort((xyz[:, 2], cell))
    cells, first = np.unique(cell[order], return_index=True)
    return cells, xyz[order[first]]


def _plane_z(plane: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    return xyz[:, :2] @ plane[:2] + plane[2]


def _bilinear(grid: np.ndarray, index: np.ndarray) -> np.ndarray:
    return ndimage.map_coordinates(grid, index.T, order=1, mode="nearest")
