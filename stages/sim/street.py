"""A street: its lanes, what stands beside it, and how its ground looks from above."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import cKDTree

from stages.sim import shapes
from stages.sim.kinematics import STEP_M, Path, from_curvature, moved, through, turn
from stages.sim.shapes import HOUSE, LEAVES, PLAIN, Solid

LENGTH_M = 430.0
LANE_M, KERB_M, WALK_M = 1.75, 5.8, 8.6     # lane centre, kerb and outer edge of the pavement, from the road's middle
PARKING_M = 4.65
SIDE_LANE_M, SIDE_LENGTH_M, SIDE_KERB_M = 1.5, 70.0, 3.3
TURN_RADIUS_M = 7.0
PITCH_M = 550.0                             # from street to street of an area
AREA_ORIGIN_M = {"residential": (2_000.0, 1_000.0), "works": (9_000.0, 7_000.0)}
HALL_TONES = np.array([(176, 170, 160), (150, 152, 158), (188, 186, 178)])
HOUSE_TONES = np.array([(198, 180, 150), (176, 128, 104), (214, 206, 190), (160, 166, 150), (190, 160, 136)])
RASTER_M = 0.15
RASTER_MARGIN_M = 45.0
# (where, turn [deg], over [m]) of the bends, and where the side road joins
KINDS = (((), 205.0), (((240, 55, 150),), 120.0), (((190, 38, 90), (290, -38, 90)), 130.0),
         (((182, -78, 46),), 128.0), (((250, -80, 260),), 110.0))


@dataclass(frozen=True)
class Street:
    """Lanes are travelled as in right-hand traffic; the side road joins from the left.

    middle    the road's middle line, in the ego's direction
    forward   the ego's lane          oncoming  the other one, in its own direction
    turn_off  from the oncoming lane into the side road          join  from the side road into the oncoming lane
    side      the side road's middle line, away from the junction at junction_m of `middle`
    scenery   solids in the map frame
    """

    area: str
    middle: Path
    forward: Path
    oncoming: Path
    turn_off: Path
    join: Path
    side: Path
    junction_m: float
    scenery: tuple[Solid, ...]

    @property
    def along(self) -> np.ndarray:
        """Unit vector (2,) of the road's direction at the junction."""
        out = self.side.xy_m[1] - self.side.xy_m[0]
        return np.array([out[1], -out[0]]) / np.linalg.norm(out)


def make_street(seed: int, index: int) -> Street:
    """The street of that index: the same for every drive along it."""
    rng = np.random.default_rng([seed, 1, index])
    area = "works" if index % 9 in (1, 2, 6, 8) else "residential"
    bends, junction_m = KINDS[index % len(KINDS)]
    s_m = np.arange(0, LENGTH_M, STEP_M)
    curvature = np.zeros(len(s_m))
    for where, turn_deg, over in bends:
        inside = np.abs(s_m - where) < over / 2
        curvature += inside * np.radians(turn_deg) / over * (1 + np.cos(2 * np.pi * (s_m - where) / over))
    path = from_curvature(curvature)
    chord = path.xy_m[-1] - path.xy_m[0]
    path = moved(path, rng.uniform(-0.2, 0.2) - np.arctan2(chord[1], chord[0]), np.zeros(2))
    slot = np.add(AREA_ORIGIN_M[area], (0.0, PITCH_M * index))
    middle = moved(path, 0.0, slot - path.xy_m.mean(axis=0))

    oncoming = middle.beside(LANE_M).backward()
    x, y, yaw = middle.pose(junction_m)
    out = np.array([-np.sin(yaw), np.cos(yaw)])
    along = np.array([np.cos(yaw), np.sin(yaw)])
    side = through(np.array([x, y]) + np.arange(0, SIDE_LENGTH_M, STEP_M)[:, None] * out)
    turn_off, join = _turns(oncoming, np.array([x, y]), along, out, yaw)
    street = Street(area, middle, middle.beside(-LANE_M), oncoming, turn_off, join, side, junction_m, ())
    return Street(**{**vars(street), "scenery": _scenery(street, rng)})


