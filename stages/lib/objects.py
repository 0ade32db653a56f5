"""Objects among what a scene's sweeps show: each with a category, one size and a smooth path.

What moves is tracked, what stands is known by its place. Size and heading come from all sightings of an object at once;
what no sweep showed of it lies away from the sensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from stages.lib import tracking
from stages.lib.boxes import rotate
from stages.lib.geometry import wrap_rad
from stages.lib.knobs import knob
from stages.lib.sightings import Sightings, of_rows
from stages.lib.tracking import Detections, Tracking

HEADING_SPEED_MPS = 1.0  # above it the velocity says the heading
MOVING_SHARE = 0.6  # of the least length or width that must be seen of what moves: a car from behind
STANDING_SHARES = (1.0, 0.5)  # of the least length and width that must be seen of what stands
STANDING_SCORE = 0.6
BESIDE = 0.15  # a side is seen from this much beside it, for each metre of distance
SIDE_M = 2.5  # a side this long shows the heading better than the path
MAX_OFF_RAD = 0.4  # but for a side further off than this
NUM_ROUNDS = 2  # heading from the path, middles from the heading, path from the middles
SEEN_QUANTILE = 0.85  # of the extents seen over time: the largest ones are two things that touched


@dataclass(frozen=True)
class Category:
    """Knobs of one category: [low, high] along its heading, across, and over the ground."""

    name: str = knob("e.g. vehicle.car")
    length_m: tuple[float, float] = knob("length", above=0)
    width_m: tuple[float, float] = knob("width", above=0)
    height_m: tuple[float, float] = knob("height over the ground", above=0)
    typical_lw_m: tuple[float, float] = knob("length and width where less than the low ends was seen", above=0)
    top_speed_mps: tuple[float, float] = knob("its fastest moment where it moves", low=0)
    may_stand: bool = knob("false: what never moves is none, a post is no pedestrian")


@dataclass(frozen=True)
class Motion:
    """Knobs that tell what moves from what stands."""

    min_speed_mps: float = knob("what moves is faster than this at some time", above=0)
    min_path_m: float = knob("what moves gets this far from where it was first seen", above=0)
    max_beside_share: float = knob("with more of its points beside what stands, it is a splinter of that", above=0)


@dataclass(frozen=True)
class Rules:
    """All knobs of tracks and what they may be; of the categories that fit, the first is taken."""

    tracking: Tracking
    motion: Motion
    categories: Sequence[Category]


@dataclass(frozen=True)
class Track:
    """An object in the map frame, at samples (M,) int by their place in the scene: states (M, 2, 2) of its middle as in
    `tracking`, yaw_rad and ground_z_m (M,)."""

    category: str
    size_lwh_m: np.ndarray
    stands: bool
    score: float
    sample: np.ndarray
    states: np.ndarray
    yaw_rad: np.ndarray
    ground_z_m: np.ndarray

    def box(self, at: int) -> np.ndarray:
        """x, y, z of the middle, length, width, height [m], yaw [rad], (7,), at the at-th of its samples."""
        z = self.ground_z_m[at] + self.size_lwh_m[2] / 2
        return np.array([*self.states[at, 0], z, *self.size_lwh_m, self.yaw_rad[at]])


def find(raw: pl.DataFrame, at_us: np.ndarray, rules: Rules) -> list[Track]:
    """Objects in a table RAW with their places at the stamps at_us (S,), what moves first."""
    if raw.is_empty():
        return []
    begin_us = raw["stamp_us"].min()
    at_s = (at_us - begin_us) / 1e6
    moving, standing = (of_rows(rows.sort("stamp_us", maintain_order=True), begin_us) for rows in
                        (raw.filter(pl.col("thing").is_null()), raw.drop_nulls("thing")))
    things, num_sightings = np.unique(standing.thing, return_counts=True)
    things = [standing.take(np.flatnonzero(standing.thing == thing))
              for thing in things[num_sightings >= rules.tracking.min_hits]]
    found = [*(recognise_moving(seen, at_s, rules) for seen in _tracks(moving, rules)),
             *(recognise_standing(seen, at_s, rules) for seen in things)]
    return [track for track in found if track is not None]


def _tracks(seen: Sightings, rules: Rules) -> Iterator[Sightings]:
    stamps_s, first = np.unique(seen.stamps_s, return_index=True)
    columns = (np.split(column, first[1:]) for column in (seen.centre_xy, seen.long_m, seen.num_points))
    sweeps = [Detections(*one) for one in zip(*columns)]
    for track in tracking.associate(stamps_s, sweeps, rules.tracking):
        yield seen.take(first[track[:, 0]] + track[:, 1])


def path(seen: Sightings, rules: Rules) -> np.ndarray | None:
    """States (H, 2, 2) of what was seen of a thing that moves; None where it does not.

    What moves gets away from where it was, and is no splinter of what stands.
    """
    if np.hypot(*(seen.centre_xy - seen.centre_xy[0]).T).max() < rules.motion.min_path_m:
        return None
    states = tracking.smooth(seen.times_s, seen.centre_xy, _deviation_m(seen, rules), rules.tracking.accel_mps2,
                             seen.times_s)
    fast = np.hypot(*states[:, 1].T) > rules.motion.min_speed_mps
    far = np.hypot(*(states[:, 0] - states[0, 0]).T).max() > rules.motion.min_path_m
    apart = fast.any() and np.median(seen.beside_share[fast]) <= rules.motion.max_beside_share
    return states if far and fast.sum() >= 2 and apart else None


def recognise_moving(seen: Sightings, at_s: np.ndarray, rules: Rules) -> Track | None:
    """The object of a track, at those of at_s (S,) that its sightings enclose; None where it is of no category.

    The path gives headings, headings give extents and a size, to which each sighting is completed; the middles give a
    better path.
    """
    states = path(seen, rules)
    if states is None:
        return None
    top_speed_mps = np.hypot(*states[:, 1].T).max()
    for _ in range(NUM_ROUNDS):
        yaw = _along_sides(_heading(states), seen)
        low, high = _extents(seen, yaw, states[:, 1])
        sensor = rotate(seen.sensor_xy, -yaw)
        size, known = _size(low, high, sensor, seen.num_points)
        middle = rotate(complete(low, high, sensor, size), yaw)
        states = _states_at(seen, middle, seen.times_s, rules)
    height_m = float(np.quantile(seen.top_m, SEEN_QUANTILE))
    kind = next((kind for kind in rules.categories
                 if _fits(kind, size, height_m) and _shown(kind, size).max() >= MOVING_SHARE
                 and kind.top_speed_mps[0] <= top_speed_mps <= kind.top_speed_mps[1]), None)
    if kind is None:
        return None
    full = _full_size(size, known, kind)
    middle = rotate(complete(low, high, sensor, full), yaw)
    sample = _during(seen, at_s)
    return Track(kind.name, np.append(full, height_m), False, _score(seen, size, kind, 1.0), sample,
                 _states_at(seen, middle, at_s[sample], rules),
                 wrap_rad(np.interp(at_s[sample], seen.times_s, np.unwrap(yaw))),
                 np.interp(at_s[sample], seen.times_s, seen.ground_z_m))


def recognise_standing(seen: Sightings, at_s: np.ndarray, rules: Rules) -> Track | None:
    """The object that stands in one place, at those of at_s (S,) that its sightings enclose; None: of no category.

    It has one box for all sightings, the front where it is lower: bonnets are, and cabs.
    """
    yaw = seen.yaw_rad[0]
    edges = _extents(seen, seen.yaw_rad, np.zeros_like(seen.centre_xy))
    low, high = (_quantile(edge, seen.num_points, q) for edge, q in zip(edges, (1 - SEEN_QUANTILE, SEEN_QUANTILE)))
    size, height_m = high - low, seen.top_m.max()
    kind = next((kind for kind in rules.categories if kind.may_stand and _fits(kind, size, height_m)
                 and (_shown(kind, size) >= STANDING_SHARES).all()), None)
    if kind is None:
        return None
    full = _full_size(size, np.array([True, True]), kind)
    sensor = np.average(rotate(seen.sensor_xy, -yaw), axis=0, weights=seen.num_points)
    middle = complete(low, high, sensor, full)
    upper = np.average(rotate(seen.centre_xy, -yaw)[:, 0] + seen.lean_m, weights=seen.num_points)
    sample = _during(seen, at_s)
    states = np.zeros((len(sample), 2, 2))
    states[:, 0] = rotate(middle, yaw)
    yaw = yaw + np.pi if upper > middle[0] else yaw
    return Track(kind.name, np.append(full, height_m), True, _score(seen, size, kind, STANDING_SCORE), sample, states,
                 np.full(len(sample), wrap_rad(yaw)), np.full(len(sample), np.median(seen.ground_z_m)))


def complete(low: np.ndarray, high: np.ndarray, sensor: np.ndarray, size_m: np.ndarray) -> np.ndarray:
    """Middles (…, 2) of boxes of size_m (2,) of which the extents low to high (…, 2) were seen from sensor (…, 2).

    All in axes along the box. The edge towards the sensor stays and the box grows away from it; where the sensor is
    between the edges, it grows to both sides.
    """
    return np.where(sensor < low, low + size_m / 2, np.where(sensor > high, high - size_m / 2, (low + high) / 2))


def _deviation_m(seen: Sightings, rules: Rules) -> np.ndarray:
    return rules.tracking.position_m * np.sqrt(1 + 10 / seen.num_points)


def _during(seen: Sightings, at_s: np.ndarray) -> np.ndarray:
    """Which of at_s lie in the sweeps from the first to the last sighting."""
    return np.flatnonzero((at_s >= seen.stamps_s[0]) & (at_s <= seen.stamps_s[-1]))


def _states_at(seen: Sightings, middle: np.ndarray, at_s: np.ndarray, rules: Rules) -> np.ndarray:
    """Smoothed states (M, 2, 2) at at_s (M,). A sighting's points may be measured some ms after its sweep's stamp:
    before the first and after the last one the speed stays."""
    known_s = np.clip(at_s, seen.times_s[0], seen.times_s[-1])
    states = tracking.smooth(seen.times_s, middle, _deviation_m(seen, rules), rules.tracking.accel_mps2, known_s)
    states[:, 0] += (at_s - known_s)[:, None] * states[:, 1]
    return states


def _heading(states: np.ndarray) -> np.ndarray:
    """Yaw (H,) [rad] along the velocity; of the nearest moving state where it is too slow to say."""
    velocity = states[:, 1]
    speed = np.hypot(*velocity.T)
    sure = np.flatnonzero(speed > min(HEADING_SPEED_MPS, speed.max() * 0.9))
    at = np.arange(len(speed))
    nearest = sure[np.abs(at[:, None] - sure).argmin(1)]
    return np.arctan2(velocity[nearest, 1], velocity[nearest, 0])


def _along_sides(yaw: np.ndarray, seen: Sightings) -> np.ndarray:
    """Headings (H,) [rad] turned to the nearest side of what was seen, where that is long enough to say."""
    off = (seen.yaw_rad - yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
    return yaw + np.where((seen.long_m > SIDE_M) & (np.abs(off) < MAX_OFF_RAD), off, 0)


def _extents(seen: Sightings, yaw: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each (H, 2) [m]: extents of the outlines along and across yaw (H,), from the map's origin.

    velocity (H, 2) [m/s] brings all corners of an outline to one time.
    """
    turned = [rotate(corners[:, :2] - corners[:, 2:] * speed, -angle)
              for corners, angle, speed in zip(seen.outlines, yaw, velocity)]
    return np.array([t.min(0) for t in turned]), np.array([t.max(0) for t in turned])


