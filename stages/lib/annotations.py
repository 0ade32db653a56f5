"""Boxes become sample annotations and instances: tokens, chains, velocities, points, visibility, attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import polars as pl

from stages.lib import geometry, pack, tables
from stages.lib.boxes import count_inside
from stages.lib.errors import DataError

MAX_CHAIN_US = 1_500_000  # as nuscenes-devkit: no velocity from neighbours further away than this
BOX = ("x_m", "y_m", "z_m", "length_m", "width_m", "height_m", "yaw_rad")
ANNOTATION = {
    "token": pl.String, "sample_token": pl.String, "scene_token": pl.String, "instance_token": pl.String,
    "category": pl.String, **tables.POSE, "length_m": pl.Float64, "width_m": pl.Float64, "height_m": pl.Float64,
    "vx_mps": pl.Float64, "vy_mps": pl.Float64, "num_lidar_pts": pl.Int64, "num_radar_pts": pl.Int64,
    "visibility": pl.String, "attribute": pl.String, "prev": pl.String, "next": pl.String, "source": pl.String,
    "score": pl.Float64}
INSTANCE = {"token": pl.String, "scene_token": pl.String, "category_token": pl.String, "nbr_annotations": pl.Int64,
            "first_annotation_token": pl.String, "last_annotation_token": pl.String, "track_id": pl.String,
            "source": pl.String}


def annotate(boxes: pl.DataFrame, sweeps: pl.DataFrame, pack_of: Callable[[str], Path],
             moving_speed_mps: float) -> pl.DataFrame:
    """The boxes as ANNOTATION rows by instance and stamp, with stamp_us and track_id.

    boxes    BOXES with scene_token; num_lidar_pts is null where it is to be counted
    sweeps   the samples' lidar key frames: sample_token, scene_token, offset, bytes, the POSE of the ego at its stamp
             and of the sensor (names end in _sensor)
    pack_of  scene token -> pack
    Raises DataError for two boxes of one thing in one sample.
    """
    thing = ["scene_token", "source", "track_id"]
    twins = boxes.filter(pl.struct("sample_token", *thing).is_duplicated()).sort("sample_token", *thing)
    if twins.height:
        row = twins.row(0, named=True)
        raise DataError(f"{row['source']} labels have object {row['track_id']} twice at {row['stamp_us']} us of scene "
                        f"{row['scene_token']}\n  give each object its own id, then `roadmill scan` again")
    things = boxes.select(thing).unique(maintain_order=True)
    instances = [tables.token("instance", *row) for row in things.iter_rows()]
    boxes = boxes.join(things.with_columns(pl.Series("instance_token", instances, pl.String)), on=thing,
                       maintain_order="left")
    tokens = [tables.token("sample_annotation", *row)
              for row in boxes.select("sample_token", "instance_token").iter_rows()]
    boxes = chain(count_points(boxes.with_columns(pl.Series("token", tokens, pl.String)), sweeps, pack_of))
    unseen = (pl.col("num_lidar_pts") == 0) & pl.col("sample_token").is_in(sweeps["sample_token"].implode())
    rotation = geometry.yaw_wxyz(boxes["yaw_rad"].to_numpy()).reshape(-1, 4)
    return boxes.with_columns(
        *[pl.Series(name, rotation[:, i], pl.Float64) for i, name in enumerate(("qw", "qx", "qy", "qz"))],
        pl.lit(0, pl.Int64).alias("num_radar_pts"), attribute(moving_speed_mps).alias("attribute"),
        pl.when(unseen).then(pl.lit("1")).otherwise(pl.lit("4")).alias("visibility"))


def count_points(boxes: pl.DataFrame, sweeps: pl.DataFrame, pack_of: Callable[[str], Path]) -> pl.DataFrame:
    """The boxes with num_lidar_pts: where it was null, the points of the sample's lidar key frame inside (none: 0).

    Arguments as in `annotate`.
    """
    sweep_of = {row["sample_token"]: row for row in sweeps.iter_rows(named=True)}
    counts = boxes["num_lidar_pts"].fill_null(0).to_numpy().copy()
    uncounted = boxes.with_row_index("row").filter(pl.col("num_lidar_pts").is_null())
    for (token,), rows in uncounted.partition_by("sample_token", as_dict=True, maintain_order=True).items():
        if token in sweep_of:
            sweep = sweep_of[token]
            points = pack.read_points(pack.read_member(pack_of(sweep["scene_token"]), sweep["offset"], sweep["bytes"]))
            xyz = geometry.apply(_transform(sweep, "") @ _transform(sweep, "_sensor"), points[:, :3].astype(float))
            counts[rows["row"].to_numpy()] = count_inside(xyz, rows.select(BOX).to_numpy())
    return boxes.with_columns(pl.Series("num_lidar_pts", counts, pl.Int64))


def _transform(row: Mapping[str, float], suffix: str) -> np.ndarray:
    numbers = np.array([row[name + suffix] for name in tables.POSE])
    return geometry.transform(numbers[:3], numbers[3:])


def instances(boxes: pl.DataFrame) -> pl.DataFrame:
    """INSTANCE rows of annotations that stand by stamp, in order of their first one."""
    rows = boxes.group_by("instance_token", maintain_order=True).agg(
        pl.col("scene_token", "category", "track_id", "source").first(),
        pl.len().cast(pl.Int64).alias("nbr_annotations"), pl.col("token").first().alias("first_annotation_token"),
        pl.col("token").last().alias("last_annotation_token"))
    tokens = [tables.token("category", name) for name in rows["category"]]
    return rows.rename({"instance_token": "token"}).with_columns(
        pl.Series("category_token", tokens, pl.String)).select(*INSTANCE)


def chain(boxes: pl.DataFrame) -> pl.DataFrame:
    """The same boxes by instance and stamp with prev and next ("" at the ends), an instance's one category (its most
    frequent), and velocities where they were unknown: from the neighbours in the chain, as nuscenes-devkit does.

    boxes  token, instance_token, stamp_us, category, x_m, y_m, vx_mps, vy_mps and others
    """
    by_votes = (boxes.group_by("instance_token", "category").len()
                .sort("instance_token", "len", "category", descending=[False, True, False])
                .unique("instance_token", keep="first", maintain_order=True).select("instance_token", "category"))
    boxes = (boxes.drop("category").join(by_votes, on="instance_token", maintain_order="left")
             .sort("instance_token", "stamp_us"))

    def neighbour(name: str, step: int) -> pl.Expr:
        return pl.col(name).shift(step).over("instance_token")

    def near(step: int) -> pl.Expr:
        return ((neighbour("stamp_us", step) - pl.col("stamp_us")).abs() <= MAX_CHAIN_US).fill_null(False)

    def between(name: str) -> pl.Expr:
        """The neighbour's value where it is near, else the box's own."""
        before = pl.when(near(1)).then(neighbour(name, 1)).otherwise(pl.col(name))
        after = pl.when(near(-1)).then(neighbour(name, -1)).otherwise(pl.col(name))
        return after - before

    span_s = between("stamp_us") / 1e6
    found = {v: pl.when(span_s > 0).then(between(x) / span_s).otherwise(float("nan"))
             for v, x in (("vx_mps", "x_m"), ("vy_mps", "y_m"))}
    return boxes.with_columns(
        neighbour("token", 1).fill_null("").alias("prev"), neighbour("token", -1).fill_null("").alias("next"),
        *[pl.when(pl.col(v).is_nan()).then(by_chain).otherwise(pl.col(v)).alias(v) for v, by_chain in found.items()])


def attribute(moving_speed_mps: float) -> pl.Expr:
    """The nuScenes attribute that category and speed tell, "" where they don't.

    Vehicles move or are parked, pedestrians move or stand; whether a vehicle only waits, or a cycle has a rider, isn't
    known from its box.
    """
    moving = (pl.col("vx_mps") ** 2 + pl.col("vy_mps") ** 2).sqrt() > moving_speed_mps
    category = pl.col("category")
    cycle = category.is_in(["vehicle.bicycle", "vehicle.motorcycle"])
    return (pl.when(pl.col("vx_mps").is_nan() | cycle).then(pl.lit(""))
            .when(category.str.starts_with("vehicle.") & moving).then(pl.lit("vehicle.moving"))
            .when(category.str.starts_with("vehicle.")).then(pl.lit("vehicle.parked"))
            .when(category.str.starts_with("human.pedestrian.") & moving).then(pl.lit("pedestrian.moving"))
            .when(category.str.starts_with("human.pedestrian.")).then(pl.lit("pedestrian.standing"))
            .otherwise(pl.lit("")))