def _turns(oncoming: Path, junction: np.ndarray, along: np.ndarray, out: np.ndarray, yaw: float) -> tuple[Path, Path]:
    reach = SIDE_LANE_M + TURN_RADIUS_M
    away = through(junction + SIDE_LANE_M * along
                   + np.arange(LANE_M + TURN_RADIUS_M, SIDE_LENGTH_M, STEP_M)[:, None] * out)
    toward = Path(away.xy_m - 2 * SIDE_LANE_M * along, away.yaw_rad).backward()
    leave_m = _nearest(oncoming, junction + reach * along + LANE_M * out)
    enter_m = _nearest(oncoming, junction - reach * along + LANE_M * out)
    handle = 0.55 * TURN_RADIUS_M
    turn_off = np.concatenate([oncoming.between(0, leave_m).xy_m,
                               turn(oncoming.pose(leave_m), away.pose(0), handle)[1:-1], away.xy_m])
    join = np.concatenate([toward.xy_m, turn(toward.pose(toward.length_m), oncoming.pose(enter_m), handle)[1:-1],
                           oncoming.between(enter_m, oncoming.length_m).xy_m])
    return through(turn_off), through(join)


def _nearest(path: Path, point: np.ndarray) -> float:
    return float(np.argmin(np.linalg.norm(path.xy_m - point, axis=1))) * STEP_M


def _scenery(street: Street, rng: np.random.Generator) -> tuple[Solid, ...]:
    """Houses or halls, walls, hedges, trees, lamp posts and bins on both sides, where they do not stand in a road."""
    roads = cKDTree(street.middle.xy_m), cKDTree(street.side.xy_m)
    solids: list[Solid] = []

    def stand(solid: Solid) -> bool:
        """Whether its footprint keeps off both roads."""
        c, s = np.cos(solid.yaw_rad), np.sin(solid.yaw_rad)
        steps = np.linspace(-1, 1, 5)
        x, y = np.outer(steps, [solid.half_x_m] * 5).ravel(), np.outer([solid.half_y_m] * 5, steps).ravel()
        corners = np.stack([solid.x_m + c * x - s * y, solid.y_m + s * x + c * y], -1)
        return bool(roads[0].query(corners)[0].min() > KERB_M and roads[1].query(corners)[0].min() > SIDE_KERB_M + 0.6)

    for sign in (-1, 1):
        for make in (_buildings, _greens):
            for group in make(street, sign, rng):
                if all(stand(solid) for solid in group[:1]):
                    solids.extend(group)
    return tuple(solids)


def _place(street: Street, s_m: float, left_m: float) -> tuple[float, float, float]:
    x, y, yaw = street.middle.pose(s_m)
    return x - left_m * np.sin(yaw), y + left_m * np.cos(yaw), yaw


def _buildings(street: Street, sign: int, rng: np.random.Generator) -> list[tuple[Solid, ...]]:
    groups: list[tuple[Solid, ...]] = []
    s_m = 0.0
    works = street.area == "works"
    while s_m < LENGTH_M:
        long_m = rng.uniform(16, 30) if works else rng.uniform(8, 13)
        deep_m, high_m = rng.uniform(7, 11), rng.uniform(5, 8.5)
        setback_m = rng.uniform(3, 9) if works else rng.uniform(0.6, 5)
        x, y, yaw = _place(street, s_m + long_m / 2, sign * (WALK_M + setback_m + deep_m / 2))
        tone = rng.choice(HALL_TONES if works else HOUSE_TONES)
        rgb = tuple(int(v) for v in np.clip(tone + rng.integers(-12, 13, 3), 0, 255))
        house = Solid(x, y, long_m / 2, deep_m / 2, 0.0, high_m, rgb, HOUSE, yaw)
        roof = Solid(x, y, long_m / 2 + 0.3, deep_m / 2 + 0.3, high_m, high_m + 0.5, (110, 70, 58), PLAIN, yaw)
        groups.append((house,) if works else (house, roof))
        if setback_m > 2.2:
            fence_x, fence_y, _ = _place(street, s_m + long_m / 2, sign * (WALK_M + 0.4))
            fence_m = rng.uniform(1.6, 2.2) if works else rng.uniform(0.9, 1.5)
            look = ((150, 146, 140), PLAIN) if works else ((70, 104, 52), LEAVES)
            groups.append((Solid(fence_x, fence_y, 0.42 * long_m, 0.2, 0.0, fence_m, *look, yaw),))
        s_m += long_m + rng.uniform(1.5, 7)
    return groups


