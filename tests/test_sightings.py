"""What scans show, made of a few points each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from stages import autolabel
from stages.lib import knobs, sightings
from stages.lib.sightings import Scan

ROOT = Path(__file__).parents[1]
CFG = knobs.load(autolabel.Knobs, yaml.safe_load((ROOT / "conf/autolabel/default.yaml").read_text()), "autolabel")
GROUND = np.array([[x, y] for x in np.arange(0, 30, 0.25) for y in np.arange(-5, 5, 0.25)])


def outline(x: float, y: float, length: float = 4.4, width: float = 1.8, height: float = 1.5) -> np.ndarray:
    """Points (N, 3) of the four sides of a box on the ground whose middle is at (x, y)."""
    along, across = np.arange(-length / 2, length / 2 + 0.01, 0.1), np.arange(-width / 2, width / 2 + 0.01, 0.1)
    sides = [*((a, s * width / 2) for a in along for s in (-1, 1)),
             *((s * length / 2, a) for a in across for s in (-1, 1))]
    return np.array([(x + a, y + b, z) for a, b in sides for z in np.arange(0.4, height + 0.01, 0.2)])


def scan(number: int, *things: np.ndarray, ground_xy: np.ndarray = GROUND, at_m: float = 0.0) -> Scan:
    """The scan of sweep `number`, 5 a second, from a lidar over (at_m, 0)."""
    xyz, T = np.vstack(things), np.eye(4)
    T[0, 3] = at_m
    return Scan(number * 200_000, xyz, xyz[:, 2], np.zeros(len(xyz)), ground_xy, T)


def find(scans: list[Scan]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Sightings of what stands, and of all else."""
    raw = sightings.find(scans, CFG.clustering, CFG.standing)
    return raw.drop_nulls("thing"), raw.filter(pl.col("thing").is_null())


def free_of(x: float, y: float) -> np.ndarray:
    """Ground seen everywhere but under a car at (x, y)."""
    return GROUND[(np.abs(GROUND - (x, y)) > (2.2, 0.9)).any(1)]


def test_a_parked_car_is_one_thing_with_its_rectangle_in_every_scan():
    standing, others = find([scan(n, outline(12, 3), ground_xy=free_of(12, 3)) for n in range(20)])
    assert others.is_empty()
    assert standing["thing"].n_unique() == 1
    assert standing["stamp_us"].to_list() == [200_000 * n for n in range(20)]
    row = standing.row(7, named=True)
    assert np.round([row[c] for c in ("x_m", "y_m", "length_m", "width_m", "top_m", "ground_z_m")], 6).tolist() == [
        12, 3, 4.4, 1.8, 1.4, 0]
    assert np.sin(row["yaw_rad"]) < 0.01


def test_a_car_that_stops_for_a_while_is_no_standing_thing():
    here = [12 + 1.6 * max(0, 10 - n) - 1.6 * max(0, n - 20) for n in range(30)]
    standing, others = find([scan(n, outline(x, 3), ground_xy=free_of(x, 3)) for n, x in enumerate(here)])
    assert standing.is_empty()
    assert np.round(others["x_m"].to_numpy(), 3).tolist() == np.round(here, 3).tolist()
    always_free, _ = find([scan(n, outline(x, 3), ground_xy=np.zeros((0, 2))) for n, x in enumerate(here)])
    assert not always_free.is_empty()  # no ground seen, no way to know


def test_points_inside_a_standing_car_are_its_own_and_points_beside_it_are_not():
    inside, beside = outline(12, 3, 1.0, 0.6), outline(12, 5.5, 0.6, 0.6)
    _, others = find([scan(n, outline(12, 3), *([inside, beside] if n == 10 else []), ground_xy=free_of(12, 3))
                      for n in range(20)])
    assert others.select("x_m", "y_m").to_numpy().round(3).tolist() == [[12.0, 5.5]]


def test_splinters_say_how_much_of_them_is_beside_something_that_stands():
    splinter, walker = outline(12, 4.8, 0.4, 0.3), outline(12, 7, 0.4, 0.3)
    raw = sightings.find([scan(n, outline(12, 3), *([splinter, walker] if n == 10 else []), ground_xy=free_of(12, 3))
                          for n in range(20)], CFG.clustering, dataclasses.replace(CFG.standing, beside_m=1.2))
    assert raw.filter(pl.col("thing").is_null()).sort("y_m")["beside_share"].to_list() == [1.0, 0.0]
    assert raw.drop_nulls("thing")["beside_share"].unique().to_list() == [1.0]


def test_what_rides_along_is_part_of_the_ego_vehicle():
    def drive(step_m: float) -> tuple[pl.DataFrame, pl.DataFrame]:
        return find([scan(n, outline(40, 3), outline(-2.43 + step_m * n, 0.03, 0.4, 1.2, 2.0), at_m=step_m * n,
                          ground_xy=free_of(40, 3)) for n in range(20)])

    standing, others = drive(1.6)
    assert others.is_empty()
    assert standing.height == 20
    _, others = drive(0.3)  # 6 m are too short a way to tell
    assert others.height == 20


def test_no_scans_and_scans_without_points_give_an_empty_table():
    nothing = np.zeros((0, 3))
    assert sightings.find([], CFG.clustering, CFG.standing).schema == sightings.RAW
    assert sightings.find([scan(n, nothing) for n in range(3)], CFG.clustering, CFG.standing).is_empty()
