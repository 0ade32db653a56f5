"""A camera's rays, one per pixel through its distorted lens, and which solids they meet.

A pixel's centre has integer coordinates, as in OpenCV: pixel (u, v) looks along undistortPoints((u, v), K, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from stages.sim import sensors
from stages.sim.sensors import Spec
from stages.sim.shapes import Solids
from stages.sim.world import World

NEAR_M, FAR_M = 0.2, 110.0
F = np.float32
UP, ROUND = 2, 3        # faces beside 0 and 1, the sides along x and y
CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (0, 1)], float)
EDGES = np.array([(a, b) for a in range(8) for b in range(a) if (CORNERS[a] != CORNERS[b]).sum() == 1])


@dataclass(frozen=True)
class View:
    """What of a camera never changes, as the car keeps level. Pixel arrays are float32, (…, height, width).

    T_base_cam       (4, 4)
    ray              (3, …) direction in the ego frame, 1 along the optical axis: a range along it is a depth
    depth_m          of the ground, inf above the horizon
    ground_m         (2, …) x, y of the ground in the ego frame
    span_x, span_y   least and greatest undistorted coordinate of each pixel column (2, width) and row (2, height)
    """

    T_base_cam: np.ndarray
    ray: np.ndarray
    depth_m: np.ndarray
    ground_m: np.ndarray
    span_x: np.ndarray
    span_y: np.ndarray


@dataclass(frozen=True)
class Near:
    """The solids about the car, in the ego frame. x_m, y_m (N,) of their centres; yaw_rad (N,)."""

    parts: Solids
    x_m: np.ndarray
    y_m: np.ndarray
    yaw_rad: np.ndarray


@dataclass(frozen=True)
class Hits:
    """Where rays meet solids, (N,) each: pixel, depth_m float32, row in Near, and the face: 0, 1, UP or ROUND."""

    pixel: np.ndarray
    depth_m: np.ndarray
    row: np.ndarray
    face: np.ndarray

    def take(self, which: np.ndarray) -> Hits:
        """The chosen ones, by mask or index."""
        return Hits(self.pixel[which], self.depth_m[which], self.row[which], self.face[which])


@lru_cache(maxsize=12)
def view(channel: str, spec: Spec) -> View:
    """The camera's rays."""
    camera = sensors.CAMERAS[channel]
    u, v = np.meshgrid(np.arange(spec.width_px, dtype=float), np.arange(spec.height_px, dtype=float))
    precise = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-12)
    flat = cv2.undistortPointsIter(np.stack([u.ravel(), v.ravel()], -1)[:, None], camera.K(spec),
                                   np.array(camera.distortion), None, None, precise)
    x, y = flat[:, 0].T.reshape(2, *u.shape)
    T = sensors.T_base_sensor(channel)
    ray = np.einsum("ij,jhw->ihw", T[:3, :3], np.stack([x, y, np.ones_like(x)]))
    below = ray[2] < 0
    depth = np.where(below, -T[2, 3] / np.where(below, ray[2], 1), np.inf)
    ground = np.where(below, T[:2, 3, None, None] + ray[:2] * np.minimum(depth, 500), 0)
    return View(T, ray.astype(F), depth.astype(F), ground.astype(F),
                np.stack([x.min(axis=0), x.max(axis=0)]), np.stack([y.min(axis=1), y.max(axis=1)]))


def around(world: World, seen: View, ego: np.ndarray, t_s: float) -> Near:
    """What lies within FAR_M and not behind the camera. ego: x, y, yaw (3,)."""
    states, present = world.states(t_s)
    solids, at = world.solids, world.solids.owner
    c, s = np.cos(states[at, 2]), np.sin(states[at, 2])
    east = states[at, 0] + c * solids.x_m - s * solids.y_m - ego[0]
    north = states[at, 1] + s * solids.x_m + c * solids.y_m - ego[1]
    c, s = np.cos(ego[2]), np.sin(ego[2])
    x, y = c * east + s * north, c * north - s * east
    reach = np.hypot(solids.half_x_m, solids.half_y_m)
    off = np.stack([x - seen.T_base_cam[0, 3], y - seen.T_base_cam[1, 3]], -1)
    ahead = (off * seen.T_base_cam[:2, 2]).sum(axis=1) + reach
    near = np.flatnonzero(present[at] & (np.hypot(x, y) + reach < FAR_M) & (ahead > 0))
    parts = solids.take(near)
    return Near(parts, x[near], y[near], states[parts.owner, 2] + parts.yaw_rad - ego[2])