def _greens(street: Street, sign: int, rng: np.random.Generator) -> list[tuple[Solid, ...]]:
    groups, s_m = [], rng.uniform(2, 12)
    while s_m < LENGTH_M:
        x, y, yaw = _place(street, s_m, sign * (KERB_M + 0.5))
        kind = rng.choice(4, p=[0.25, 0.4, 0.2, 0.15] if street.area == "works" else [0.5, 0.25, 0.2, 0.05])
        if kind == 0:
            rgb = (int(rng.integers(52, 80)), int(rng.integers(92, 128)), int(rng.integers(40, 60)))
            groups.append(shapes.tree(x, y, rng.uniform(1.1, 1.7), rng.uniform(4.2, 6.0), rgb))
        elif kind == 1:
            groups.append(shapes.pole(x, y, rng.uniform(5.0, 7.5)))
        elif kind == 2:
            groups.append((Solid(x, y, 0.3, 0.35, 0.0, 1.1, (60, 66, 60), PLAIN, yaw),))
        else:
            x, y, yaw = _place(street, s_m, sign * (WALK_M + 0.7))
            groups.append((Solid(x, y, 0.9, 0.65, 0.0, 1.35, (60, 92, 120), PLAIN, yaw),))
        s_m += rng.uniform(7, 17)
    return groups


@dataclass(frozen=True)
class Ground:
    """The ground from above: rgb (rows, columns, 3) uint8, RASTER_M a pixel; pixel (0, 0)'s centre lies at origin_m."""

    rgb: np.ndarray
    origin_m: np.ndarray


def paint_ground(street: Street, seed: int) -> Ground:
    """Grass or concrete, pavement, kerbs, asphalt, lane marks."""
    low = street.middle.xy_m.min(axis=0) - RASTER_MARGIN_M
    width, height = np.ceil((street.middle.xy_m.max(axis=0) + RASTER_MARGIN_M - low) / RASTER_M).astype(int)
    grass = (104, 122, 74) if street.area == "residential" else (140, 138, 130)
    rgb = np.full((height, width, 3), grass, np.uint8)

    def strip(path: Path, right_m: float, left_m: float, colour: tuple[int, int, int]) -> None:
        edges = np.concatenate([path.beside(right_m).xy_m, path.beside(left_m).xy_m[::-1]])
        cv2.fillPoly(rgb, [np.round((edges - low) / RASTER_M * 16).astype(np.int32)], colour, cv2.LINE_8, 4)

    for half_m, side_half_m, colour in (
            (WALK_M, SIDE_KERB_M + 2, (168, 164, 156)), (KERB_M, SIDE_KERB_M, (196, 194, 188)),
            (KERB_M - 0.18, SIDE_KERB_M - 0.15, (84, 84, 88))):
        strip(street.middle, -half_m, half_m, colour)
        strip(street.side, -side_half_m, side_half_m, colour)
    for sign in (-1, 1):
        edge = street.middle.beside(sign * 3.55)
        strip(edge, -0.07, 0.07, (206, 206, 202))
    for s_m in np.arange(4.0, LENGTH_M - 10, 9.0):
        strip(street.middle.between(s_m, s_m + 3.5), -0.08, 0.08, (222, 222, 218))
    for s_m in np.arange(12.0, SIDE_LENGTH_M - 6, 7.0):
        strip(street.side.between(s_m, s_m + 2.5), -0.06, 0.06, (214, 214, 210))
    rng = np.random.default_rng([seed, 2])
    grain = cv2.resize(rng.integers(-9, 10, (64, 64)).astype(np.float32), (256, 256)) + rng.integers(-7, 8, (256, 256))
    tiled = np.tile(grain.astype(np.int16), (height // 256 + 1, width // 256 + 1))[:height, :width, None]
    return Ground(np.clip(rgb + tiled, 0, 255).astype(np.uint8), low)
