"""What things are made of: upright boxes and cylinders."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

# Materials, as `camera` paints them.
PLAIN, BODY, GLASS, HOUSE, LEAVES, SIGNAL, SHADOW, TAIL = range(8)
# What a lidar return from them looks like, 0 to 255.
REFLECTANCE = np.array([60.0, 75, 30, 45, 25, 200, 0, 70])
DARK = (40, 40, 42)
# Only cones have this colour, and no light or shade changes it.
CONE_RGB = (255, 95, 0)


@dataclass(frozen=True)
class Solid:
    """An upright box, or a cylinder of radius half_x_m, in its owner's frame: x forward, z up from the ground."""

    x_m: float
    y_m: float
    half_x_m: float
    half_y_m: float
    low_m: float
    high_m: float
    rgb: tuple[int, int, int]
    material: int = PLAIN
    yaw_rad: float = 0.0
    round: bool = False


@dataclass(frozen=True)
class Solids:
    """Many solids as columns. owner: index of what each belongs to; the rest as in Solid, (N,) each, rgb (N, 3)."""

    owner: np.ndarray
    x_m: np.ndarray
    y_m: np.ndarray
    half_x_m: np.ndarray
    half_y_m: np.ndarray
    low_m: np.ndarray
    high_m: np.ndarray
    rgb: np.ndarray
    material: np.ndarray
    yaw_rad: np.ndarray
    round: np.ndarray

    def take(self, which: np.ndarray) -> Solids:
        """The chosen ones, by mask or index."""
        return Solids(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


def columns(groups: list[tuple[Solid, ...]]) -> Solids:
    """The solids of all groups; a solid's owner is its group's index."""
    rows = [(owner, solid) for owner, group in enumerate(groups) for solid in group]
    return Solids(owner=np.array([owner for owner, _ in rows], np.int64), **{
        f.name: np.array([getattr(solid, f.name) for _, solid in rows]) for f in fields(Solid)})


def _box(x: tuple[float, float], half_y: float, z: tuple[float, float], rgb: tuple, material: int = PLAIN) -> Solid:
    return Solid((x[0] + x[1]) / 2, 0.0, (x[1] - x[0]) / 2, half_y, *z, rgb, material)


def _head(x: float, z: tuple[float, float]) -> Solid:
    return Solid(x, 0.0, 0.12, 0.12, *z, (200, 160, 130), round=True)


def _shadow(l: float, w: float) -> Solid:
    return _box((-l / 2 - 0.1, l / 2 + 0.1), w / 2 + 0.1, (0.0, 0.01), (0, 0, 0), SHADOW)


def car(size: tuple, rgb: tuple, roof: tuple[float, float]) -> tuple[Solid, ...]:
    """A bonnet in front, a cabin over the part `roof` of the length (-0.5 tail … 0.5 nose), set to the rear."""
    l, w, h = size
    return (_box((-l / 2, l / 2), w / 2, (0.16, 0.57 * h), rgb, BODY),
            _box((roof[0] * l, roof[1] * l), 0.44 * w, (0.57 * h, h), rgb, GLASS), _shadow(l, w))


def truck(size: tuple, rgb: tuple) -> tuple[Solid, ...]:
    """A low cab in front of a tall load."""
    l, w, h = size
    cab = l / 2 - 2.0
    return (_box((cab, l / 2), 0.47 * w, (0.4, 0.78 * h), rgb, BODY),
            _box((-l / 2, cab - 0.3), w / 2, (0.75, h), (205, 205, 200), TAIL),
            _box((-0.48 * l, cab), 0.36 * w, (0.3, 0.75), DARK), _shadow(l, w))


def bus(size: tuple, rgb: tuple) -> tuple[Solid, ...]:
    """A long body with windows, its air conditioner on the rear half of the roof."""
    l, w, h = size
    return (_box((-l / 2, l / 2), w / 2, (0.25, 0.45 * h), rgb, BODY),
            _box((-l / 2, l / 2 - 0.15), 0.49 * w, (0.45 * h, 0.9 * h), rgb, GLASS),
            _box((-0.42 * l, 0.02 * l), 0.35 * w, (0.9 * h, h), (190, 190, 190)), _shadow(l, w))


def cyclist(size: tuple, rgb: tuple) -> tuple[Solid, ...]:
    """A bicycle with its rider, handlebar in front."""
    l, w, h = size
    return (_box((-l / 2, l / 2), 0.05, (0.0, 0.75), DARK), _box((0.2 * l, 0.3 * l), w / 2, (0.9, 1.05), DARK),
            _box((-0.2 * l, 0.1 * l), 0.4 * w, (0.7, 0.85 * h), rgb), _head(0.05, (0.85 * h, h)), _shadow(l, 0.3 * w))


def pedestrian(size: tuple, rgb: tuple) -> tuple[Solid, ...]:
    """Legs, torso and head."""
    l, w, h = size
    return (_box((-0.3 * l, 0.3 * l), 0.35 * w, (0.0, 0.5 * h), (50, 55, 80)),
            _box((-0.4 * l, 0.4 * l), w / 2, (0.48 * h, 0.84 * h), rgb), _head(0.03, (0.84 * h, h)),
            _shadow(0.6 * l, 0.7 * w))


def cone(size: tuple) -> tuple[Solid, ...]:
    """A bollard of one bright colour: where it is seen can be measured."""
    l, w, h = size
    return (Solid(0, 0, l / 2, w / 2, 0.0, h, CONE_RGB, SIGNAL, round=True), _shadow(l, w))


def tree(x: float, y: float, radius: float, high: float, rgb: tuple) -> tuple[Solid, ...]:
    """A trunk and a crown."""
    return (Solid(x, y, 0.16, 0.16, 0.0, 2.4, (85, 65, 48), round=True),
            Solid(x, y, radius, radius, 2.2, high, rgb, LEAVES, round=True),
            Solid(x, y, 0.75 * radius, 0.75 * radius, high, high + 0.7, rgb, LEAVES, round=True))


def pole(x: float, y: float, high: float) -> tuple[Solid, ...]:
    """A lamp post."""
    return (Solid(x, y, 0.09, 0.09, 0.0, high, (120, 124, 128), round=True),)
