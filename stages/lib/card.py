"""The dataset card: what a merged dataset holds and where each part of it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from stages.lib import documents, nuscenes, tables
from stages.lib.digests import canonical, digest_bytes, digest_file
from stages.lib.report import Section

LEAKAGE = {
    "place": "Scenes of different splits are at least {cell_m:g} m apart: every drive's pose is georeferenced.",
    "drive": "No drive is in two splits. Places are not known, since no drive is georeferenced: one place may be in "
             "two splits, and scores on val and test may be too good for it.",
    "mixed": "Scenes of the {num_drives_by_place} georeferenced drives are at least {cell_m:g} m from those of other "
             "splits. {num_drives_by_drive_alone} drives are not georeferenced and were split by drive alone: a place "
             "of theirs may be in two splits."}
RULES = """\
A sample takes all its boxes from one source, the first in its split's list that covers it. Human labels \
and a simulator's truth cover what was reviewed and can be interpolated to the sample's stamp (linear, yaw by the \
shorter arc, never extrapolated); automatic labels (auto) cover every scene that was labelled.

num_lidar_pts counts the points of the sample's LIDAR_TOP key frame inside the box. Visibility is not measured: 1 \
stands for a box without lidar points, 4 for all others. Attributes say moving or not, by speed; vehicle.parked \
includes vehicles that wait. A velocity that no label states comes from the neighbours in the track, at most 1.5 s away.

sample_annotation.source is human, truth, geometric or model:<name>@<digest>, with its score. In the nuScenes view \
every annotation has its source too, with automatic_annotation and autolabel_metadata."""
LOAD = f"""\
`roadmill export OUT` writes OUT, a plain nuScenes dataroot: the packs extracted and the tables of any selection of \
scenes. Then, with nuscenes-devkit:

    nusc = nuscenes.NuScenes(version="{nuscenes.VERSION}", dataroot="OUT")
    nuscenes.utils.splits.get_scenes_of_split("{nuscenes.SPLIT_PREFIX}val", nusc)

