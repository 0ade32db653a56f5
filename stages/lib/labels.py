"""Which boxes a sample has: labels interpolated to its stamp, from one source for each sample.

A label source is of one of `KINDS`. Every sample takes all its boxes from the first source of its split that covers it.
A label file covers a stamp that somebody reviewed, if what is there can be interpolated from labels on both sides;
automatic labels cover every scene that was labelled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from stages.lib import openlabel
from stages.lib.geometry import wrap_rad

KINDS = ("truth", "human", "auto")
LERPED = ("x_m", "y_m", "z_m", "length_m", "width_m", "height_m", "vx_mps", "vy_mps")

# Where two sources disagree at a sample that both cover. what: missing (only the winner has a box), extra (only the
# overruled source has one), category (both have it, as different things).
CONFLICTS = {"scene_token": pl.String, "sample_token": pl.String, "stamp_us": pl.Int64, "what": pl.String,
             "source": pl.String, "category": pl.String, "overruled_source": pl.String,
             "overruled_category": pl.String, "overruled_score": pl.Float64, "x_m": pl.Float64, "y_m": pl.Float64,
             "distance_m": pl.Float64}


@dataclass(frozen=True)
class LabelFiles:
    """One kind's label files of some drives.

    boxes     drive_token and openlabel.BOXES
    reviewed  drive_token, start_us, end_us: what was reviewed
    covered   the same of what of that `covered_us` finds covered
    """

    boxes: pl.DataFrame
    reviewed: pl.DataFrame
    covered: pl.DataFrame


def read(folder: Path, drives: Mapping[str, str], max_gap_us: int) -> LabelFiles:
    """The label files `<drive name>.json` in `folder`, of those drives (token -> name) that have one."""
    key = {"drive_token": pl.String}
    interval = {**key, "start_us": pl.Int64, "end_us": pl.Int64}
    boxes, reviewed, covered = [pl.DataFrame(schema={**key, **openlabel.BOXES})], [], []
    for token, name in drives.items():
        path = folder / f"{name}.json"
        if path.exists():
            found = openlabel.read(path)
            boxes.append(found.boxes.select(pl.lit(token).alias("drive_token"), *openlabel.BOXES))
            reviewed += [(token, *bounds) for bounds in found.reviewed_us]
            covered += [(token, *bounds) for bounds in covered_us(found.reviewed_us, found.boxes, max_gap_us)]
    return LabelFiles(pl.concat(boxes), pl.DataFrame(reviewed, interval, orient="row"),
                      pl.DataFrame(covered, interval, orient="row"))


def covered_us(reviewed_us: Iterable[tuple[int, int]], boxes: pl.DataFrame,
               max_gap_us: int) -> list[tuple[int, int]]:
    """Parts [start, end) of the reviewed intervals in which `at_stamps` finds what is there, in order.

    boxes: stamp_us, object_id of one drive. Nothing is labelled where nothing is there, so a silence longer than
    max_gap_us may be an empty street: its stamps are covered but for those within max_gap_us of a label, and for a
    silence that some object outlasts.
    """
    objects = {stamp: set(ids) for stamp, ids in
               boxes.group_by("stamp_us").agg("object_id").sort("stamp_us").iter_rows()}
    blind = []
    for before, after in itertools.pairwise([None, *objects, None]):
        if before is not None and after is not None:
            if after - before <= max_gap_us:
                continue
            if objects[before] & objects[after]:
                blind.append((before + 1, after))
                continue
        if before is not None:
            blind.append((before + 1, before + max_gap_us))
        if after is not None:
            blind.append((after - max_gap_us + 1, after))
    parts = list(reviewed_us)
    for start, end in blind:
        parts = [part for a, b in parts for part in ((a, min(b, start)), (max(a, end), b)) if part[0] < part[1]]
    return sorted(parts)


def union_us(intervals: Iterable[tuple[int, int]], start_us: int, end_us: int) -> list[int]:
    """start, end, start, end, … of the intervals' union within [start_us, end_us)."""
    bounds: list[int] = []
    for start, end in sorted(intervals):
        start, end = max(start, start_us), min(end, end_us)
        if bounds and start <= bounds[-1]:
            bounds[-1] = max(bounds[-1], end)
        elif start < end:
            bounds += [start, end]
    return bounds


