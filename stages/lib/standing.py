"""What stands still in a scene: points that are there whenever one looks, gathered from all sweeps and cut into things.

Gathered points are dense, so a parked car parts from the bin beside it, and what moves parts from what it passes.
All positions are in the map frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from stages.lib.knobs import knob

PLACE_M = 0.3  # cell in which two sweeps see the same place, with its four neighbours
CELL_M = 0.15
RIM_M = 0.15  # next to its sides the ground is seen anyway
ROOT_M = 1.0  # cells with nothing below this tie nothing together: they are crowns, and roofs seen from above
BESIDE_M = 0.3  # but they are as high as what they are beside
COLUMN_GAP_M = 0.4  # what is this much over the rest of its cell hangs over it
TALL_SHARE = 0.4


@dataclass(frozen=True)
class Standing:
    """Knobs that tell what stands from what moves."""

    window_s: tuple[float, float] = knob("a place is looked at again this much earlier and later, from, to", above=0)
    min_share: float = knob("what stands is seen again in this share of the sweeps, before or after", low=0, high=1)
    gap_m: float = knob("points of one standing thing are nearer than this to the next one", above=0)
    max_free_share: float = knob("where the ground was seen in more sweeps than this, for each in which the thing was "
                                 "seen, it only stopped for a while", above=0)
    beside_m: float = knob("what is nearer than this to something that stands is beside it", above=0)


@dataclass(frozen=True)
class Things:
    """Standing things. of_point (N,) int: number of the thing, -1 for none; top_m (T,): height over the ground."""

    of_point: np.ndarray
    top_m: np.ndarray


def shares(times_s: np.ndarray, sweep: np.ndarray, xy: np.ndarray, window_s: tuple[float, float]) -> np.ndarray:
    """For each point (N,), in which share of the sweeps before or after, whichever is larger, its place is seen again.

    times_s (S,) of the sweeps, ascending; sweep (N,) int; xy (N, 2) [m]. A side of the window that the scene covers by
    less than half counts as half covered.
    """
    if not len(xy):
        return np.zeros(0)
    cells, inverse = np.unique(_keys(xy, PLACE_M), return_inverse=True)
    num = len(times_s)
    pairs, of_point = np.unique(inverse.astype(np.int64) * num + sweep, return_inverse=True)
    cell, when = pairs // num, pairs % num
    seen = [pairs]
    for step in (1, -1, 1 << 32, -1 << 32):
        beside = cells[cell] + step
        at = np.minimum(np.searchsorted(cells, beside), len(cells) - 1)
        exists = cells[at] == beside
        seen.append(at[exists] * num + when[exists])
    seen = np.unique(np.concatenate(seen))
    usual = (window_s[1] - window_s[0]) * (num - 1) / max(times_s[-1] - times_s[0], 1e-6)
    share = np.zeros(len(pairs))
    for begin_s, end_s in ((-window_s[1], -window_s[0]), window_s):
        begin, end = (np.searchsorted(times_s, times_s + edge_s) for edge_s in (begin_s, end_s))
        again = np.searchsorted(seen, cell * num + end[when]) - np.searchsorted(seen, cell * num + begin[when])
        share = np.maximum(share, again / np.maximum(end - begin, usual / 2)[when])
    return share[of_point]


def things(xy: np.ndarray, height_m: np.ndarray, high_m: float, gap_m: float) -> Things:
    """The things that standing points make, xy (N, 2) [m], height_m (N,) over the ground.

    A thing is as high as most of it reaches: no crown that leans over it counts, above high_m.
    """
    if not len(xy):
        return Things(np.zeros(0, int), np.zeros(0))
    cells, of_point = np.unique(_keys(xy, CELL_M), return_inverse=True)
    lowest = np.full(len(cells), np.inf)
    np.minimum.at(lowest, of_point, height_m)
    middle = np.column_stack([cells >> 32, cells & 0xFFFFFFFF]) * CELL_M
    rooted = np.flatnonzero(lowest < ROOT_M)
    thing_of_cell = np.full(len(cells), -1)
    thing_of_cell[rooted] = _connected(middle[rooted], gap_m)
    hanging = np.flatnonzero(lowest >= ROOT_M)
    beside_m, beside = cKDTree(middle[rooted]).query(middle[hanging]) if len(rooted) else (np.inf, 0)
    leans_on = thing_of_cell.copy()
    leans_on[hanging] = np.where(beside_m <= BESIDE_M, thing_of_cell[rooted][beside], -1)
    return Things(thing_of_cell[of_point], _tops(leans_on, _column_tops(of_point, height_m), high_m))


def beside(xy: np.ndarray, standing_xy: np.ndarray, within_m: float) -> np.ndarray:
    """Mask (N,) of points xy (N, 2) [m] that have one of standing_xy (K, 2) about within_m or nearer."""
    if not len(xy) or not len(standing_xy):
        return np.zeros(len(xy), bool)
    _, first = np.unique(_keys(standing_xy, CELL_M), return_index=True)
    return np.isfinite(cKDTree(standing_xy[first]).query(xy, distance_upper_bound=within_m)[0])


class Free:
    """Where and when the ground was seen: ground_xy[s] (G, 2) [m] of each sweep."""

    def __init__(self, ground_xy: list[np.ndarray]) -> None:
        xy = np.concatenate(ground_xy)
        self._origin = np.floor(xy / PLACE_M).astype(np.int64).min(0, initial=0)
        self._num = len(ground_xy)
        sweep = np.repeat(np.arange(self._num), [len(one) for one in ground_xy])
        self._seen = np.unique(self._key(xy) * self._num + sweep)

    def share(self, centre: np.ndarray, size: np.ndarray, angle_rad: float, sweep: np.ndarray) -> float:
        """How many sweeps saw ground inside the rectangle but nothing of the thing, for each of those, sweep (N,) int,
        that saw the thing. centre (2,), size (2,) [m] along and across angle_rad."""
        half = np.floor((size / 2 - RIM_M) / PLACE_M)
        if (half < 0).any():
            return 0.0
        along, across = (np.arange(-n, n + 1) * PLACE_M for n in half)
        grid = np.stack(np.meshgrid(along, across), -1).reshape(-1, 2)
        ahead = np.array([np.cos(angle_rad), np.sin(angle_rad)])
        key = np.unique(self._key(centre + grid @ np.array([ahead, [-ahead[1], ahead[0]]]))) * self._num
        begin, end = np.searchsorted(self._seen, key), np.searchsorted(self._seen, key + self._num)
        free = [self._seen[b:e] - k for b, e, k in zip(begin, end, key)]
        thing = np.unique(sweep)
        return len(np.setdiff1d(np.concatenate(free), thing)) / len(thing)

    def _key(self, xy: np.ndarray) -> np.ndarray:
        ij = np.floor(xy / PLACE_M).astype(np.int64) - self._origin + (1 << 20)
        return (ij[:, 0] << 22) + ij[:, 1]


def _connected(xy: np.ndarray, gap_m: float) -> np.ndarray:
    """Labels (N,) of points (N, 2): those nearer than gap_m to each other have the same."""
    i, j = cKDTree(xy).query_pairs(gap_m, output_type="ndarray").T
    graph = coo_matrix((np.ones(len(i), bool), (i, j)), shape=(len(xy), len(xy)))
    return connected_components(graph, directed=False)[1]


def _column_tops(cell: np.ndarray, height_m: np.ndarray) -> np.ndarray:
    """The highest point of each cell (C,) that is reached from its lowest one without a gap: no branch over a roof."""
    order = np.lexsort((height_m, cell))
    cell, height_m = cell[order], height_m[order]
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    over = np.diff(height_m, prepend=0) > COLUMN_GAP_M
    over[first] = False
    gaps = np.cumsum(over)
    joined = gaps == np.repeat(gaps[first], np.diff(first, append=len(cell)))
    return np.maximum.reduceat(np.where(joined, height_m, -np.inf), first)


def _tops(thing: np.ndarray, top_m: np.ndarray, high_m: float) -> np.ndarray:
    """Heights (T,) of things from those of their cells (C,): what a tall thing only leans over is not tall itself."""
    tall = top_m > high_m
    size, num_tall = (np.bincount(thing[mask], minlength=thing.max(initial=-1) + 1)
                      for mask in (thing >= 0, (thing >= 0) & tall))
    tops = np.zeros(len(size))
    counted = (thing >= 0) & (~tall | (num_tall >= TALL_SHARE * size)[thing])
    np.maximum.at(tops, thing[counted], top_m[counted])
    return tops


def _keys(xy: np.ndarray, cell_m: float) -> np.ndarray:
    """Numbers (N,) int64 of the cells: 1 << 32 further is the next in x, 1 further the next in y."""
    ij = np.floor(xy / cell_m).astype(np.int64)
    ij -= ij.min(0) - 1
    return (ij[:, 0] << 32) + ij[:, 1]
