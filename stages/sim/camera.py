"""What a camera sees: the ground, and the nearest solid of each pixel's ray, painted and lit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from stages.sim.rays import ROUND, UP, F, Hits, Near, View, around, cast, nearest, view
from stages.sim.sensors import Spec
from stages.sim.shapes import BODY, GLASS, HOUSE, LEAVES, SHADOW, SIGNAL, TAIL
from stages.sim.street import RASTER_M, Ground
from stages.sim.world import World

FOG_M = 260.0
JPEG = (cv2.IMWRITE_JPEG_QUALITY, 90,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
HORIZON_RGB, ZENITH_RGB = np.array([206, 214, 222], F), np.array([116, 156, 206], F)
SUN = np.array([0.45, 0.62])    # east and north part of the direction to it
WHEEL_RGB, PLATE_RGB, HEADLAMP_RGB = (26, 26, 28), (232, 232, 226), (250, 248, 226)
TAILLAMP_RGB, GLASS_RGB, WINDOW_RGB = (206, 18, 20), (34, 42, 52), (74, 88, 102)


@dataclass(frozen=True)
class Picture:
    """An exposure: rgb (height, width, 3) uint8, and per pixel the owner seen as in World.solids, -1 ground and sky."""

    rgb: np.ndarray
    owner: np.ndarray


def expose(world: World, ground: Ground, channel: str, spec: Spec, t_s: float) -> Picture:
    """The camera's picture at one instant."""
    seen = view(channel, spec)
    ego = world.ego.pose(t_s)
    rgb = _empty(ground, channel, spec, ego)
    near = around(world, seen, ego, t_s)
    hits = nearest(seen, cast(seen, near))
    solid = near.parts.material.take(hits.row) != SHADOW
    rgb[:, hits.pixel[~solid]] *= 0.42
    hits = hits.take(solid)
    rgb[:, hits.pixel] = _paint(seen, near, ego[2], hits)
    owner = np.full(seen.depth_m.size, -1)
    owner[hits.pixel] = near.parts.owner.take(hits.row)
    shape = seen.depth_m.shape
    return Picture(cv2.convertScaleAbs(cv2.merge(tuple(rgb.reshape(3, *shape)))), owner.reshape(shape))


def jpeg(picture: Picture) -> bytes:
    """The picture as a JPEG file, colours at full resolution."""
    return cv2.imencode(".jpg", picture.rgb[..., ::-1], JPEG)[1].tobytes()


