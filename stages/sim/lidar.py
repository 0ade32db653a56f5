"""What the turning lidar sees: a ray per azimuth and beam, each at its own time, cast against the world's solids.

Vehicle and lidar stand upright and all solids are upright too, so an azimuth is a vertical plane: footprints are met in
two dimensions once per azimuth, and beams only differ by height.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.lib import geometry
from stages.sim import sensors
from stages.sim.sensors import Spec
from stages.sim.shapes import REFLECTANCE, SHADOW, Solids
from stages.sim.world import World

NOISE_M = 0.006
RANGE_STEP_M = 0.002
GROUND_REFLECTANCE = 18.0


@dataclass(frozen=True)
class Sweep:
    """The returns of one turn, in the order of firing.

    xyz_m      (N, 3) float32, in the lidar's frame at each point's own time: not corrected for motion
    intensity  (N,) float32, 0 to 255
    ring       (N,) uint16, beam from the lowest up
    offset_ns  (N,) uint32, after the turn's begin
    owner      (N,) whose surface it is: as in World.solids, -1 the ground
    """

    xyz_m: np.ndarray
    intensity: np.ndarray
    ring: np.ndarray
    offset_ns: np.ndarray
    owner: np.ndarray


def sweep(world: World, spec: Spec, begin_s: float, rng: np.random.Generator) -> Sweep:
    """The turn that begins at begin_s."""
    elevation, azimuth = sensors.elevations_rad(spec), sensors.azimuths_rad(spec)
    offset_ns = (np.arange(spec.num_azimuths) * (sensors.LIDAR_TURN_US * 1000 / spec.num_azimuths)).astype(np.uint32)
    t_s = begin_s + offset_ns * 1e-9
    T_base_lidar = sensors.T_base_sensor("LIDAR_TOP")
    height_m = T_base_lidar[2, 3]
    ego = world.ego.pose(t_s)
    c, s = np.cos(ego[:, 2]), np.sin(ego[:, 2])
    origin = ego[:, :2] + np.stack([c * T_base_lidar[0, 3] - s * T_base_lidar[1, 3],
                                    s * T_base_lidar[0, 3] + c * T_base_lidar[1, 3]], -1)
    heading = ego[:, 2] + geometry.yaw_rad(geometry.split(T_base_lidar)[1]) + azimuth

    states, present = world.states(t_s)
    solid, column = _candidates(world.solids, states, present, origin, heading)
    parts = world.solids.take(solid)
    near, far, cosine = _footprints(parts, states[parts.owner, column], origin[column], heading[column])

    one = np.float32
    slope = np.tan(elevation).astype(one)
    low, high = (np.multiply.outer((z - height_m).astype(one), 1 / slope) for z in (parts.low_m, parts.high_m))
    entry = np.maximum(near.astype(one)[:, None], np.minimum(low, high))
    met = (entry < np.minimum(far.astype(one)[:, None], np.maximum(low, high))) & (entry > 0.3)
    entry[~met] = np.inf

    # Rows of one azimuth lie together: the nearest of each group, and then the ground if it is nearer still.
    floor = np.where(slope < 0, height_m / np.abs(slope), np.inf).astype(one)
    reach = np.full((spec.num_azimuths, spec.num_beams), np.inf, one)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    reach[column[starts]] = np.minimum.reduceat(entry, starts, axis=0)
    row, beam = np.nonzero((entry == reach[column]) & met & (entry < floor))
    reach = np.minimum(reach, floor)
    owner = np.full(reach.shape, -1)
    shine = np.full(reach.shape, GROUND_REFLECTANCE)
    owner[column[row], beam] = parts.owner[row]
    top = entry[row, beam] > near[row]
    shine[column[row], beam] = REFLECTANCE[parts.material[row]] * (0.35 + 0.65 * np.where(top, 0.8, cosine[row]))

    column, ring, xyz, fade, flicker = _returns(spec, reach / np.cos(elevation), rng)
    intensity = np.clip(np.round(shine[column, ring] * fade + 3 * flicker), 0, 255).astype(np.float32)
    return Sweep(xyz, intensity, ring.astype(np.uint16), offset_ns[column], owner[column, ring])


def _returns(spec: Spec, range_m: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The rays that return: azimuth, beam, xyz (N, 3) float32, and how the range and chance change the intensity.

    With range noise, drop-out that grows with the range, and the sensor's own rounding.
    """
    elevation, azimuth = sensors.elevations_rad(spec), sensors.azimuths_rad(spec)
    noise, chance, flicker = rng.standard_normal((3, *range_m.shape), dtype=np.float32)
    lost = chance > 1.7 - 1.1 * np.minimum(range_m / sensors.LIDAR_RANGE_M, 1)
    kept = (range_m < sensors.LIDAR_RANGE_M) & ~lost
    column, ring = np.nonzero(kept)
    noisy = range_m[kept] + NOISE_M * np.clip(noise[kept], -2.5, 2.5)
    noisy = np.round(noisy / RANGE_STEP_M) * RANGE_STEP_M
    flat = noisy * np.cos(elevation)[ring]
    xyz = np.stack([flat * np.cos(azimuth)[column], flat * np.sin(azimuth)[column],
                    noisy * np.sin(elevation)[ring]], -1)
    return column, ring, xyz.astype(np.float32), 1 / (1 + (range_m[kept] / 60) ** 2), flicker[kept]