The folder nuscenes/ beside this card is such a view without images and points. tables/*.parquet are the tables of \
record, whose sample_data rows say (pack_digest, offset, bytes)."""


def sections(dataset: Path, upstream: Mapping[str, Path], sources: Mapping[str, Sequence[str]], reviewed_h: float,
             num_shown: int) -> list[Section]:
    """The card's sections, in order.

    dataset     folder with tables/, conflicts.parquet, trajectory.parquet
    upstream    stage -> its folder, at least curate and split
    reviewed_h  hours of the scenes that people reviewed; num_shown: scenes in the JSON view
    """
    scenes = tables.read(dataset / "tables" / "scene.parquet")
    policy = documents.read(upstream["split"] / "policy.json", "`dvc repro -f split` makes it again")
    conflicts = tables.scan(dataset / "conflicts.parquet").group_by("what").len("num").sort("what").collect()
    view = f"The nuScenes JSON view has {num_shown} of {scenes.height} scenes."
    listed = "; ".join(f"{split}: {', '.join(kinds) or 'none'}" for split, kinds in sorted(sources.items()))
    made_from = {"from": sorted(upstream), "sha256": [folder_digest(upstream[name]) for name in sorted(upstream)]}
    return [
        Section("What there is", view, _sizes(dataset, scenes)),
        Section("Sensors", "Frames a second are those that were kept: key frames and sweeps together.",
                _sensors(dataset, scenes)),
        Section("Boxes", "with_points: boxes with at least one lidar point.", _boxes(dataset)),
        Section("Labels", f"Label sources in order of priority: {listed}. People reviewed {reviewed_h:.4f} h of these "
                f"scenes.\n\n{RULES}"),
        Section("Conflicts", "Where two sources cover a sample and differ; rows in conflicts.parquet. missing: the "
                "overruled source has no box, extra: only it has one, category: they name different things.",
                conflicts),
        Section("Split", f"Split by {policy['by']}. {LEAKAGE[policy['by']].format(**policy)}"),
        Section("Dropped scenes", "Candidates that are not here, by the rule that dropped them.", _dropped(upstream)),
        Section("CAN", "nuscenes/can_bus has what was recorded: pose (the ego trajectory at its own rate; accel "
                "without gravity, rotation_rate about z alone), vehicle_monitor (vehicle_speed [km/h] alone), "
                "steeranglefeedback where the steering wheel's angle was recorded, and signals, which is no nuScenes "
                "message: every signal under its own name."),
        Section("Maps", "There are none: maps/ has a white placeholder for each location, which log.location names."),
        Section("Made from", "sha256 of each stage's manifest.jsonl, or of the names and digests of its files.",
                pl.DataFrame(made_from)),
        Section("How to load it", LOAD)]


def markdown(title: str, parts: Sequence[Section]) -> str:
    """The sections as a Markdown page."""
    page = [f"# {title}"]
    for part in parts:
        page += [f"## {part.title}"] + ([part.text] if part.text else [])
        if part.table is not None and part.table.is_empty():
            page.append("None.")
        elif part.table is not None:
            rows = [part.table.columns, ["---"] * part.table.width, *part.table.rows()]
            page.append("\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows))
    return "\n\n".join(page) + "\n"


def folder_digest(folder: Path) -> str:
    """sha256 of the folder's manifest.jsonl, or of the names and digests of all its files where it has none."""
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return digest_file(manifest)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest_bytes(canonical([[path.relative_to(folder).as_posix(), digest_file(path)] for path in files]))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sizes(dataset: Path, scenes: pl.DataFrame) -> pl.DataFrame:
    """Sums are of integers, which no order of summing changes."""
    step_mm = (pl.col("x_m").diff() ** 2 + pl.col("y_m").diff() ** 2).sqrt() * 1e3
    paths = tables.scan(dataset / "trajectory.parquet").group_by("scene_token", maintain_order=True).agg(
        step_mm.round().cast(pl.Int64).sum().alias("path_mm"))
    samples = tables.scan(dataset / "tables" / "sample.parquet").group_by("scene_token").agg(
        labelled=(pl.col("label_source") != "").sum())
    rows = scenes.lazy().rename({"token": "scene_token"}).join(samples, on="scene_token").join(
        paths, on="scene_token", how="left").collect()
    totals = [pl.len().alias("scenes"), pl.col("drive_token").n_unique().alias("drives"),
              pl.col("nbr_samples").sum().alias("samples"), pl.col("labelled").sum().alias("labelled samples"),
              ((pl.col("end_us") - pl.col("start_us")).sum() / 3.6e9).alias("hours"),
              (pl.col("path_mm").sum() / 1e6).alias("km")]
    by_split = rows.group_by("split").agg(totals).sort("split")
    return pl.concat([by_split, rows.select(pl.lit("all").alias("split"), *totals)])


def _sensors(dataset: Path, scenes: pl.DataFrame) -> pl.DataFrame:
    length = scenes.lazy().select(pl.col("token").alias("scene_token"), length_us=pl.col("end_us") - pl.col("start_us"))
    per_scene = tables.scan(dataset / "tables" / "sample_data.parquet").group_by("channel", "scene_token").agg(
        pl.len().alias("num"), pl.col("is_key_frame").sum().alias("keys"), pl.col("width_px", "height_px").max())
    rate_hz = pl.col("num").sum() / pl.col("length_us").sum() * 1e6
    return (per_scene.join(length, on="scene_token").group_by("channel").agg(
        pl.col("scene_token").n_unique().alias("scenes"), pl.col("num").sum().alias("frames"),
        pl.col("keys").sum().alias("key frames"), rate_hz.alias("frames a second"),
        pl.col("width_px", "height_px").max()).sort("channel").collect())


def _boxes(dataset: Path) -> pl.DataFrame:
    scenes = tables.scan(dataset / "tables" / "scene.parquet").select(pl.col("token").alias("scene_token"), "split")
    return (tables.scan(dataset / "tables" / "sample_annotation.parquet").join(scenes, on="scene_token")
            .group_by("split", "source", "category").agg(
                pl.len().alias("boxes"), (pl.col("num_lidar_pts") > 0).sum().alias("with_points"),
                pl.col("instance_token").n_unique().alias("instances"))
            .sort("split", "source", "category").collect())


def _dropped(upstream: Mapping[str, Path]) -> pl.DataFrame:
    parts = [tables.read(upstream[stage] / "dropped.parquet", ["rule"]).select(pl.lit(stage).alias("stage"), "rule")
             for stage in ("curate", "split")]
    return pl.concat(parts).group_by("stage", "rule").len("scenes").sort("stage", "rule")