def _quantile(values: np.ndarray, weight: np.ndarray, q: float) -> np.ndarray:
    """Weighted quantile (C,) of the columns of values (H, C)."""
    order = np.argsort(values, axis=0, kind="stable")
    total = np.cumsum(weight[order], axis=0)
    at = (total < q * total[-1]).sum(0)
    return np.take_along_axis(values, order, 0)[at, np.arange(values.shape[1])]


def _size(low: np.ndarray, high: np.ndarray, sensor: np.ndarray,
          num_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(size (2,) [m] along and across, whether it is known (2,) or more may be hidden).

    A side's whole length shows only from beside it: one who drives behind sees the rear.
    """
    away = np.maximum(low - sensor, sensor - high)  # > 0: from the end (along), from the side (across)
    beside = away[:, ::-1] > BESIDE * np.hypot(*(sensor - (low + high) / 2).T)[:, None]
    size = _quantile(high - low, num_points, SEEN_QUANTILE)
    known = beside.any(0)
    for axis in np.flatnonzero(known):
        rows = beside[:, axis]
        size[axis] = _quantile((high - low)[rows, axis, None], num_points[rows], SEEN_QUANTILE)[0]
    return size, known


def _full_size(size: np.ndarray, known: np.ndarray, kind: Category) -> np.ndarray:
    """The size (2,) [m] of the whole: what was seen, or what is typical where that is too little or may hide more."""
    enough = size >= [kind.length_m[0], kind.width_m[0]]
    return np.where(known & enough, size, np.maximum(size, kind.typical_lw_m))


def _fits(kind: Category, size: np.ndarray, height_m: float) -> bool:
    """Whether it is not too long, wide, high or low to be one."""
    return bool(size[0] <= kind.length_m[1] and size[1] <= kind.width_m[1]
                and kind.height_m[0] <= height_m <= kind.height_m[1])


def _shown(kind: Category, size: np.ndarray) -> np.ndarray:
    """Which share of the least length and width was seen, (2,)."""
    return np.minimum(size / [kind.length_m[0], kind.width_m[0]], 1)


def _score(seen: Sightings, size: np.ndarray, kind: Category, most: float) -> float:
    """In (0, most): grows with the number of sightings and with what was seen of its size."""
    return float((1 - np.exp(-len(seen.times_s) / 10)) * (0.5 + 0.5 * _shown(kind, size).prod()) * most)
