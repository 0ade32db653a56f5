"""Lanes as tabulated paths, and how something moves along one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

STEP_M = 0.25
STEP_S = 0.01
MAX_ACCEL_MPS2 = 1.8
MAX_BRAKE_MPS2 = 2.4
MAX_LATERAL_MPS2 = 2.2


@dataclass(frozen=True)
class Path:
    """A curve in the map frame, a point each STEP_M.

    xy_m     (N, 2)
    yaw_rad  (N,) of the tangent, unwrapped
    """

    xy_m: np.ndarray
    yaw_rad: np.ndarray

    @property
    def length_m(self) -> float:
        return (len(self.yaw_rad) - 1) * STEP_M

    def pose(self, s_m: np.ndarray | float) -> np.ndarray:
        """x, y, yaw, (…, 3) [m, rad], at the arc lengths s_m (…)."""
        at = np.asarray(s_m, float) / STEP_M
        knots = np.arange(len(self.yaw_rad))
        return np.stack([np.interp(at, knots, column) for column in (*self.xy_m.T, self.yaw_rad)], -1)

    def curvature(self, s_m: np.ndarray | float) -> np.ndarray:
        """Curvature (…,) [1/m], positive to the left."""
        return np.interp(s_m, np.arange(len(self.yaw_rad)) * STEP_M, np.gradient(self.yaw_rad, STEP_M))

    def beside(self, left_m: float) -> Path:
        """The parallel path `left_m` to the left."""
        normal = np.stack([-np.sin(self.yaw_rad), np.cos(self.yaw_rad)], -1)
        return through(self.xy_m + left_m * normal)

    def backward(self) -> Path:
        """The same curve travelled the other way."""
        return Path(self.xy_m[::-1], self.yaw_rad[::-1] + np.pi)

    def between(self, start_m: float, end_m: float) -> Path:
        """The part from one arc length to another."""
        part = slice(round(start_m / STEP_M), round(end_m / STEP_M) + 1)
        return Path(self.xy_m[part], self.yaw_rad[part])


def through(points_m: np.ndarray) -> Path:
    """The path through a dense polyline (N, 2) [m]."""
    s_m = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points_m, axis=0), axis=1))])
    at = np.arange(0, s_m[-1], STEP_M)
    xy = np.stack([np.interp(at, s_m, column) for column in points_m.T], -1)
    dx, dy = np.ascontiguousarray(np.gradient(xy, axis=0).T)    # strided, arctan2 may differ in its last bit
    return Path(xy, np.unwrap(np.arctan2(dy, dx)))


def from_curvature(curvature: np.ndarray) -> Path:
    """The path from the origin along +x with this curvature (N,) [1/m] at each step."""
    yaw = np.concatenate([[0], np.cumsum((curvature[1:] + curvature[:-1]) / 2 * STEP_M)])
    mid = (yaw[1:] + yaw[:-1]) / 2
    steps = STEP_M * np.stack([np.cos(mid), np.sin(mid)], -1)
    return Path(np.concatenate([[[0, 0]], np.cumsum(steps, axis=0)]), yaw)


def moved(path: Path, yaw_rad: float, xy_m: np.ndarray) -> Path:
    """The path turned by yaw_rad about the origin, then shifted by xy_m (2,)."""
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return Path(path.xy_m @ np.array([[c, s], [-s, c]]) + xy_m, path.yaw_rad + yaw_rad)


def turn(start: np.ndarray, end: np.ndarray, handle_m: float) -> np.ndarray:
    """Points (64, 2) [m] of a smooth turn from the pose `start` to the pose `end`, (3,) each: a cubic Bézier curve."""
    p0, p3 = start[:2], end[:2]
    p1 = p0 + handle_m * np.array([np.cos(start[2]), np.sin(start[2])])
    p2 = p3 - handle_m * np.array([np.cos(end[2]), np.sin(end[2])])
    u = np.linspace(0, 1, 64)[:, None]
    return (1 - u) ** 3 * p0 + 3 * (1 - u) ** 2 * u * p1 + 3 * (1 - u) * u**2 * p2 + u**3 * p3


@dataclass(frozen=True)
class Trip:
    """Where along its path something is: s_m and speed_mps (N,) each STEP_S from start_s on. It ends where they end."""

    start_s: float
    s_m: np.ndarray
    speed_mps: np.ndarray

    @property
    def end_s(self) -> float:
        return self.start_s + (len(self.s_m) - 1) * STEP_S

    def at(self, t_s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Arc length [m] and speed [m/s] at the times t_s (…)."""
        knots = (np.asarray(t_s, float) - self.start_s) / STEP_S
        grid = np.arange(len(self.s_m))
        return np.interp(knots, grid, self.s_m), np.interp(knots, grid, self.speed_mps)

    def time_at(self, s_m: float) -> float:
        """When it first passes s_m [s]."""
        return self.start_s + int(np.searchsorted(self.s_m, s_m)) * STEP_S

    def later(self, delay_s: float, ahead_m: float = 0.0) -> Trip:
        """The same trip `delay_s` later, displaced by `ahead_m`: who follows so never comes nearer than ahead_m."""
        return replace(self, start_s=self.start_s + delay_s, s_m=self.s_m + ahead_m)


def trip(path: Path, wanted_mps: np.ndarray, stops: dict[float, float]) -> Trip:
    """Along the whole path at the wanted speed (N,) at its steps, or as fast as bends, brakes and motor allow.

    stops: arc length [m] -> rest [s]. The trip begins at time 0 at the path's start.
    """
    speed = np.minimum(wanted_mps, np.sqrt(MAX_LATERAL_MPS2 / (np.abs(np.gradient(path.yaw_rad, STEP_M)) + 1e-6)))
    rest_s = np.zeros(len(speed))
    for s_m, seconds in stops.items():
        speed[round(s_m / STEP_M)] = 0
        rest_s[round(s_m / STEP_M)] = seconds
    square = (speed**2).tolist()
    for i in range(1, len(square)):
        square[i] = min(square[i], square[i - 1] + 2 * MAX_ACCEL_MPS2 * STEP_M)
    for i in range(len(square) - 2, -1, -1):
        square[i] = min(square[i], square[i + 1] + 2 * MAX_BRAKE_MPS2 * STEP_M)
    speed = np.sqrt(square)

    arrive = np.concatenate([[0], np.cumsum(2 * STEP_M / (speed[1:] + speed[:-1]) + rest_s[:-1])])
    leave = arrive + rest_s
    accel = np.diff(speed**2) / (2 * STEP_M)
    t_s = np.arange(0, arrive[-1], STEP_S)
    i = np.clip(np.searchsorted(arrive, t_s, side="right") - 1, 0, len(accel) - 1)
    since = np.maximum(t_s - leave[i], 0)
    return Trip(0.0, (i * STEP_M) + speed[i] * since + accel[i] * since**2 / 2, speed[i] + accel[i] * since)
