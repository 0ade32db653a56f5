"""Which grid cells a scene is in.

The map is cut into squares of cell_m. A scene is in every cell within half a cell of its path, so at each point in the
four cells around the nearest grid corner. Hence two scenes that come closer than cell_m to each other (in x and in y)
share a cell, on whatever side of a border they are; scenes that share none are at least cell_m apart.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from stages.lib import tables
from stages.lib.features import Rows, rows_of

CELLS = {"scene": pl.Int64, "ix": pl.Int64, "iy": pl.Int64}
"""scene: row of the scenes table; the cell is [ix, ix + 1) x [iy, iy + 1) in units of cell_m."""


def cells(scenes: pl.DataFrame, motion: pl.LazyFrame, cell_m: float) -> pl.DataFrame:
    """The cells of each scene (CELLS), sorted. A scene of a drive without any row of motion has none.

    scenes  SCENES; motion: MOTION, in which a drive's rows stand together in order of stamp. Between its rows the path
    is straight, and no cell on it is left out; it begins and ends with the rows just outside the scene.
    """
    found = [_cells_of(rows, cell_m) for rows in rows_of(scenes, motion, ["x_m", "y_m"])]
    table = pl.concat([tables.frame({}, CELLS), *found])
    around = [table.with_columns(pl.col("ix") - dx, pl.col("iy") - dy) for dx in (0, 1) for dy in (0, 1)]
    return pl.concat(around).unique().sort("scene", "ix", "iy")


def _cells_of(rows: Rows, cell_m: float) -> pl.DataFrame:
    """The grid corners nearest to the paths, as CELLS, each once per scene."""
    known = rows.last > rows.first
    scene = rows.scene[known]
    begin = np.maximum(rows.begin - 1, rows.first)[known]
    end = np.minimum(rows.end, rows.last - 1)[known]
    xy = np.stack([rows.columns["x_m"], rows.columns["y_m"]], -1) / cell_m
    corner = _corner(xy)
    moves = np.flatnonzero((np.diff(corner, axis=0) != 0).any(1))
    from_, to = np.searchsorted(moves, begin), np.searchsorted(moves, end)
    step = moves[_ranges(from_, to)]
    segment, passed = _passed(xy[step], xy[step + 1])
    corners = np.concatenate([corner[begin], passed])
    scenes = np.concatenate([scene, np.repeat(scene, to - from_)[segment]])
    return pl.DataFrame({"scene": scenes, "ix": corners[:, 0], "iy": corners[:, 1]}, schema=CELLS).unique()


def _corner(xy: np.ndarray) -> np.ndarray:
    """The grid corner (…, 2) int64 nearest to points (…, 2) in units of cell_m."""
    return np.floor(xy + 0.5).astype(np.int64)


def _passed(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(segment (P,), corner (P, 2)): the corners nearest to some point of the segments start (N, 2) to stop (N, 2),
    and at times one more beside them: a piece shorter than a cell that moves in x and y is given all four of its box.
    """
    num = (np.abs(stop - start).max(1, initial=0) // 1).astype(np.int64) + 1
    segment = np.repeat(np.arange(len(start)), num)
    piece = _ranges(np.zeros_like(num), num)[:, None]
    way = (stop - start)[segment] / num[segment][:, None]
    a, b = _corner(start[segment] + way * piece), _corner(start[segment] + way * (piece + 1))
    box = [a, b, np.stack([a[:, 0], b[:, 1]], -1), np.stack([b[:, 0], a[:, 1]], -1)]
    return np.tile(segment, 4), np.concatenate(box)


def _ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The integers of all ranges [begin, end) after each other."""
    num = end - begin
    return np.repeat(begin - (np.cumsum(num) - num), num) + np.arange(num.sum())
