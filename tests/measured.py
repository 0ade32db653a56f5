"""How far what a dataset shows lies from where the simulator put it: bollards in cameras, things in the lidar.

Bollards are found by their colour, which nothing else has; a lidar point is met where its object was when it was hit.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import polars as pl

from stages.sim import sensors
from stages.sim.world import CONE, CONE_LWH_M
from tests.oracle import Frame

ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)
RING = np.stack([np.cos(ANGLES), np.sin(ANGLES), 0 * ANGLES], -1) * CONE_LWH_M[0] / 2
BOLLARD = np.concatenate([RING, RING + np.array([0, 0, CONE_LWH_M[2]])])
MIN_SEEN, MIN_HIGH_PX, HIDDEN_SHARE = 6, 14, 0.12
MIN_POINTS, NEIGHBOUR_M = 6, 0.15
BOUNDS = {"median_px": 0.45, "max_px": 1.5, "median_m": 0.02, "max_m": 0.06, "ground_m": 0.02}
LIDAR_BEGINS_RAD = -np.pi / 2   # a turn begins behind the car, clockwise


@dataclass(frozen=True)
class Errors:
    """px: channel -> distance (N,) of bollards' centres from where the tables put them; m: of lidar points from the
    true faces, the median of each object in each sweep (N,); ground_m: of ground points from the ground (N,)."""

    px: dict[str, np.ndarray]
    m: np.ndarray
    ground_m: np.ndarray

    def __str__(self) -> str:
        px = np.concatenate(list(self.px.values()))
        return (f"{len(px)} bollards in cameras: median {np.median(px):.2f} px, max {px.max():.2f} px; {len(self.m)} "
                f"objects in lidar: median {np.median(self.m):.3f} m, max {self.m.max():.3f} m; ground: median "
                f"{np.median(self.ground_m):.3f} m")

    def wrong(self) -> dict[str, str]:
        """Channel -> what is out of bounds; empty where all is well."""
        found = {}
        for channel, px in self.px.items():
            if len(px) < MIN_SEEN:
                found[channel] = f"{len(px)} bollards where they should be"
            elif np.median(px) > BOUNDS["median_px"] or px.max() > BOUNDS["max_px"]:
                found[channel] = f"median {np.median(px):.2f} px, max {px.max():.2f} px"
        if (np.median(self.m) > BOUNDS["median_m"] or self.m.max() > BOUNDS["max_m"]
                or np.median(self.ground_m) > BOUNDS["ground_m"]):
            found["LIDAR_TOP"] = (f"median {np.median(self.m):.3f} m, max {self.m.max():.3f} m, ground "
                                  f"{np.median(self.ground_m):.3f} m")
        return found


def measure(found: list[Frame], truth: pl.DataFrame) -> Errors:
    """The errors of all camera frames and every third sweep."""
    bollards = truth.filter(pl.col("category") == CONE).unique("object_id").select("x_m", "y_m").to_numpy()
    tracks = [Track.of(rows) for _, rows in sorted(truth.filter(
        pl.col("category").is_in([CONE, "vehicle.car", "vehicle.bus.rigid"])).partition_by(
            "object_id", as_dict=True).items())]
    px = {channel: np.concatenate([bollard_errors(frame, bollards) for frame in found if frame.channel == channel])
          for channel in sensors.CAMERAS}
    sweeps = [frame for frame in found if frame.channel == "LIDAR_TOP"][::3]
    m, ground_m = zip(*(lidar_errors(frame, tracks) for frame in sweeps))
    return Errors(px, np.concatenate(m), np.concatenate(ground_m))


def bollard_errors(frame: Frame, bollards: np.ndarray) -> np.ndarray:
    """Distance (N,) [px] from the centre of each bollard that is seen whole to that of the nearest projected one.

    bollards (M, 2) [m]
    """
    points = BOLLARD + np.column_stack([bollards, np.zeros(len(bollards))])[:, None]
    uv, depth = frame.project(points.reshape(-1, 3))
    ahead = depth.reshape(len(bollards), -1).min(1) > 1
    outlines = np.array([centre_and_area(cv2.convexHull(one)[:, 0].astype(float))
                         for one in uv.reshape(len(bollards), -1, 2)[ahead].astype(np.float32)]).reshape(-1, 3)
    errors = []
    for u, v, area in blobs(frame.image) if len(outlines) else ():
        distance = np.hypot(outlines[:, 0] - u, outlines[:, 1] - v)
        nearest = int(np.argmin(distance))
        if abs(area / outlines[nearest, 2] - 1) < HIDDEN_SHARE:
            errors.append(distance[nearest])
    return np.array(errors)


def blobs(image: np.ndarray) -> list[tuple[float, float, float]]:
    """Centre u, v [px] and area [px2] of each thing of the bollards' colour that touches neither edge nor another."""
    red, green, blue = image.astype(float).transpose(2, 0, 1)
    share = np.clip(np.minimum((red - green) / 160, (green - blue) / 95), 0, 1)
    share[share < 0.05] = 0
    number, label, boxes, _ = cv2.connectedComponentsWithStats((share > 0.5).astype(np.uint8))
    found = []
    for i in range(1, number):
        left, top, width, height, _ = boxes[i]
        window = np.s_[max(top - 3, 0):top + height + 3, max(left - 3, 0):left + width + 3]
        part = share[window]
        alone = part.shape == (height + 6, width + 6) and set(np.unique(label[window])) == {0, i}
        if alone and height >= MIN_HIGH_PX:
            v, u = np.mgrid[window]
            found.append(((part * u).sum() / part.sum(), (part * v).sum() / part.sum(), part.sum()))
    return found