@lru_cache(maxsize=12)
def _air(channel: str, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Clearness (height, width) and haze (3, height, width): ground is seen as rgb * clear + haze, sky as haze."""
    seen = view(channel, spec)
    clear = np.exp(-seen.depth_m / FOG_M)
    up = np.clip(seen.ray[2] / np.linalg.norm(seen.ray, axis=0) * 2.2, 0, 1)
    horizon, zenith = HORIZON_RGB[:, None, None], ZENITH_RGB[:, None, None]
    return clear, np.where(clear > 0, (1 - clear) * horizon, horizon + up * (zenith - horizon)).astype(F)


def _empty(ground: Ground, channel: str, spec: Spec, ego: np.ndarray) -> np.ndarray:
    """Ground and sky without anything on it, (3, pixels) float32."""
    c, s = F(np.cos(ego[2]) / RASTER_M), F(np.sin(ego[2]) / RASTER_M)
    left, low = ((ego[:2] - ground.origin_m) / RASTER_M).astype(F)
    x, y = view(channel, spec).ground_m
    rgb = cv2.remap(ground.rgb, c * x - s * y + left, s * x + c * y + low, cv2.INTER_LINEAR,
                    borderMode=cv2.BORDER_REPLICATE)
    clear, haze = _air(channel, spec)
    return (np.stack(cv2.split(rgb)) * clear + haze).reshape(3, -1)


def _paint(seen: View, near: Near, ego_yaw: float, hits: Hits) -> np.ndarray:
    """Colours (3, N) float32 of the points met: base colour, what is painted on it, light by the face, fog by depth."""
    parts, eye, row, face = near.parts, seen.T_base_cam[:3, 3].astype(F), hits.row, hits.face
    table = np.stack([np.cos(near.yaw_rad), np.sin(near.yaw_rad), near.x_m - eye[0], near.y_m - eye[1], *parts.rgb.T])
    c, s, x, y, *colour = table.astype(F).take(row, axis=1)
    colour = np.stack(colour)
    dx, dy, dz = seen.ray.reshape(3, -1).take(hits.pixel, axis=1) * hits.depth_m
    dx -= x
    dy -= y
    at = np.stack([c * dx + s * dy, c * dy - s * dx, dz + eye[2]])        # in the solid's own frame
    positive = (at[1] > 0) & (face == 1) | (at[0] > 0) & (face == 0)

    # Light: the face's normal in the map frame against the sun. Columns: +x, +y, -x, -y, up, down.
    normal = near.yaw_rad[:, None] + ego_yaw + np.arange(4) * np.pi / 2
    light = np.concatenate([_light(normal), np.tile([[1.0, 0.5]], (len(normal), 1))], axis=1)
    bright = light.astype(F).ravel().take(6 * row + np.where(face >= UP, 4 + (dz > 0), face + 2 * ~positive))
    curved = np.flatnonzero(face == ROUND)
    bright[curved] = _light(np.arctan2(at[1, curved], at[0, curved]) + (near.yaw_rad + ego_yaw).astype(F)[row[curved]])

    material = parts.material.astype(np.int8).take(row)
    for chosen, decorate in (((material == BODY) | (material == TAIL) | (material == GLASS), _vehicle),
                             (material == HOUSE, _house)):
        which = np.flatnonzero(chosen & (face < UP))
        size = np.stack([parts.half_x_m, parts.half_y_m, parts.low_m, parts.high_m]).astype(F).take(row[which], axis=1)
        for mask, rgb in decorate(at[:, which], size, face[which] == 0, positive[which], material[which]):
            colour[:, which[mask]] = np.array(rgb)[:, None]
    leaves = np.flatnonzero(material == LEAVES)
    along, left, z = at[:, leaves]
    colour[:, leaves] *= 1 + F(0.28) * np.sin(23 * along + 3 * z) * np.sin(19 * left - 2 * z) * np.sin(11 * z)

    clear = np.exp(hits.depth_m / F(-FOG_M))
    glow = np.flatnonzero(material == SIGNAL)
    bright[glow], clear[glow] = 1, 1
    return colour * (bright * clear) + (1 - clear) * HORIZON_RGB[:, None]


def _light(normal_rad: np.ndarray) -> np.ndarray:
    """Brightness of an upright face whose normal has this direction in the map frame."""
    return 0.66 + 0.34 * np.maximum(np.cos(normal_rad) * SUN[0] + np.sin(normal_rad) * SUN[1], -0.25)


def _vehicle(at: np.ndarray, size: np.ndarray, end: np.ndarray, front: np.ndarray,
             material: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """Wheels, plates, lamps and windows: masks (N,) and their colours.

    at (3, N) in the solid's frame, size (4, N) half_x, half_y, low, high; end: whether a front or rear face
    """
    (along, left, z), (half_x, half_y, low, high) = at, size
    share, body, glass = (z - low) / (high - low), material == BODY, material == GLASS
    lamp = end & (np.abs(left) > 0.62 * half_y) & (share > 0.45) & (share < 0.85)
    wheel = ~end & ((np.abs(along) - 0.62 * half_x) ** 2 + (z - 0.33) ** 2 < 0.11)
    return [(body & wheel, WHEEL_RGB), (body & end & (np.abs(left) < 0.3 * half_y) & (share < 0.35), PLATE_RGB),
            (body & lamp & front, HEADLAMP_RGB), (~glass & lamp & ~front, TAILLAMP_RGB),
            (glass & (share > 0.12) & (share < 0.82), GLASS_RGB)]


def _house(at: np.ndarray, size: np.ndarray, end: np.ndarray, *_: np.ndarray) -> list[tuple[np.ndarray, tuple]]:
    """Windows in rows and columns."""
    across, floor = np.where(end, at[1], at[0]) / F(2.4), (at[2] - F(0.8)) / F(2.8)
    column, row = np.abs(across - np.round(across)) < 0.24, floor - np.floor(floor) < 0.5
    return [(column & row & (floor > 0) & (size[3] - at[2] > 0.6), WINDOW_RGB)]