def at_stamps(boxes: pl.DataFrame, samples: pl.DataFrame, max_gap_us: int) -> pl.DataFrame:
    """The samples' boxes: linear between the labels before and after, yaw by the shorter arc, never extrapolated.

    boxes    drive_token, stamp_us, object_id, category, x_m … height_m, yaw_rad, vx_mps, vy_mps
    samples  drive_token, sample_token, stamp_us
    An object that is not in both neighbouring label stamps, or whose neighbours are more than max_gap_us apart, has no
    box. Columns: sample_token, stamp_us, object_id, category and the numbers of `boxes`.
    """
    key = ["drive_token", "stamp_us"]
    labelled = boxes.select(key).unique().sort("stamp_us")
    asked = samples.select("sample_token", *key).sort("stamp_us", "sample_token")
    for side, strategy in (("before_us", "backward"), ("after_us", "forward")):
        asked = asked.join_asof(labelled.with_columns(pl.col("stamp_us").alias(side)), on="stamp_us",
                                by="drive_token", strategy=strategy, check_sortedness=False)
    asked = asked.filter(pl.col("after_us") - pl.col("before_us") <= max_gap_us)
    after = boxes.select("drive_token", pl.col("stamp_us").alias("after_us"), "object_id", "yaw_rad", *LERPED)
    pairs = (asked.join(boxes.rename({"stamp_us": "before_us"}), on=["drive_token", "before_us"])
             .join(after, on=["drive_token", "after_us", "object_id"], suffix="_after"))
    gap_us = pl.col("after_us") - pl.col("before_us")
    ratio = pl.when(gap_us > 0).then((pl.col("stamp_us") - pl.col("before_us")) / gap_us).otherwise(0.0)
    turn_rad = _wrapped(pl.col("yaw_rad_after") - pl.col("yaw_rad"))
    return pairs.select(
        "sample_token", "stamp_us", "object_id", "category",
        _wrapped(pl.col("yaw_rad") + ratio * turn_rad).alias("yaw_rad"),
        *[(pl.col(name) + ratio * (pl.col(f"{name}_after") - pl.col(name))).alias(name) for name in LERPED],
    ).sort("sample_token", "object_id")


def _wrapped(angle: pl.Expr) -> pl.Expr:
    return angle.map_batches(lambda s: pl.Series(s.name, wrap_rad(s.to_numpy()), pl.Float64), return_dtype=pl.Float64)


def covers(samples: pl.DataFrame, intervals: pl.DataFrame) -> pl.Series:
    """For each sample (drive_token, stamp_us), in order: does one of the disjoint intervals (drive_token, start_us,
    end_us) hold it?"""
    found = samples.with_row_index("row").sort("stamp_us").join_asof(
        intervals.sort("start_us"), left_on="stamp_us", right_on="start_us", by="drive_token", strategy="backward",
        check_sortedness=False)
    inside = pl.col("start_us").is_not_null() & (pl.col("stamp_us") < pl.col("end_us"))
    return found.sort("row").select(inside.fill_null(False)).to_series()


def choose(samples: pl.DataFrame, sources: Mapping[str, Iterable[str]]) -> pl.Series:
    """The kind of source of each sample's boxes, "" where none covers it.

    samples  split, and a Boolean column covers_<kind> for each kind; sources: split -> kinds in order of priority
    """
    rules = [pl.when((pl.col("split") == split) & pl.col(f"covers_{kind}")).then(pl.lit(kind))
             for split, kinds in sources.items() for kind in kinds]
    return samples.select(pl.coalesce(*rules, pl.lit("")).alias("label_source")).to_series()


def conflicts(winners: pl.DataFrame, overruled: pl.DataFrame, max_distance_m: float) -> pl.DataFrame:
    """CONFLICTS between two sources' boxes (scene_token, sample_token, stamp_us, category, source, score, x_m, y_m).

    Two boxes are one thing where each is the other's nearest, at most max_distance_m apart in the plane.
    """
    one, other = winners.with_row_index("one"), overruled.with_row_index("other")
    distance_m = ((pl.col("x_m") - pl.col("x_m_other")) ** 2 + (pl.col("y_m") - pl.col("y_m_other")) ** 2).sqrt()
    pairs = (one.join(other, on="sample_token", suffix="_other").with_columns(distance_m.alias("distance_m"))
             .filter(pl.col("distance_m") <= max_distance_m).sort("distance_m", "one", "other"))
    same = (pairs.unique("one", keep="first", maintain_order=True)
            .join(pairs.unique("other", keep="first", maintain_order=True).select("one", "other"),
                  on=["one", "other"], how="semi"))
    both = same.filter(pl.col("category") != pl.col("category_other")).select(
        "scene_token", "sample_token", "stamp_us", pl.lit("category").alias("what"), "source", "category",
        pl.col("source_other").alias("overruled_source"), pl.col("category_other").alias("overruled_category"),
        pl.col("score_other").alias("overruled_score"), "x_m", "y_m", "distance_m")
    missing = one.join(same, on="one", how="anti").with_columns(pl.lit("missing").alias("what"))
    extra = other.join(same, on="other", how="anti").select(
        "scene_token", "sample_token", "stamp_us", pl.lit("extra").alias("what"),
        pl.col("source").alias("overruled_source"), pl.col("category").alias("overruled_category"),
        pl.col("score").alias("overruled_score"), "x_m", "y_m")
    parts = [part.select(set(part.columns) & set(CONFLICTS)) for part in (both, missing, extra)]
    empty = pl.DataFrame(schema=CONFLICTS)
    return pl.concat([empty, *parts], how="diagonal").sort(
        "scene_token", "stamp_us", "what", "x_m", "y_m", "category", "overruled_category")
