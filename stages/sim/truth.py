"""What the simulator knows: every object's boxes over the drive, and what a human labeller would make of them."""

from __future__ import annotations

import numpy as np
import polars as pl

from stages.lib import geometry, openlabel
from stages.lib.openlabel import Labels
from stages.sim.world import World

TRUTH_STEP_US, LABEL_STEP_US = 100_000, 200_000
REACH_M = 85.0              # of the ego: further than the lidar's range and a bus's half length
LABEL_REACH_M = 60.0
LABEL_MIN_POINTS = 3
NOISE_M, NOISE_RAD = 0.03, np.radians(1.0)
# Which part of a drive a human reviewed, by its number: the first half, nothing, all of it, the second half.
REVIEWED = ((0.0, 0.5), None, (0.0, 1.0), (0.5, 1.0))


def truth(world: World, duration_s: float) -> Labels:
    """All objects within REACH_M of the ego, each TRUTH_STEP_US over the whole drive."""
    end_us = int(duration_s * 1_000_000) // TRUTH_STEP_US * TRUTH_STEP_US
    return Labels(_boxes(world, np.arange(0, end_us + 1, TRUTH_STEP_US), REACH_M),
                  ((world.start_us, world.start_us + end_us),))


def human(world: World, dice: tuple[int, int], duration_s: float, seen_s: np.ndarray) -> Labels | None:
    """The labels of a human who reviewed a part of the drive, a little inexact; None where nobody did.

    dice    seed and drive number
    seen_s  (owners, 2) first and last time at which the lidar saw it with LABEL_MIN_POINTS; NaN where it never did
    """
    part = REVIEWED[dice[1] % len(REVIEWED)]
    if part is None:
        return None
    start_us, end_us = (int(duration_s * share * 1_000_000) // LABEL_STEP_US * LABEL_STEP_US for share in part)
    boxes = _boxes(world, np.arange(start_us, end_us + 1, LABEL_STEP_US), LABEL_REACH_M)
    owner = boxes["object_id"].cast(pl.Int64).to_numpy() - 1
    t_s = (boxes["stamp_us"].to_numpy() - world.start_us) * 1e-6
    seen = (t_s >= seen_s[owner, 0] - 0.1) & (t_s <= seen_s[owner, 1] + 0.2)
    boxes = boxes.filter(seen)
    rng = np.random.default_rng([*dice, 4])
    noisy = {name: (boxes[name].to_numpy() + rng.normal(0, NOISE_M, boxes.height)).round(4)
             for name in ("x_m", "y_m", "z_m")}
    yaw = geometry.wrap_rad(boxes["yaw_rad"].to_numpy() + rng.normal(0, NOISE_RAD, boxes.height))
    boxes = boxes.with_columns(pl.Series(name, values) for name, values in {**noisy, "yaw_rad": yaw.round(6)}.items())
    return Labels(boxes, ((world.start_us + start_us, world.start_us + end_us),))


def _boxes(world: World, offsets_us: np.ndarray, reach_m: float) -> pl.DataFrame:
    t_s = offsets_us * 1e-6
    states, present = world.states(t_s)
    ego = world.ego.pose(t_s)
    near = np.hypot(*np.moveaxis(states[..., :2] - ego[:, :2], -1, 0)) < reach_m
    owner, step = np.nonzero((present & near)[:-1])
    sizes = np.array([actor.size_lwh_m for actor in world.actors])[owner].round(4)
    state = states[owner, step]
    categories = np.array([actor.category for actor in world.actors])[owner]
    boxes = pl.DataFrame({
        "stamp_us": world.start_us + offsets_us[step], "object_id": (owner + 1).astype(str), "category": categories,
        "x_m": state[:, 0].round(4), "y_m": state[:, 1].round(4), "z_m": sizes[:, 2] / 2,
        "length_m": sizes[:, 0], "width_m": sizes[:, 1], "height_m": sizes[:, 2],
        "yaw_rad": np.asarray(geometry.wrap_rad(state[:, 2])).round(6),
        "vx_mps": state[:, 3].round(4), "vy_mps": state[:, 4].round(4)}, schema=openlabel.BOXES)
    return boxes.sort("stamp_us", "object_id")
