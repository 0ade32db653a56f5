"""Boxes to training targets on the detector's grid, and the losses (CenterPoint, arXiv 2006.11275).

Boxes are (M, 9): x, y, z [m], length, width, height [m], yaw [rad], vx, vy [m/s] (NaN where unknown), in the ego frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

MIN_OVERLAP = 0.1  # IoU that a box has at least whose corners are off by the Gaussian's radius
MIN_RADIUS_CELLS = 2
CODE = {"offset": 2, "z": 1, "size": 3, "heading": 2, "velocity": 2}
"""What is regressed at a peak: offset of the centre in its cell [cells], z [m], log of length, width, height [m],
sin and cos of the yaw, velocity [m/s]. Part -> number of channels, in the order of the channels."""
CODE_SIZE = sum(CODE.values())


@dataclass(frozen=True)
class Grid:
    """The output cells: (height, width) of them, square, cell (0, 0) at (x_min_m, y_min_m); columns go along +x."""

    x_min_m: float
    y_min_m: float
    cell_m: float
    width: int
    height: int

    def cells(self, xy_m: np.ndarray) -> np.ndarray:
        """Positions (M, 2), in cells: column, row."""
        return (xy_m - (self.x_min_m, self.y_min_m)) / self.cell_m

    def inside(self, xy_m: np.ndarray) -> np.ndarray:
        """(M,) bool: the position lies in a cell of the grid."""
        column, row = np.floor(self.cells(xy_m)).T
        return (column >= 0) & (column < self.width) & (row >= 0) & (row < self.height)


@dataclass(frozen=True)
class Targets:
    """What one sample's outputs should be.

    heat          (C, height, width) float32: 1 at a box's cell, Gaussian around it
    heat_weight   (C, height, width) float32: weight of the heat loss; 0 around boxes to ignore
    cells         (M,) int64: row * width + column of each wanted box
    code          (M, CODE_SIZE) float32, see `encode`; NaN where unknown
    code_weight   (M,) float32
    """

    heat: np.ndarray
    heat_weight: np.ndarray
    cells: np.ndarray
    code: np.ndarray
    code_weight: np.ndarray


def encode(boxes: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(cells (M,) int64, code (M, CODE_SIZE)) of boxes (M, 9) whose centres are inside the grid."""
    position = grid.cells(boxes[:, :2])
    corner = np.floor(position)
    cells = (corner[:, 1] * grid.width + corner[:, 0]).astype(np.int64)
    code = np.concatenate([position - corner, boxes[:, 2:3], np.log(boxes[:, 3:6]),
                           np.sin(boxes[:, 6:7]), np.cos(boxes[:, 6:7]), boxes[:, 7:9]], 1)
    return cells, code


def decode(cells: np.ndarray, code: np.ndarray, grid: Grid) -> np.ndarray:
    """Boxes (M, 9) of what `encode` gave."""
    corner = np.stack([cells % grid.width, cells // grid.width], 1)
    xy_m = (corner + code[:, :2]) * grid.cell_m + (grid.x_min_m, grid.y_min_m)
    yaw_rad = np.arctan2(code[:, 6:7], code[:, 7:8])
    return np.concatenate([xy_m, code[:, 2:3], np.exp(code[:, 3:6]), yaw_rad, code[:, 8:10]], 1)


def gaussian_radius(length: np.ndarray, width: np.ndarray) -> np.ndarray:
    """By how much (M,) both corners of a box of these sides may shift at most and still overlap it by MIN_OVERLAP.

    The smallest of three cases: the box is moved, shrunk or grown (CornerNet, arXiv 1808.01244, whose code, and
    CenterPoint's, solves them with a wrong root).
    """
    o, half, area = MIN_OVERLAP, (length + width) / 2, length * width
    moved = half - np.sqrt(half**2 - area * (1 - o) / (1 + o))
    shrunk = (half - np.sqrt(half**2 - area * (1 - o))) / 2
    grown = (np.sqrt(half**2 + area * (1 - o) / o) - half) / 2
    return np.minimum(np.minimum(moved, shrunk), grown)


@dataclass(frozen=True)
class Wanted:
    """What one sample's labels say.

    boxes       (M, 9)
    labels      (M,) int: class of each box
    weights     (M,) weight of each box in the loss
    ignored     (M,) bool: neither an object nor background
    background  weight of the cells where no box is
    """

    boxes: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    ignored: np.ndarray
    background: float

def make(wanted: Wanted, num_classes: int, grid: Grid) -> Targets:
    """The targets of one sample: none for boxes whose centre is outside the grid; no heat loss around ignored ones."""
    inside = grid.inside(wanted.boxes[:, :2])
    boxes, labels, weights, ignored = (getattr(wanted, name)[inside]
                                       for name in ("boxes", "labels", "weights", "ignored"))
    heat = np.zeros((num_classes, grid.height, grid.width), np.float32)
    heat_weight = np.full_like(heat, wanted.background)
    rows, columns = np.ogrid[:grid.height, :grid.width]

    position = grid.cells(boxes[:, :2])
    reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2 / grid.cell_m
    for i in np.flatnonzero(ignored):
        near = np.hypot(columns + 0.5 - position[i, 0], rows + 0.5 - position[i, 1]) <= reach[i]
        heat_weight[labels[i], near] = 0

    cells, code = encode(boxes[~ignored], grid)
    radius = np.maximum(np.floor(gaussian_radius(*(boxes[~ignored, 3:5].T / grid.cell_m))), MIN_RADIUS_CELLS)
    for i, cell, r in zip(np.flatnonzero(~ignored), cells, radius):
        row, column = divmod(int(cell), grid.width)
        far_rows, far_columns = abs(rows - row), abs(columns - column)
        bump = np.exp(-(far_rows**2 + far_columns**2) / (2 * ((2 * r + 1) / 6) ** 2))
        bump *= (far_rows <= r) & (far_columns <= r)
        np.maximum(heat[labels[i]], bump, out=heat[labels[i]])
        heat_weight[labels[i], row, column] = weights[i]
    return Targets(heat, heat_weight, cells, code.astype(np.float32), weights[~ignored].astype(np.float32))


def losses(heat_logits: torch.Tensor, code: torch.Tensor, batch: list[Targets]) -> dict[str, torch.Tensor]:
    """The heat map's focal loss (alpha 2, beta 4) and each code part's L1, per wanted box, as scalars.

    heat_logits (B, C, height, width); code (B, CODE_SIZE, height, width). Unknown codes (NaN) cost nothing.
    """
    heat, heat_weight = (torch.from_numpy(np.stack([getattr(t, name) for t in batch])).to(code.device)
                         for name in ("heat", "heat_weight"))
    probability = heat_logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = heat == 1
    per_cell = torch.where(peak, -probability.log() * (1 - probability) ** 2,
                           -(1 - probability).log() * probability**2 * (1 - heat) ** 4)
    found = {"heat": (per_cell * heat_weight).sum() / max(float((heat_weight * peak).sum()), 1.0)}

    sample = torch.from_numpy(np.repeat(np.arange(len(batch)), [len(t.cells) for t in batch])).to(code.device)
    cells, wanted, weight = (torch.from_numpy(np.concatenate([getattr(t, name) for t in batch])).to(code.device)
                             for name in ("cells", "code", "code_weight"))
    predicted = code.flatten(2)[sample, :, cells]
    known = ~wanted.isnan()
    error = (predicted - wanted.nan_to_num()).abs() * known * weight[:, None]
    total = max(float(weight.sum()), 1.0)
    start = 0
    for part, size in CODE.items():
        found[part] = error[:, start:start + size].sum() / total
        start += size
    return found
