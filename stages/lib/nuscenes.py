"""The nuScenes JSON view of a selection of scenes, streamed out of the Parquet tables of record.

Schema: nuScenes v1.0 (docs/schema_nuscenes.md of nuscenes-devkit). Keys beyond it, which the devkit ignores: an
annotation's `source`, `automatic_annotation` and `autolabel_metadata` (as in T4), a sample's `label_source`, and a
calibrated sensor's `camera_distortion`.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from stages.lib import canbus, names, tables
from stages.lib.errors import ConfigError, DataError

VERSION = "v1.0-roadmill"
SPLIT_PREFIX = "roadmill_"  # the devkit keeps train, val and test for nuScenes' own 1000 scenes
# NuScenesCanBus takes scene-NNNN alone, and refuses these numbers: nuScenes has no CAN data there.
BLOCKED_NUMBERS = {*range(161, 169), *range(170, 177), *range(309, 315)}
MAX_SCENES = 9999 - len(BLOCKED_NUMBERS)
CHUNK_ROWS = 100_000
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg==")

CATEGORIES = (
    "animal", "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.stroller",
    "human.pedestrian.wheelchair", "movable_object.barrier", "movable_object.debris",
    "movable_object.pushable_pullable", "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle",
    "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.emergency.ambulance",
    "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck")
ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.parked": "Vehicle stands; whether it is parked or only waits is not known.",
    "pedestrian.moving": "The human is moving.",
    "pedestrian.standing": "The human is standing."}
VISIBILITY = {
    "1": ("v0-40", "no lidar point in the box; visibility itself is not measured"),
    "2": ("v40-60", "not used"),
    "3": ("v60-80", "not used"),
    "4": ("v80-100", "lidar points in the box, or no lidar to tell; visibility itself is not measured")}
TABLES = ("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
          "sample_annotation", "sample_data", "scene", "sensor", "visibility")


def fixed_tables(categories: set[str]) -> dict[str, pl.DataFrame]:
    """The tables category (nuScenes' 23 and those given), attribute and visibility."""
    names = [*CATEGORIES, *sorted(categories - set(CATEGORIES))]
    return {
        "category": pl.DataFrame({"token": [tables.token("category", name) for name in names], "name": names,
                                  "description": names, "index": range(1, len(names) + 1)}),
        "attribute": pl.DataFrame({"token": [tables.token("attribute", name) for name in ATTRIBUTES],
                                   "name": list(ATTRIBUTES), "description": list(ATTRIBUTES.values())}),
        "visibility": pl.DataFrame([(token, *texts) for token, texts in VISIBILITY.items()],
                                   schema=["token", "level", "description"], orient="row")}


def write_small_tables(drives: pl.DataFrame, folder: Path) -> None:
    """The tables sensor, log, map, category, attribute and visibility, for what stands in the others in `folder`.

    drives: DRIVES. There is no map: each location has a white placeholder.
    """
    sensors = tables.read(folder / "calibrated_sensor.parquet", ["channel", "modality"]).unique().sort("channel")
    sensor_tokens = [tables.token("sensor", channel) for channel in sensors["channel"]]
    tables.write(sensors.select(pl.Series("token", sensor_tokens, pl.String), "channel", "modality"),
                 folder / "sensor.parquet")
    scenes = tables.read(folder / "scene.parquet")
    used = drives.join(scenes, on="drive_token", how="semi").sort("drive_name", "drive_token")
    days = [datetime.datetime.fromtimestamp(us // 1_000_000, datetime.UTC).date().isoformat()
            for us in used["start_us"]]
    logs = used.select(
        pl.Series("token", [tables.token("log", drive) for drive in used["drive_token"]], pl.String),
        pl.col("drive_name").alias("logfile"), "vehicle", pl.Series("date_captured", days, pl.String), "location",
        "drive_token")
    tables.write(logs, folder / "log.parquet")
    maps = logs.group_by("location").agg(pl.col("token").sort().alias("log_tokens")).sort("location")
    map_tokens = pl.Series("token", [tables.token("map", place) for place in maps["location"]], pl.String)
    tables.write(maps.select(map_tokens, pl.lit("semantic_prior").alias("category"),
                             ("maps/" + map_tokens + ".png").alias("filename"), "log_tokens"), folder / "map.parquet")
    categories = tables.scan(folder / "sample_annotation.parquet").select(pl.col("category").unique()).collect()
    for name, rows in fixed_tables(set(categories["category"])).items():
        tables.write(rows, folder / f"{name}.parquet")




def scene_names(num: int) -> list[str]:
    """scene-0001, scene-0002, … without the blocked numbers. Raises ConfigError where four digits don't do."""
    if num > MAX_SCENES:
        raise ConfigError(f"{num} scenes are more than the {MAX_SCENES} that a nuScenes view can name (scene-NNNN)\n"
                          "  select fewer: `roadmill export OUT --split SPLIT` or `--scene SCENE`")
    free = (number for number in range(1, 10_000) if number not in BLOCKED_NUMBERS)
    return [f"scene-{number:04d}" for number, _ in zip(free, range(num))]


def write(dataset: Path, scenes: pl.DataFrame, root: Path) -> None:
    """v1.0-roadmill/*.json with splits.json, maps/ and can_bus/ under `root`.

    dataset  what merge wrote: tables/, trajectory.parquet, signals.parquet
    scenes   the chosen rows of its table scene, in the order in which they are numbered
    """
    scenes = scenes.with_columns(pl.Series("view_name", scene_names(scenes.height)))
    folder = root / VERSION
    folder.mkdir(parents=True)
    chosen = pl.col("scene_token").is_in(scenes["token"].implode())
    logs = pl.col("token").is_in(scenes["log_token"].implode())

    def stream(table: str, rows: Callable[[pl.DataFrame], pl.DataFrame], keep: pl.Expr | None = chosen) -> None:
        chunks = read_chunks(dataset / "tables" / f"{table}.parquet")
        _write_rows(folder / f"{table}.json", (rows(c if keep is None else c.filter(keep)) for c in chunks))

    for table in ("attribute", "category", "visibility", "sensor"):
        stream(table, lambda rows: rows, None)
    for table, rows in (("ego_pose", _ego_poses), ("instance", _instances), ("sample", _samples),
                        ("calibrated_sensor", _calibrated_sensors), ("sample_data", _sample_data),
                        ("sample_annotation", _annotations)):
        stream(table, rows)
    stream("log", lambda rows: rows.drop("drive_token"), logs)
    stream("map", lambda rows: _maps(rows, scenes), None)
    _write_rows(folder / "scene.json", [_scenes(scenes)])
    write_splits(scenes, "view_name", SPLIT_PREFIX, folder / "splits.json")
    for name in tables.read(dataset / "tables" / "map.parquet")["filename"]:
        if not names.is_below(name):
            raise DataError(f"{dataset}/tables/map.parquet: {name!r} is not a file's name below the dataroot\n"
                            "  make the dataset again: `dvc repro -f merge`")
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(PNG)
    canbus.write(dataset, dict(scenes.select("token", "view_name").iter_rows()), root / "can_bus")


def write_splits(scenes: pl.DataFrame, name: str, prefix: str, path: Path) -> None:
    """splits.json: prefix + split -> the scenes' names in column `name`."""
    by_split = scenes.group_by("split", maintain_order=True).agg(name).sort("split").iter_rows()
    path.write_text(json.dumps({f"{prefix}{split}": names for split, names in by_split}, indent=1) + "\n")


def read_chunks(path: Path) -> Iterator[pl.DataFrame]:
    """A table's rows in order, CHUNK_ROWS at a time."""
    scan = tables.scan(path)
    num_rows = scan.select(pl.len()).collect().item()
    for start in range(0, max(num_rows, 1), CHUNK_ROWS):
        yield scan.slice(start, CHUNK_ROWS).collect()


def _write_rows(path: Path, chunks: Iterator[pl.DataFrame] | list[pl.DataFrame]) -> None:
    """A JSON array with a line for each row, keys sorted."""
    with path.open("w", encoding="utf-8") as file:
        separator = "["
        for chunk in chunks:
            if chunk.height:
                lines = chunk.select(sorted(chunk.columns)).write_ndjson()
                file.write(separator + "\n" + lines.removesuffix("\n").replace("\n", ",\n"))
                separator = ","
        file.write("\n]\n" if separator == "," else "[]\n")


def _of_pose() -> tuple[pl.Expr, pl.Expr]:
    return (pl.concat_list("x_m", "y_m", "z_m").alias("translation"),
            pl.concat_list("qw", "qx", "qy", "qz").alias("rotation"))


def _ego_poses(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select("token", pl.col("stamp_us").alias("timestamp"), *_of_pose())


def _instances(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select("token", "category_token", "nbr_annotations", "first_annotation_token", "last_annotation_token")


def _samples(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select("token", pl.col("stamp_us").alias("timestamp"), "prev", "next", "scene_token", "label_source")


def _scenes(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select("token", "log_token", "nbr_samples", "first_sample_token", "last_sample_token",
                       pl.col("view_name").alias("name"), pl.col("name").alias("description"))


def _maps(rows: pl.DataFrame, scenes: pl.DataFrame) -> pl.DataFrame:
    kept = pl.col("log_tokens").list.set_intersection(scenes["log_token"].unique().sort().implode())
    return rows.with_columns(kept.list.sort())


def _calibrated_sensors(rows: pl.DataFrame) -> pl.DataFrame:
    matrices = [[k[:3], k[3:6], k[6:]] if k else [] for k in rows["camera_intrinsic"].to_list()]
    sensors = [tables.token("sensor", channel) for channel in rows["channel"]]
    return rows.select("token", *_of_pose(), pl.col("camera_distortion").fill_null([])).with_columns(
        pl.Series("camera_intrinsic", matrices, pl.List(pl.List(pl.Float64))),
        pl.Series("sensor_token", sensors, pl.String))


def _sample_data(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "fileformat",
                       "is_key_frame", "filename", "prev", "next", pl.col("stamp_us").alias("timestamp"),
                       pl.col("height_px").fill_null(0).alias("height"), pl.col("width_px").fill_null(0).alias("width"))


def _annotations(rows: pl.DataFrame) -> pl.DataFrame:
    automatic = ~pl.col("source").is_in(["human", "truth"])
    tokens = {name: tables.token("attribute", name) for name in ATTRIBUTES}
    attributes = pl.concat_list(pl.col("attribute").replace_strict(tokens, default=None, return_dtype=pl.String))
    return rows.select(
        "token", "sample_token", "instance_token", "prev", "next", "num_lidar_pts", "num_radar_pts", "source",
        *_of_pose(), pl.concat_list("width_m", "length_m", "height_m").alias("size"),
        pl.col("visibility").alias("visibility_token"),
        attributes.list.drop_nulls().alias("attribute_tokens"), automatic.alias("automatic_annotation"),
        pl.when(automatic).then(pl.concat_list(pl.struct(pl.col("source").alias("name"), "score")))
        .alias("autolabel_metadata"))
