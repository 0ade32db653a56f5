"""One drive's world: the street, the ego's trip along it, and everybody else; a function of seed and number alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.sim import shapes
from stages.sim.kinematics import STEP_M, Path, Trip, trip
from stages.sim.shapes import Solid, Solids
from stages.sim.street import (
    KERB_M,
    LENGTH_M,
    PARKING_M,
    SIDE_KERB_M,
    Street,
    make_street,
)

EPOCH_US = 1_700_000_000_000_000
DRIVE_EVERY_US = 600_000_000
EGO_START_M = 90.0
# Twelve drives along nine streets: some are driven again. Then nine new streets.
STREET_OF_DRIVE = (0, 1, 2, 3, 4, 0, 5, 6, 2, 1, 7, 8)
CAR, TRUCK, BUS = "vehicle.car", "vehicle.truck", "vehicle.bus.rigid"
BICYCLE, PEDESTRIAN, CONE = "vehicle.bicycle", "human.pedestrian.adult", "movable_object.trafficcone"
PAINTS = np.array([(176, 30, 34), (34, 60, 138), (228, 228, 224), (38, 40, 44), (142, 146, 150), (46, 96, 66),
                   (200, 180, 92), (92, 112, 140)])
CLOTHES = np.array([(150, 40, 50), (50, 90, 150), (190, 180, 160), (60, 60, 66), (96, 130, 80)])
CONE_LWH_M = (0.36, 0.36, 0.9)
KNOT_S, MARGIN_S = 0.01, 0.5
QUEUE_S = 2.8     # between two slots of the oncoming stream
MAX_BEND = 1 / 40     # nobody parks and no cone stands in a tighter one [1/m]
# On each pavement: distance from the kerb, who, speed [m/s], gaps [m], whether against the lane's direction.
FILES = ((1.12, PEDESTRIAN, (1.0, 1.5), (14, 90), False), (1.80, PEDESTRIAN, (1.0, 1.5), (14, 90), True),
         (2.50, BICYCLE, (3.2, 4.6), (40, 170), False), (0.50, PEDESTRIAN, (0.0, 0.0), (40, 120), False))


@dataclass(frozen=True)
class Course:
    """A path and a trip along it; a trip that has left the path's ends, or ended, is no longer in the world."""

    path: Path
    trip: Trip

    def pose(self, t_s: np.ndarray | float) -> np.ndarray:
        """x, y, yaw (…, 3)."""
        return self.path.pose(self.trip.at(t_s)[0])

    def velocity(self, t_s: np.ndarray | float) -> np.ndarray:
        """vx, vy in the map frame (…, 2) [m/s]."""
        s_m, speed = self.trip.at(t_s)
        yaw = self.path.pose(s_m)[..., 2]
        return np.stack([speed * np.cos(yaw), speed * np.sin(yaw)], -1)

    def present(self, t_s: np.ndarray | float) -> np.ndarray:
        """Whether it is in the world (…)."""
        s_m = self.trip.at(t_s)[0]
        inside = (s_m > 0) & (s_m < self.path.length_m)
        return inside & (np.asarray(t_s) >= self.trip.start_s) & (np.asarray(t_s) <= self.trip.end_s)


@dataclass(frozen=True)
class Actor:
    """Something with a label: it stands at a pose x, y, yaw (3,), or follows a course. size_lwh_m; its parts' frame is
    the middle of its footprint."""

    category: str
    size_lwh_m: tuple[float, float, float]
    parts: tuple[Solid, ...]
    place: Course | np.ndarray