def centre_and_area(outline: np.ndarray) -> tuple[float, float, float]:
    """Centre u, v and area of a polygon (N, 2)."""
    after = np.roll(outline, -1, axis=0)
    cross = outline[:, 0] * after[:, 1] - after[:, 0] * outline[:, 1]
    area = cross.sum() / 2
    u, v = ((outline + after) * cross[:, None]).sum(0) / (6 * area)
    return u, v, abs(area)


@dataclass(frozen=True)
class Track:
    """An object's truth over time: stamps_us (N,); xy_yaw (N, 3) with unwrapped yaw; size_lwh_m (3,)."""

    is_bollard: bool
    size_lwh_m: np.ndarray
    stamps_us: np.ndarray
    xy_yaw: np.ndarray

    @classmethod
    def of(cls, rows: pl.DataFrame) -> Track:
        """The track of one object's rows."""
        rows = rows.sort("stamp_us")
        yaw = np.unwrap(rows["yaw_rad"].to_numpy())
        return cls(rows["category"][0] == CONE, rows.select("length_m", "width_m", "height_m").to_numpy()[0],
                   rows["stamp_us"].to_numpy(), np.column_stack([rows["x_m"], rows["y_m"], yaw]))

    def at(self, at_us: np.ndarray) -> np.ndarray:
        """x, y, yaw (3, M) at the stamps."""
        return np.stack([np.interp(at_us, self.stamps_us, column) for column in self.xy_yaw.T])

    def distance_m(self, xyz_map: np.ndarray, at_us: np.ndarray) -> np.ndarray:
        """Distance (M,) [m] from the side faces, negative inside, of those points (N, 3) that can only lie on them."""
        length, width, height = self.size_lwh_m
        low = 0.1 if self.is_bollard else 0.27 * height
        near = np.hypot(*(xyz_map[:, :2].T - self.at(np.median(at_us))[:2, None])) < length / 2 + 3
        near &= (xyz_map[:, 2] > low) & (xyz_map[:, 2] < 0.44 * height)
        near &= (at_us >= self.stamps_us[0]) & (at_us <= self.stamps_us[-1])
        x, y, yaw = self.at(at_us[near])
        dx, dy = xyz_map[near, 0] - x, xyz_map[near, 1] - y
        if self.is_bollard:
            return np.hypot(dx, dy) - length / 2
        along, left = np.cos(yaw) * dx + np.sin(yaw) * dy, np.cos(yaw) * dy - np.sin(yaw) * dx
        beyond = np.abs([along, left]).T - [length / 2, width / 2]
        return np.where((beyond > 0).any(1), np.hypot(*np.maximum(beyond, 0).T), beyond.max(1))


def lidar_errors(frame: Frame, tracks: list[Track]) -> tuple[np.ndarray, np.ndarray]:
    """(of each object the median distance of its points from its faces [m], distance of ground points [m]).

    An object is met where it was when the lidar looked there: a point's time follows from its azimuth.
    """
    xyz = frame.points[:, :3]
    share = (LIDAR_BEGINS_RAD - np.arctan2(xyz[:, 1], xyz[:, 0])) % (2 * np.pi) / (2 * np.pi)
    at_us = frame.stamp_us + (share - 0.5) * sensors.LIDAR_TURN_US
    xyz = xyz @ frame.T_map_sensor[:3, :3].T + frame.T_map_sensor[:3, 3]
    away = np.hypot(*(xyz[:, :2] - frame.T_map_ego[:2, 3]).T)
    ground_m = np.abs(xyz[(np.abs(xyz[:, 2]) < 0.15) & (away > 5), 2])
    errors = []
    xyz, at_us = xyz[xyz[:, 2] > 0.1], at_us[xyz[:, 2] > 0.1]
    for track in tracks:
        own = track.distance_m(xyz, at_us)
        own = own[own < NEIGHBOUR_M]
        if len(own) >= MIN_POINTS:
            errors.append(np.median(np.abs(own)))
    return np.array(errors), ground_m
