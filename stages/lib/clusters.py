"""Points over the ground in one sweep, clusters of them, and rectangles around clusters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, QhullError, cKDTree

from stages.lib import ground
from stages.lib.knobs import knob

CELL_M = 0.2
ANGLES_RAD = np.deg2rad(np.arange(0, 90, 2.0))
NEAREST_M = 0.05  # closeness does not grow below this distance from an edge
COLUMN_GAP_M, BEAM_GAP = 0.6, 0.03  # what is this much over the rest hangs over it; more for each metre of range
THIN_M = 0.1  # of the points in such a cell one is enough to fit an outline


@dataclass(frozen=True)
class Clustering:
    """Knobs of the clustering."""

    min_range_m: float = knob("points nearer to the sensor belong to the ego vehicle", low=0)
    max_range_m: float = knob("points further away are not looked at", above=0)
    low_m: float = knob("points lower over the ground are ground", above=0)
    high_m: float = knob("points higher over the ground join no cluster: canopies would tie things together", above=0)
    gap_m: float = knob("points of one cluster are nearer than this to the next one", above=0)
    gap_per_m: float = knob("and this for each metre of range, as beams spread", low=0)
    gap_along_m: float = knob("or nearer than this, along the ray from the sensor", above=0)
    min_points: int = knob("smaller clusters are dropped", low=3)


def heights(xyz_ego: np.ndarray, sensor_xy: np.ndarray, cfg: Clustering) -> tuple[np.ndarray, np.ndarray]:
    """(rows (M,) of the points within range, their heights over the ground (M,) [m]).

    xyz_ego (N, 3) [m] points in the ego frame; sensor_xy (2,) [m] the lidar's place in it.
    """
    range_m = np.hypot(*(xyz_ego[:, :2] - sensor_xy).T)
    rows = np.flatnonzero((range_m >= cfg.min_range_m) & (range_m <= cfg.max_range_m))
    return rows, ground.heights(xyz_ego[rows], cfg.max_range_m + np.hypot(*sensor_xy))


def find(xy: np.ndarray, height_m: np.ndarray, cfg: Clustering) -> list[np.ndarray]:
    """Rows of the points of each cluster in one sweep.

    xy (N, 2) [m] from the sensor; height_m (N,) over the ground. Points higher than cfg.high_m join what is below them.
    """
    body = height_m < cfg.high_m
    if not body.any():
        return []
    ij = np.floor(xy / CELL_M).astype(np.int64)
    key = (ij[:, 0] << 32) + (ij[:, 1] & 0xFFFFFFFF)
    cells, first, inverse = np.unique(key[body], return_index=True, return_inverse=True)
    middle = (ij[body][first] + 0.5) * CELL_M
    label_of_cell = connect(middle, cfg.gap_m + cfg.gap_per_m * np.hypot(*middle.T), cfg.gap_along_m)
    label = np.full(len(xy), -1)
    label[body] = label_of_cell[inverse]
    at = np.minimum(np.searchsorted(cells, key[~body]), len(cells) - 1)
    label[~body] = np.where(cells[at] == key[~body], label_of_cell[at], -1)
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(label.max() + 2))
    return [order[start:stop] for start, stop in itertools.pairwise(bounds)]


def connect(xy: np.ndarray, across_m: np.ndarray, along_m: float) -> np.ndarray:
    """Labels (N,) of points xy (N, 2) [m] from the sensor: two are connected when one is in the ellipse of the other.

    across_m (N,), along_m: half axes of the ellipse [m], across and along the ray. A side seen at a grazing angle has
    its points far apart along the ray, while neighbouring rays stay near each other.
    """
    pairs = cKDTree(xy).query_pairs(max(across_m.max(), along_m), output_type="ndarray")
    i, j = pairs.T
    apart, middle = xy[i] - xy[j], (xy[i] + xy[j]) / 2
    along = (apart * middle).sum(1) / np.hypot(*middle.T)
    across_squared = (apart**2).sum(1) - along**2
    near = (along / np.maximum(along_m, across_m[i])) ** 2 + across_squared / across_m[i] ** 2 <= 1
    graph = coo_matrix((np.ones(near.sum(), bool), (i[near], j[near])), shape=(len(xy), len(xy)))
    return connected_components(graph, directed=False)[1]


def top(height_m: np.ndarray, range_m: float) -> float:
    """The highest of heights (N,) [m] that is reached from the lowest one without a gap: no branch over a roof."""
    height_m = np.sort(height_m)
    gaps = np.flatnonzero(np.diff(height_m) > COLUMN_GAP_M + BEAM_GAP * range_m)
    return float(height_m[gaps[0]] if len(gaps) else height_m[-1])


def fit_angle(xy: np.ndarray) -> float:
    """Direction [rad], modulo a quarter turn, of the rectangle whose sides lie closest to L- or I-shaped points (N, 2).

    Search over angles with the closeness criterion of Zhang, Xu, Dong, Dolan, "Efficient L-shape fitting for vehicle
    detection using laser scanners", IV 2017, algorithm 4.
    """
    _, first = np.unique(np.round((xy - xy[0]) / THIN_M) @ (1.0, 1e6), return_index=True)
    seen = xy[first] - xy[0]
    angle = ANGLES_RAD[np.argmax(_closeness(seen, ANGLES_RAD))]
    fine = angle + np.deg2rad(np.linspace(-2, 2, 9))
    return float(fine[np.argmax(_closeness(seen, fine))])


def _closeness(xy: np.ndarray, angles_rad: np.ndarray) -> np.ndarray:
    along = np.stack([np.cos(angles_rad), np.sin(angles_rad)], -1) @ xy.T
    across = np.stack([-np.sin(angles_rad), np.cos(angles_rad)], -1) @ xy.T
    return (1 / np.maximum(np.minimum(_to_edge(along), _to_edge(across)), NEAREST_M)).sum(-1)


def _to_edge(projected: np.ndarray) -> np.ndarray:
    """Distances (A, N) from that edge, for each angle, to which the points are closer as a whole."""
    far = projected.max(-1, keepdims=True) - projected
    near = projected - projected.min(-1, keepdims=True)
    return np.where((far**2).sum(-1, keepdims=True) < (near**2).sum(-1, keepdims=True), far, near)


def rectangle(xy: np.ndarray, angle_rad: float) -> tuple[np.ndarray, np.ndarray]:
    """(centre (2,), extents (2,) along and across angle_rad) [m] of the rectangle around points (N, 2)."""
    axes = _axes(angle_rad)
    turned = xy @ axes.T
    low, high = turned.min(0), turned.max(0)
    return (low + high) / 2 @ axes, high - low


def corners(size: np.ndarray, angle_rad: float) -> np.ndarray:
    """The corners (4, 2) [m] of a rectangle, from its centre, counter-clockwise."""
    return np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * size / 2 @ _axes(angle_rad)


def _axes(angle_rad: float) -> np.ndarray:
    return np.array([[np.cos(angle_rad), np.sin(angle_rad)], [-np.sin(angle_rad), np.cos(angle_rad)]])


def hull(xy: np.ndarray) -> np.ndarray:
    """Rows (H,) of the corners of the convex hull of points (N, 2); points on one line: its two ends."""
    try:
        return ConvexHull(xy).vertices
    except (QhullError, ValueError):
        one = np.argmax(np.hypot(*(xy - xy[0]).T))
        return np.array([one, np.argmax(np.hypot(*(xy - xy[one]).T))])