@dataclass(frozen=True)
class World:
    """A drive. Time is seconds after start_us.

    solids    owner: index in `actors`, or len(actors) for the scenery
    resting   (owners, 3) x, y, yaw of who stands
    movers    (M,) owners that follow a course
    moving    (M, K, 5) their x, y, yaw, vx, vy each KNOT_S from -MARGIN_S on, straight in between
    presence  (M, K) whether they are in the world
    """

    start_us: int
    street: Street
    ego: Course
    actors: tuple[Actor, ...]
    solids: Solids
    resting: np.ndarray
    movers: np.ndarray
    moving: np.ndarray
    presence: np.ndarray

    def states(self, t_s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """x, y, yaw, vx, vy of every owner (owners, …, 5), and who is present (owners, …), at the times t_s (…)."""
        at = (np.asarray(t_s, float) + MARGIN_S) / KNOT_S
        knot = np.clip(np.floor(at).astype(int), 0, self.moving.shape[1] - 2)
        states = np.zeros((len(self.resting), *at.shape, 5))
        states[..., :3] = self.resting.reshape(-1, *(1,) * at.ndim, 3)
        first = self.moving[:, knot]
        states[self.movers] = first + (at - knot)[..., None] * (self.moving[:, knot + 1] - first)
        present = np.ones(states.shape[:-1], bool)
        present[self.movers] = self.presence[:, knot]
        return states, present


def make_world(seed: int, number: int, duration_s: float) -> World:
    """Drive `number` of the simulation `seed`; a longer one begins alike."""
    lap, place = divmod(number, len(STREET_OF_DRIVE))
    street = make_street(seed, STREET_OF_DRIVE[place] + 9 * lap)
    rng = np.random.default_rng([seed, 3, number])
    ego = _ego(street, rng)
    actors = [*_queue(street, ego, rng), *_stream(street, ego, duration_s, rng), *_parked(street, rng),
              *_walkers(street, duration_s, rng), *_cones(street, rng)]
    solids = shapes.columns([*(actor.parts for actor in actors), street.scenery])
    movers = np.array([i for i, actor in enumerate(actors) if isinstance(actor.place, Course)])
    origin = np.zeros(3)
    resting = np.stack([*(origin if isinstance(actor.place, Course) else actor.place for actor in actors), origin])
    knots_s = np.arange(-MARGIN_S, duration_s + MARGIN_S, KNOT_S)
    courses = [actors[i].place for i in movers]
    moving = np.stack([np.concatenate([course.pose(knots_s), course.velocity(knots_s)], -1) for course in courses])
    presence = np.stack([course.present(knots_s) for course in courses])
    start_us = EPOCH_US + number * DRIVE_EVERY_US
    return World(start_us, street, ego, tuple(actors), solids, resting, movers, moving, presence)


def _wanted(path: Path, cruise_mps: float, rng: np.random.Generator) -> np.ndarray:
    """A speed that swings about the cruising speed, (N,) at the path's steps."""
    s_m = np.arange(len(path.yaw_rad)) * STEP_M
    return cruise_mps * (1 + 0.16 * np.sin(2 * np.pi * (s_m / rng.uniform(45, 80) + rng.uniform())))


def _ego(street: Street, rng: np.random.Generator) -> Course:
    cruise = rng.uniform(8.5, 11.5) if street.area == "works" else rng.uniform(7.0, 9.5)
    stops = {EGO_START_M + rng.uniform(35, 90): rng.uniform(1.5, 3.5)} if rng.uniform() < 0.55 else {}
    whole = trip(street.forward, _wanted(street.forward, cruise, rng), stops)
    return Course(street.forward, whole.later(-whole.time_at(EGO_START_M)))


def _vehicle(rng: np.random.Generator, kinds: tuple[float, float, float]) -> tuple[str, tuple, tuple[Solid, ...]]:
    """Category, size and parts of a car, a truck or a bus, with these odds."""
    rgb = tuple(int(v) for v in np.clip(rng.choice(PAINTS) + rng.integers(-14, 15, 3), 0, 255))
    kind = rng.choice(3, p=kinds)
    if kind == 1:
        size = (rng.uniform(6.2, 8.2), rng.uniform(2.1, 2.3), rng.uniform(2.7, 3.3))
        return TRUCK, size, shapes.truck(size, rgb)
    if kind == 2:
        size = (rng.uniform(10.2, 11.8), 2.55, rng.uniform(3.0, 3.3))
        return BUS, size, shapes.bus(size, rgb)
    roof = ((-0.42, 0.13), (-0.49, 0.18), (-0.49, 0.26))[rng.choice(3, p=[0.5, 0.35, 0.15])]
    high_m = rng.uniform(1.42, 1.58) if roof[1] < 0.2 else rng.uniform(1.75, 2.0)
    size = (rng.uniform(3.9, 4.9), rng.uniform(1.74, 1.96), high_m)
    return CAR, size, shapes.car(size, rgb, roof)


def _queue(street: Street, ego: Course, rng: np.random.Generator) -> list[Actor]:
    """Up to two vehicles ahead of the ego and one behind, braking and starting as it does."""
    actors = []
    ahead_m, early_s = 0.0, 0.0
    for odds in (0.75, 0.5):
        category, size, parts = _vehicle(rng, (0.84, 0.12, 0.04))
        ahead_m, early_s = ahead_m + size[0] / 2 + rng.uniform(6.5, 9), early_s + rng.uniform(0.5, 1.3)
        if rng.uniform() < odds:
            actors.append(Actor(category, size, parts, Course(street.forward, ego.trip.later(-early_s, ahead_m))))
        ahead_m += size[0] / 2
    category, size, parts = _vehicle(rng, (0.9, 0.1, 0.0))
    if rng.uniform() < 0.7:
        behind = ego.trip.later(rng.uniform(0.5, 1.2), -size[0] / 2 - rng.uniform(3.5, 6))
        actors.append(Actor(category, size, parts, Course(street.forward, behind)))
    return actors


def _stream(street: Street, ego: Course, duration_s: float, rng: np.random.Generator) -> list[Actor]:
    """Oncoming traffic in time slots at the junction: go straight on, turn off, join from the side road, or nobody."""
    cruise = rng.uniform(7.5, 10.5)
    junction_m = street.oncoming.length_m - street.junction_m
    wanted = _wanted(street.oncoming, cruise, rng)
    s_m = np.arange(len(wanted)) * STEP_M
    wanted[np.abs(s_m - junction_m) < 12] = 5.5
    straight = trip(street.oncoming, wanted, {})
    turn_off = trip(street.turn_off, np.full(len(street.turn_off.yaw_rad), cruise), {})
    join = trip(street.join, np.full(len(street.join.yaw_rad), cruise), {})
    pass_s = {"straight": straight.time_at(junction_m), "turn_off": turn_off.time_at(junction_m),
              "join": join.time_at(street.join.length_m - (street.oncoming.length_m - junction_m))}
    courses = {"straight": (street.oncoming, straight), "turn_off": (street.turn_off, turn_off),
               "join": (street.join, join)}
    at_junction_s = ego.trip.time_at(street.junction_m)
    forced = {round(at_junction_s / QUEUE_S) - 1: "turn_off", round(at_junction_s / QUEUE_S): "join"}
    actors = []
    for slot in range(-14, 26):
        kind = rng.choice(["straight", "turn_off", "join", "none"], p=[0.42, 0.13, 0.13, 0.32])
        category, size, parts = _vehicle(rng, (0.82, 0.11, 0.07))
        kind = forced.get(slot, kind)
        if kind == "none" or (kind != "straight" and category == BUS):
            continue
        path, plan = courses[kind]
        course = Course(path, plan.later(slot * QUEUE_S - pass_s[kind]))
        if course.present(np.arange(-1, duration_s + 1, 0.5)).any():
            actors.append(Actor(category, size, parts, course))
    return actors


def _parked(street: Street, rng: np.random.Generator) -> list[Actor]:
    """Vehicles along both kerbs, most of them in driving direction."""
    actors = []
    odds = 0.3 if street.area == "works" else 0.45
    for sign in (-1, 1):
        kerb = street.middle.beside(sign * PARKING_M)
        s_m = rng.uniform(15, 22)
        while s_m < kerb.length_m - 15:
            category, size, parts = _vehicle(rng, (0.93, 0.07, 0.0))
            x, y, yaw = kerb.pose(s_m + size[0] / 2)
            in_bend = abs(kerb.curvature(s_m + size[0] / 2)) > MAX_BEND
            at_junction = sign > 0 and np.hypot(*(street.side.xy_m[0] - [x, y])) < 18
            s_m += size[0] + rng.uniform(1.1, 2.6)
            left_m, skew = rng.uniform(-0.12, 0.12), np.radians(rng.normal(0, 1.2))
            facing = (0 if sign < 0 else np.pi) + (np.pi if rng.uniform() < 0.12 else 0) + skew
            if rng.uniform() < odds and not at_junction and not in_bend:
                pose = np.array([x - left_m * np.sin(yaw), y + left_m * np.cos(yaw), yaw + facing])
                actors.append(Actor(category, size, parts, pose))
    return actors


def _walkers(street: Street, duration_s: float, rng: np.random.Generator) -> list[Actor]:
    """Pedestrians and cyclists on the pavements, in files of one speed, so that none runs into another; none crosses
    the side road or stands in a bin."""
    actors = []
    things = np.array([(solid.x_m, solid.y_m) for solid in street.scenery])
    t_s = np.arange(-2, duration_s + 2, 0.01)
    for sign in (-1, 1):
        for off_kerb_m, category, speeds, gaps_m, backward in FILES:
            path = street.middle.beside(sign * (KERB_M + off_kerb_m))
            path = path.backward() if backward else path
            speed = rng.uniform(*speeds)
            first_m = path.length_m - EGO_START_M - 240 if backward else EGO_START_M - 60
            begins_m = first_m + np.cumsum(rng.uniform(*gaps_m, 25))
            for begin_m in begins_m[begins_m < first_m + 300]:
                rgb, high_m = tuple(int(v) for v in rng.choice(CLOTHES)), rng.uniform(1.6, 1.86)
                size, shape = (((1.75, 0.62, high_m), shapes.cyclist) if category == BICYCLE else
                               ((0.5, 0.6, high_m), shapes.pedestrian))
                way = path.pose(begin_m + speed * np.linspace(-1, duration_s + 1, 50))[:, :2]
                crosses = sign > 0 and np.abs((way - street.side.xy_m[0]) @ street.along).min() < SIDE_KERB_M + 3
                in_bin = speed == 0 and np.linalg.norm(things - way[0], axis=1).min() < 0.9
                if not crosses and not in_bin:
                    walk = Trip(-2.0, begin_m + speed * t_s, np.full(len(t_s), speed))
                    actors.append(Actor(category, size, shape(size, rgb), Course(path, walk)))
    return actors


def _cones(street: Street, rng: np.random.Generator) -> list[Actor]:
    """Bollards along the road's middle, off junction and bends."""
    actors = []
    for s_m in np.arange(EGO_START_M - 20, LENGTH_M - 30, 16.0) + rng.uniform(-3, 3):
        if abs(s_m - street.junction_m) > 18 and abs(street.middle.curvature(s_m)) < MAX_BEND:
            x, y, yaw = street.middle.pose(s_m)
            actors.append(Actor(CONE, CONE_LWH_M, shapes.cone(CONE_LWH_M), np.array([x, y, yaw])))
    return actors