def cast(seen: View, near: Near) -> Hits:
    """All meetings of rays and solids."""
    parts, eye = near.parts, seen.T_base_cam[:3, 3]
    c, s = np.cos(near.yaw_rad), np.sin(near.yaw_rad)
    x, y = near.x_m - eye[0], near.y_m - eye[1]
    table = np.stack([c, s, c * x + s * y, c * y - s * x, (parts.low_m + parts.high_m) / 2 - eye[2],
                      parts.half_x_m, parts.half_y_m, (parts.high_m - parts.low_m) / 2]).astype(F)
    index = np.arange(seen.depth_m.size).reshape(seen.depth_m.shape)
    low_u, high_u, low_v, high_v = _rectangles(seen, near)
    # Boxes, then cylinders: each kind with all its pixels at once.
    none = np.empty(0, int)
    found = [(none, none.astype(F), none, none)]
    for kind, sides in ((False, _box_sides), (True, _cylinder_sides)):
        rows = np.flatnonzero((high_u > low_u) & (high_v > low_v) & (parts.round == kind))
        if not len(rows):
            continue
        windows = [(slice(low_v[i], high_v[i]), slice(low_u[i], high_u[i])) for i in rows]
        count = (high_u[rows] - low_u[rows]) * (high_v[rows] - low_v[rows])
        pixel = np.concatenate([index[window].ravel() for window in windows])
        ray_x, ray_y, ray_z = (np.concatenate([axis[window].ravel() for window in windows]) for axis in seen.ray)
        c, s, *centre_xy, z, half_x, half_y, half_z = np.repeat(table[:, rows], count, axis=1)
        enter, leave, side = sides(centre_xy, (half_x, half_y), (c * ray_x + s * ray_y, c * ray_y - s * ray_x))
        with np.errstate(divide="ignore", invalid="ignore"):
            enter_z, leave_z = _slab(z, half_z, 1 / ray_z)
        depth = np.maximum(enter, enter_z)
        met = np.flatnonzero((depth < np.minimum(leave, leave_z)) & (depth > NEAR_M))
        face = np.where(enter_z[met] > enter[met], UP, side[met])
        found.append((pixel[met], depth[met], np.repeat(rows, count).take(met), face))
    return Hits(*(np.concatenate(column) for column in zip(*found)))


def nearest(seen: View, hits: Hits) -> Hits:
    """Of each pixel the nearest; depths are told apart to 4 mm. No solid reaches below the ground."""
    far_first = np.argsort((-hits.depth_m * F(32767 / FAR_M)).astype(np.int16), kind="stable")
    last = np.full(seen.depth_m.size, -1)
    last[hits.pixel[far_first]] = far_first         # of several writes to a place the last one stays
    return hits.take(last[last >= 0])


def _slab(centre: np.ndarray, half: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle, reach = centre * inverse, half * np.abs(inverse)
    return middle - reach, middle + reach


def _box_sides(centre: tuple, half: tuple, ray: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a ray enters and leaves the four sides, and the side entered by; x and y arrays in the solid's own axes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        (enter_x, leave_x), (enter_y, leave_y) = (_slab(*axis[:2], 1 / axis[2]) for axis in zip(centre, half, ray))
    return np.maximum(enter_x, enter_y), np.minimum(leave_x, leave_y), (enter_y > enter_x).view(np.int8)


def _cylinder_sides(centre: tuple, half: tuple, ray: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (x, y), (radius, _), (ray_x, ray_y) = centre, half, ray
    square = ray_x**2 + ray_y**2
    middle = (x * ray_x + y * ray_y) / square
    inside = radius**2 - (y * ray_x - x * ray_y) ** 2 / square
    reach = np.sqrt(np.maximum(inside, 0) / square)
    return np.where(inside > 0, middle - reach, np.inf), middle + reach, np.full(len(x), ROUND, np.int8)


def _rectangles(seen: View, near: Near) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Half-open pixel rectangles low_u, high_u, low_v, high_v that hold each solid's picture; empty where it has none.

    The corners of what lies before the near plane bound it in undistorted coordinates; then the columns and rows that
    reach into those bounds are taken, which holds for any lens.
    """
    parts = near.parts
    c, s = np.cos(near.yaw_rad)[:, None], np.sin(near.yaw_rad)[:, None]
    dx, dy = parts.half_x_m[:, None] * CORNERS[:, 0], parts.half_y_m[:, None] * CORNERS[:, 1]
    z = parts.low_m[:, None] + (parts.high_m - parts.low_m)[:, None] * CORNERS[:, 2]
    corners = np.stack([near.x_m[:, None] + c * dx - s * dy, near.y_m[:, None] + s * dx + c * dy, z], -1)
    corners = (corners - seen.T_base_cam[:3, 3]) @ seen.T_base_cam[:3, :3]
    a, b = corners[:, EDGES[:, 0]], corners[:, EDGES[:, 1]]
    rise = b[..., 2] - a[..., 2]
    share = np.clip((NEAR_M - a[..., 2]) / np.where(rise == 0, 1, rise), 0, 1)[..., None]
    points = np.concatenate([corners, a + share * (b - a)], axis=1)
    before = points[..., 2] >= NEAR_M - 1e-9
    flat = points[..., :2] / np.where(before, points[..., 2], 1)[..., None]
    low = np.where(before[..., None], flat, np.inf).min(axis=1)
    high = np.where(before[..., None], flat, -np.inf).max(axis=1)
    low_u, low_v = (np.searchsorted(span[1], low[:, i]) for i, span in enumerate((seen.span_x, seen.span_y)))
    high_u, high_v = (np.searchsorted(span[0], high[:, i], side="right")
                      for i, span in enumerate((seen.span_x, seen.span_y)))
    return low_u, high_u, low_v, high_v