def _candidates(solids: Solids, states: np.ndarray, present: np.ndarray, origin: np.ndarray,
                heading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(solid, azimuth) pairs that may meet, by azimuth: each solid with the azimuths about its place at half turn."""
    half = len(origin) // 2
    x, y, yaw = states[solids.owner, half, :3].T
    dx = x + np.cos(yaw) * solids.x_m - np.sin(yaw) * solids.y_m - origin[half, 0]
    dy = y + np.sin(yaw) * solids.x_m + np.cos(yaw) * solids.y_m - origin[half, 1]
    distance = np.hypot(dx, dy)
    moved = _stray(states[:, [0, half, -1], :2]) + _stray(origin[None, [0, half, -1]])
    radius = np.hypot(solids.half_x_m, solids.half_y_m) + 0.05 + moved[solids.owner]
    near = np.flatnonzero(present[solids.owner].any(axis=1) & (distance < sensors.LIDAR_RANGE_M + radius)
                          & (solids.material != SHADOW))
    # The turn is clockwise: azimuth j looks along heading[half] - (j - half) steps, but for the ego's own turning.
    step = 2 * np.pi / len(origin)
    drift = np.abs(heading[[0, -1]] - heading[half] - step * np.array([half, half + 1 - len(origin)])).max() / step
    behind = (heading[half] + half * step - np.arctan2(dy, dx)[near]) / step
    spread = np.arcsin(np.minimum(radius[near] / np.maximum(distance[near], 1e-6), 1)) / step + drift + 1
    spread = np.where(distance[near] < radius[near], len(origin) / 2, spread)
    first = np.ceil(behind - spread).astype(int)
    count = np.minimum(np.floor(behind + spread).astype(int) - first + 1, len(origin))
    solid = np.repeat(near, count)
    column = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    column %= len(origin)
    alive = present[solids.owner[solid], column]
    order = np.argsort(column[alive], kind="stable")
    return solid[alive][order], column[alive][order]


def _stray(xy_m: np.ndarray) -> np.ndarray:
    """How far (N,) [m] tracks of begin, middle and end (N, 3, 2) lead from their middle."""
    return np.linalg.norm(xy_m[:, [0, 2]] - xy_m[:, [1]], axis=-1).max(axis=1)


def _footprints(parts: Solids, pose: np.ndarray, origin: np.ndarray,
                heading: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where rays in the plane enter and leave footprints, and the cosine of incidence; (N,) each, one ray per part.

    pose    (N, 3) x, y, yaw of the owner at the ray's time
    origin  (N, 2) and heading (N,) of the ray, map frame
    """
    c, s = np.cos(pose[:, 2]), np.sin(pose[:, 2])
    x = pose[:, 0] + c * parts.x_m - s * parts.y_m - origin[:, 0]
    y = pose[:, 1] + s * parts.x_m + c * parts.y_m - origin[:, 1]
    turned = heading - pose[:, 2] - parts.yaw_rad
    yaw = pose[:, 2] + parts.yaw_rad
    c, s = np.cos(yaw), np.sin(yaw)
    x, y = c * x + s * y, c * y - s * x                     # the part's centre from the sensor, along the part's axes
    ray_x, ray_y = np.cos(turned), np.sin(turned)
    with np.errstate(divide="ignore"):
        inv_x, inv_y = 1 / ray_x, 1 / ray_y
    half_x, half_y = parts.half_x_m * np.abs(inv_x), parts.half_y_m * np.abs(inv_y)
    enter_x, enter_y = x * inv_x - half_x, y * inv_y - half_y
    near, far = np.maximum(enter_x, enter_y), np.minimum(x * inv_x + half_x, y * inv_y + half_y)
    cosine = np.where(enter_x > enter_y, np.abs(ray_x), np.abs(ray_y))

    along, across = x * ray_x + y * ray_y, y * ray_x - x * ray_y
    inside = parts.half_x_m**2 - across**2
    half_chord = np.sqrt(np.maximum(inside, 0))
    near = np.where(parts.round, np.where(inside > 0, along - half_chord, np.inf), near)
    far = np.where(parts.round, np.where(inside > 0, along + half_chord, -np.inf), far)
    return near, far, np.where(parts.round, half_chord / parts.half_x_m, cosine)
