"""split: train, val and test without leakage, stable as drives come in; and which scenes a worker takes together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from stages.lib import places, report, tables
from stages.lib.errors import ConfigError, DataError
from stages.lib.knobs import knob, near_miss
from stages.lib.stage import Out, Summary, Upstream
from stages.lib.tables import SCENES, SPLIT

INPUTS = ("ingest", "curate")
SPLITS = ("train", "val", "test")
ELSEWHERE = "place_of_other_split"
NOBODY = -1


@dataclass(frozen=True)
class Knobs:
    quotas: dict[str, float] = knob("split -> its share of the scenes, together 1; 0: not asked for", low=0, high=1)
    cell_m: float = knob("scenes of different splits are at least this far apart", low=1)
    group_s: float = knob("recorded seconds that a worker takes together: neighbours in one recording", above=0)


def run(cfg: Knobs, inputs: Mapping[str, Upstream], out: Out) -> Summary:
    """data: scenes.parquet (SPLIT), dropped.parquet (SCENES and `rule`), policy.json (by what it was split); results:
    report.html.

    Drives come in order of their first stamp (equal ones by token). A drive joins the split that owns most of the cells
    it shares with earlier drives (as many: the one that was there first), else the split furthest below its quota of
    scenes. Its scenes in a cell of another split are dropped; the others make their cells the split's. So what becomes
    of a drive depends on earlier drives alone. Cells: see `lib.places`. A drive that is not georeferenced has none, and
    shares its place with the same recording only.
    Raises ConfigError for quotas that are none and where a split with a quota stays empty.
    """
    _check_quotas(cfg.quotas)
    scenes = tables.read(inputs["curate"].folder / "scenes.parquet", list(SCENES))
    drives = (tables.read(inputs["ingest"].folder / "drives.parquet").sort("start_us", "drive_token")
              .filter(pl.col("drive_token").is_in(scenes["drive_token"].unique().implode())))
    order = pl.col("drive_token").replace_strict(drives["drive_token"], range(len(drives)), return_dtype=pl.Int64)
    scenes = scenes.with_columns(drive=order).sort("drive", "start_us")
    motion = tables.scan(inputs["ingest"].folder / "motion.parquet")

    names = sorted((name for name in SPLITS if cfg.quotas.get(name, 0) > 0), key=lambda name: -cfg.quotas[name])
    split, num_free = assign(scenes["drive"].to_numpy(), cells(scenes, drives, motion, cfg.cell_m),
                             np.array([cfg.quotas[name] for name in names]))
    scenes = scenes.with_columns(split=pl.Series(split).replace_strict(
        [NOBODY, *range(len(names))], [None, *names], return_dtype=pl.String))
    kept = scenes.filter(pl.col("split").is_not_null())
    dropped = scenes.filter(pl.col("split").is_null())
    for name in names:
        if name not in kept["split"]:
            raise ConfigError(
                f"split.quotas.{name} is {cfg.quotas[name]:g} but no scene came there: {len(drives)} drives lie in "
                f"{num_free} places of their own, {len(dropped)} scenes dropped\n"
                f"  scan more drives, lower split.cell_m ({cfg.cell_m:g}), or set split.quotas.{name} to 0")
    kept = kept.with_columns(group=pl.Series(groups(kept, round(cfg.group_s * 1e6)), dtype=pl.Int64))
    tables.write(kept.select(*SPLIT), out.data / "scenes.parquet")
    tables.write(dropped.select(*SCENES, pl.lit(ELSEWHERE).alias("rule")), out.data / "dropped.parquet")
    policy = _policy(cfg, drives, kept, len(dropped))
    (out.data / "policy.json").write_text(json.dumps(policy, indent=1, sort_keys=True) + "\n")
    _report(policy, dropped, out.results / "report.html")
    return Summary(len(scenes), len(kept), "scenes", dropped={ELSEWHERE: len(dropped)} if len(dropped) else {},
                   notes=_notes(policy))


def cells(scenes: pl.DataFrame, drives: pl.DataFrame, motion: pl.LazyFrame, cell_m: float) -> pl.DataFrame:
    """Where each scene is: scene (its row, ascending), cell (a number: the same for the same place).

    A place is a cell of a location's grid; for a drive that is not georeferenced, its recording.
    Raises DataError for a georeferenced drive without a pose.
    """
    where = scenes.select("drive_token", "start_us", "end_us").with_row_index("scene").cast({"scene": pl.Int64}).join(
        drives.select("drive_token", "drive_name", "location", "recording_digest", "georeferenced"),
        on="drive_token", how="left", maintain_order="left")
    placed, alone = where.filter("georeferenced"), where.filter(~pl.col("georeferenced"))
    grid = places.cells(placed, motion, cell_m)
    lost = placed.with_row_index("row").filter(~pl.col("row").is_in(grid["scene"].unique().implode()))
    if len(lost):
        raise DataError(f"{lost['drive_name'][0]}: its rig says georeferenced but motion.parquet has no pose of it, so "
                        "its place is not known\n  set ego_pose.georeferenced to false in conf/rig or run "
                        "`dvc repro -f ingest`")
    keys = pl.concat([
        grid.select(scene=placed["scene"].gather(grid["scene"]), ix="ix", iy="iy",
                    place=pl.lit("cell of ") + placed["location"].gather(grid["scene"])),
        alone.select("scene", ix=pl.lit(0, pl.Int64), iy=pl.lit(0, pl.Int64),
                     place=pl.lit("recording ") + pl.col("recording_digest"))]).sort("scene", "place", "ix", "iy")
    known = keys.select("place", "ix", "iy").unique(maintain_order=True).with_row_index("cell").cast({"cell": pl.Int64})
    return keys.join(known, on=["place", "ix", "iy"], maintain_order="left").select("scene", "cell")


def assign(drive: np.ndarray, where: pl.DataFrame, quotas: np.ndarray) -> tuple[np.ndarray, int]:
    """(the split of each scene (S,) int64, NOBODY where it is dropped; the number of drives that shared no cell).

    drive   (S,) ascending: which drive a scene is of, 0, 1, … in order of their first stamp
    where   scene and cell, scenes ascending
    quotas  (K,) > 0, the share of the scenes that each split shall have; of equals the first is filled first
    """
    scene, cell = where["scene"].to_numpy(), where["cell"].to_numpy()
    bounds = np.searchsorted(drive[scene], np.arange(drive.max(initial=-1) + 2))
    scenes_of = np.searchsorted(drive, np.arange(drive.max(initial=-1) + 2))
    owner = np.full(cell.max(initial=-1) + 1, NOBODY)
    since = np.full(len(owner), len(drive))
    split, num, num_free = np.full(len(drive), NOBODY), np.zeros(len(quotas), int), 0
    for d, (begin, end) in enumerate(pairwise(bounds)):
        mine = np.unique(cell[begin:end])
        shared = mine[owner[mine] != NOBODY]
        if len(shared):
            votes = np.bincount(owner[shared], minlength=len(quotas))
            leading = shared[votes[owner[shared]] == votes.max()]
            chosen = owner[leading[np.argmin(since[leading])]]
        else:
            chosen = np.argmax(quotas - num / max(num.sum(), 1))
            num_free += 1
        foreign = ~np.isin(owner[cell[begin:end]], (NOBODY, chosen))
        split[scenes_of[d]:scenes_of[d + 1]] = chosen
        split[scene[begin:end][foreign]] = NOBODY
        num[chosen] += (split[scenes_of[d]:scenes_of[d + 1]] == chosen).sum()
        claimed = cell[begin:end][split[scene[begin:end]] == chosen]
        claimed = claimed[owner[claimed] == NOBODY]
        owner[claimed], since[claimed] = chosen, d
    return split, num_free


def groups(scenes: pl.DataFrame, group_us: int) -> list[int]:
    """The group of each scene: 0, 1, … over all, a new one with each drive and where group_us would be exceeded.

    scenes  sorted by drive and start_us
    """
    found, last, used_us = [], None, 0
    for drive, start_us, end_us in scenes.select("drive_token", "start_us", "end_us").iter_rows():
        used_us += end_us - start_us
        if drive != last or used_us > group_us:
            found.append(found[-1] + 1 if found else 0)
            last, used_us = drive, end_us - start_us
        else:
            found.append(found[-1])
    return found


def _check_quotas(quotas: Mapping[str, float]) -> None:
    for name in quotas:
        if name not in SPLITS:
            raise ConfigError(f"split.quotas.{name} is not a split{near_miss(name, SPLITS)}; "
                              f"splits: {', '.join(SPLITS)}")
    if abs(sum(quotas.values()) - 1) > 1e-6:
        shares = ", ".join(f"{name} {share:g}" for name, share in quotas.items())
        raise ConfigError(f"split.quotas add up to {sum(quotas.values()):g}, expected 1: {shares or 'none'}\n"
                          "  change one of them in conf/split and run `roadmill compose`")


def _policy(cfg: Knobs, drives: pl.DataFrame, kept: pl.DataFrame, num_dropped: int) -> dict:
    by_place, alone = int(drives["georeferenced"].sum()), int((~drives["georeferenced"]).sum())
    per_split = kept.group_by("split").agg(
        num_scenes=pl.len(), num_drives=pl.col("drive_token").n_unique(),
        duration_s=(pl.col("end_us") - pl.col("start_us")).sum() / 1e6)
    return {"by": "mixed" if by_place and alone else "place" if by_place else "drive",
            "num_drives_by_place": by_place, "num_drives_by_drive_alone": alone, "cell_m": cfg.cell_m,
            "quotas": dict(cfg.quotas), "num_scenes_dropped": num_dropped,
            "splits": {row.pop("split"): row for row in per_split.iter_rows(named=True)}}


def _notes(policy: dict) -> tuple[str, ...]:
    sizes = ", ".join(f"{name} {policy['splits'][name]['num_scenes']}" for name in SPLITS if name in policy["splits"])
    alone = policy["num_drives_by_drive_alone"]
    if not alone:
        return (sizes, f"split by place: scenes of different splits are at least {policy['cell_m']:g} m apart")
    return (sizes, f"{alone} of {alone + policy['num_drives_by_place']} drives split by drive alone "
                   "(not georeferenced): one place may be in two splits")


def _report(policy: dict, dropped: pl.DataFrame, path: Path) -> None:
    splits = pl.DataFrame([{"split": name, "quota": policy["quotas"][name], **policy["splits"][name]}
                           for name in SPLITS if name in policy["splits"]])
    report.write(path, "split", [
        report.Section("Splits", f"{_notes(policy)[1]}.", splits),
        report.Section("Dropped scenes", "They lie in a place of another split.",
                       dropped.select("scene_name", "drive_name"))])
