"""The ego trajectory as something to ask: poses at any stamp it covers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.lib import geometry, tables


@dataclass(frozen=True)
class Poses:
    """T_map_ego over time: stamps_us (N,) int64 strictly increasing, xyz_m (N, 3), rotations_wxyz (N, 4)."""

    stamps_us: np.ndarray
    xyz_m: np.ndarray
    rotations_wxyz: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Poses:
        """The poses of a trajectory.parquet."""
        table = tables.read(path, ["stamp_us", *tables.POSE])
        return cls(table["stamp_us"].to_numpy(), table.select("x_m", "y_m", "z_m").to_numpy(),
                   table.select("qw", "qx", "qy", "qz").to_numpy())

    def covered(self, start_us: np.ndarray, end_us: np.ndarray, max_gap_us: float) -> np.ndarray:
        """(M,) bool: which intervals [start_us, end_us] lie between the first and the last pose and touch no longer
        silence than max_gap_us."""
        if len(self.stamps_us) < 2:
            return np.zeros(len(start_us), bool)
        gaps = np.flatnonzero(np.diff(self.stamps_us) > max_gap_us)
        silent_from, silent_to = self.stamps_us[gaps], self.stamps_us[gaps + 1]
        inside = (start_us >= self.stamps_us[0]) & (end_us <= self.stamps_us[-1])
        # The first silence that ends after an interval's start must begin at or after its end.
        after = np.searchsorted(silent_to, start_us, side="right")
        begins = np.append(silent_from, np.iinfo(np.int64).max)
        return inside & (end_us <= begins[after])

    def at(self, at_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (M, 3) [m] and rotations (M, 4) wxyz at stamps (M,). Raises ValueError outside the trajectory."""
        first = max(0, np.searchsorted(self.stamps_us, np.min(at_us), side="right") - 1)
        last = np.searchsorted(self.stamps_us, np.max(at_us)) + 1
        around = slice(min(first, len(self.stamps_us) - 2), max(last, first + 2))
        return geometry.interpolate_poses(self.stamps_us[around], self.xyz_m[around], self.rotations_wxyz[around],
                                          at_us)

    def T_map_ego(self, at_us: np.ndarray) -> np.ndarray:
        """Transforms (M, 4, 4) at stamps (M,)."""
        xyz, rotations_wxyz = self.at(at_us)
        T = np.tile(np.eye(4), (len(xyz), 1, 1))
        T[:, :3, :3] = geometry.rotation(rotations_wxyz).as_matrix()
        T[:, :3, 3] = xyz
        return T
