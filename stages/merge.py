"""The dataset: Parquet tables of record, a nuScenes JSON view of them, splits, CAN messages and a dataset card."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from stages.lib import annotations, card, labels, nuscenes, report, tables
from stages.lib.errors import ConfigError, DataError
from stages.lib.knobs import knob
from stages.lib.stage import Out, Result, Summary, Upstream

INPUTS = ("ingest", "curate", "split", "sample", "autolabel", "labels")
LIDAR = "LIDAR_TOP"
CHUNK_SCENES = 100
ROWS_PER_GROUP = 100_000

SAMPLE = {**tables.SAMPLE, "label_source": pl.String}
# reviewed_us: start, end, start, end, … of the half-open intervals in which people's labels (or the truth) say all.
SCENE = {"token": pl.String, "name": pl.String, "log_token": pl.String, "drive_token": pl.String, "split": pl.String,
         "start_us": pl.Int64, "end_us": pl.Int64, "nbr_samples": pl.Int64, "first_sample_token": pl.String,
         "last_sample_token": pl.String, "pack_digest": pl.String, "reviewed_us": pl.List(pl.Int64)}


@dataclass(frozen=True)
class Knobs:
    """Whose labels count in which split, and how they become annotations."""

    sources: dict[str, tuple[str, ...]] = knob(
        "split -> label sources in order of priority; a sample takes all its boxes from the first that covers it",
        choices=labels.KINDS)
    max_label_gap_us: int = knob("no label is interpolated over a longer silence", above=0)
    conflict_distance_m: float = knob("boxes of two sources nearer than this are of one thing", above=0)
    moving_speed_mps: float = knob("what is slower is parked or standing", above=0)
    view_max_scenes: int = knob("so many scenes stand in the nuScenes JSON view", low=1, high=nuscenes.MAX_SCENES)


@dataclass(frozen=True)
class Scenes:
    """Some scenes (SPLIT), with the results of their sampling and labelling by scene token."""

    rows: pl.DataFrame
    sampled: Mapping[str, Result]
    labelled: Mapping[str, Sequence[Result]]

    def scan(self, table: str) -> pl.LazyFrame:
        """The scenes' fragments of a table, each row with its scene_token."""
        return pl.concat([pl.scan_parquet(self.sampled[token].path(f"{table}.parquet")).with_columns(
            pl.lit(token).alias("scene_token")) for token in self.rows["scene_token"]])

    def pack(self, token: str) -> Path:
        """A scene's pack."""
        return self.sampled[token].path("pack.tar")


def run(cfg: Knobs, inputs: Mapping[str, Upstream], out: Out) -> Summary:
    """data: tables/*.parquet (13), conflicts, trajectory and signals .parquet, splits.json, nuscenes/, README.md.

    Raises ConfigError for automatic labels as ground truth of val or test, or truth in train, and DataError where no
    scene was sampled or one source has two boxes of one object at a sample.
    """
    scenes = _scenes(cfg, inputs)
    parts = out.data / "parts"
    reviewed_us = 0
    for number, rows in enumerate(scenes.rows.iter_slices(CHUNK_SCENES)):
        chunk = Scenes(rows, scenes.sampled, scenes.labelled)
        reviewed_us += _merge_chunk(cfg, inputs, chunk, lambda name, n=number: parts / name / f"{n:06d}.parquet")
    for folder in sorted(path for path in parts.rglob("*") if any(path.glob("*.parquet"))):
        _sink(pl.concat([pl.scan_parquet(path) for path in sorted(folder.glob("*.parquet"))]),
              out.data / f"{folder.relative_to(parts)}.parquet")
    shutil.rmtree(parts)
    nuscenes.write_small_tables(tables.read(inputs["ingest"].folder / "drives.parquet"), out.data / "tables")
    merged = tables.read(out.data / "tables" / "scene.parquet")
    nuscenes.write_splits(merged, "name", "", out.data / "splits.json")
    shown = pl.col("token").is_in(merged["token"].sort().head(cfg.view_max_scenes).implode())
    nuscenes.write(out.data, merged.filter(shown), out.data / "nuscenes")
    num_split = tables.read(inputs["split"].folder / "scenes.parquet", ["scene_token"]).height
    sections = card.sections(out.data, {name: upstream.folder for name, upstream in inputs.items()}, cfg.sources,
                             reviewed_us / 3.6e9, min(cfg.view_max_scenes, merged.height))
    (out.data / "README.md").write_text(card.markdown("Dataset card", sections))
    report.write(out.results / "report.html", "Dataset", sections)
    return Summary(num_in=num_split, num_out=merged.height, unit="scenes",
                   dropped={"not sampled": num_split - merged.height} if num_split > merged.height else {},
                   notes=_notes(cfg, out.data, merged.height))


def check_sources(sources: Mapping[str, Sequence[str]], splits: Iterable[str]) -> None:
    """Raises ConfigError where a split has no sources, or those that would spoil a score."""
    for split, kinds in sources.items():
        if split == "train" and "truth" in kinds:
            raise ConfigError(f"merge.sources.train is {list(kinds)}: the truth is what scores are judged by, nothing "
                              "may be trained on it\n  take `truth` out of merge.sources.train")
        if split != "train" and "auto" in kinds:
            raise ConfigError(f"merge.sources.{split} is {list(kinds)}: automatic labels are no ground truth, a score "
                              f"against them says nothing\n  take `auto` out of merge.sources.{split}")
    missing = sorted(set(splits) - set(sources))
    if missing:
        raise ConfigError(f"merge.sources has no entry for split {missing[0]}, which data/split asks for\n"
                          f"  set merge.sources.{missing[0]} to label sources, e.g. [truth, human]")


def _scenes(cfg: Knobs, inputs: Mapping[str, Upstream]) -> Scenes:
    rows = tables.read(inputs["split"].folder / "scenes.parquet").sort("drive_name", "start_us", "scene_token")
    check_sources(cfg.sources, rows["split"])
    by_name = {result.name: result for result in inputs["sample"].results}
    sampled = {token: by_name[name] for token, name in rows.select("scene_token", "scene_name").iter_rows()
               if name in by_name}
    if not sampled:
        raise DataError(f"{inputs['sample'].folder} has none of the {rows.height} scenes of {inputs['split'].folder}\n"
                        "  make them: `dvc repro sample`")
    labelled: dict[str, list[Result]] = {token: [] for token in sampled}
    for result in inputs["autolabel"].results:
        labelled.setdefault(result.facts["scene_token"], []).append(result)
    return Scenes(rows.filter(pl.col("scene_token").is_in(list(sampled))), sampled, labelled)


def _merge_chunk(cfg: Knobs, inputs: Mapping[str, Upstream], scenes: Scenes, part: Callable[[str], Path]) -> int:
    """Writes the scenes' parts of the tables; µs of them that people reviewed."""
    for name in ("sample_data", "ego_pose", "calibrated_sensor"):
        _sink(scenes.scan(name), part(f"tables/{name}"))
    _sink(scenes.scan("signals"), part("signals"))
    _sink(scenes.scan("trajectory"), part("trajectory"))
    files = {kind: labels.read(inputs["labels"].folder / kind, _drives_with(cfg, scenes.rows, kind),
                               cfg.max_label_gap_us) for kind in ("truth", "human")}
    samples = scenes.scan("sample").collect().join(
        scenes.rows.select("scene_token", "drive_token", "split"), on="scene_token", maintain_order="left")
    samples = samples.rename({"token": "sample_token"}).with_columns(
        *[labels.covers(samples, one.covered).alias(f"covers_{kind}") for kind, one in files.items()],
        pl.col("scene_token").is_in([token for token, results in scenes.labelled.items() if results])
        .alias("covers_auto"))
    samples = samples.with_columns(labels.choose(samples, cfg.sources))
    found = _boxes(cfg, scenes, samples, files)
    boxes = annotations.annotate(_of_chosen(found, samples), _sweeps(scenes), scenes.pack, cfg.moving_speed_mps)
    rank = scenes.rows.select("scene_token").with_row_index("rank")
    ordered = boxes.join(rank, on="scene_token").sort("rank", "stamp_us", "instance_token")
    _sink(ordered.lazy().select(*annotations.ANNOTATION), part("tables/sample_annotation"))
    _sink(annotations.instances(ordered).lazy(), part("tables/instance"))
    _sink(_conflicts(cfg, boxes, found, samples).lazy(), part("conflicts"))
    _sink(samples.rename({"sample_token": "token"}).lazy().select(*SAMPLE), part("tables/sample"))
    _sink(_scene_rows(cfg, scenes, samples, files).lazy(), part("tables/scene"))
    return _overlap_us(scenes.rows, files["human"].reviewed)


def _sink(rows: pl.LazyFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.sink_parquet(path, compression="zstd", row_group_size=ROWS_PER_GROUP, maintain_order=True)


# boxes ----------------------------------------------------------------------------------------------------------------
def _drives_with(cfg: Knobs, scenes: pl.DataFrame, kind: str) -> dict[str, str]:
    """drive token -> name, of the drives in whose splits the source may be used."""
    splits = [split for split, kinds in cfg.sources.items() if kind in kinds]
    return dict(scenes.filter(pl.col("split").is_in(splits)).select("drive_token", "drive_name").unique().sort(
        "drive_name", "drive_token").iter_rows())


def _boxes(cfg: Knobs, scenes: Scenes, samples: pl.DataFrame,
           files: Mapping[str, labels.LabelFiles]) -> dict[str, pl.DataFrame]:
    """kind -> boxes of every sample that the kind covers: BOXES (num_lidar_pts null in files) and scene_token."""
    paths = [result.path("boxes.parquet") for token in scenes.rows["scene_token"] for result in scenes.labelled[token]]
    auto = pl.concat([pl.DataFrame(schema=tables.BOXES), *map(tables.read, paths)])
    found = {"auto": auto}
    for kind, one in files.items():
        at = labels.at_stamps(one.boxes, samples.filter(f"covers_{kind}"), cfg.max_label_gap_us)
        found[kind] = at.rename({"object_id": "track_id"}).with_columns(
            score=1.0, source=pl.lit(kind), num_lidar_pts=pl.lit(None, pl.Int64)).select(*tables.BOXES)
    return {kind: boxes.join(samples.select("sample_token", "scene_token"), on="sample_token", maintain_order="left")
            for kind, boxes in found.items()}


def _of_chosen(found: Mapping[str, pl.DataFrame], samples: pl.DataFrame) -> pl.DataFrame:
    """The boxes of each sample's chosen source, of no other."""
    return pl.concat([boxes.join(samples.filter(pl.col("label_source") == kind), on="sample_token", how="semi")
                      for kind, boxes in found.items()])


def _sweeps(scenes: Scenes) -> pl.DataFrame:
    """The samples' lidar key frames, as `annotations.annotate` takes them."""
    mounts = scenes.scan("calibrated_sensor").select(pl.col("token").alias("calibrated_sensor_token"), *tables.POSE)
    poses = scenes.scan("ego_pose").select(pl.col("token").alias("ego_pose_token"), *tables.POSE)
    return (scenes.scan("sample_data").filter((pl.col("channel") == LIDAR) & pl.col("is_key_frame"))
            .join(poses, on="ego_pose_token").join(mounts, on="calibrated_sensor_token", suffix="_sensor").collect())


def _conflicts(cfg: Knobs, boxes: pl.DataFrame, found: Mapping[str, pl.DataFrame],
               samples: pl.DataFrame) -> pl.DataFrame:
    """CONFLICTS of each sample's chosen source with those after it; boxes without lidar points aren't asked for."""
    parts = [pl.DataFrame(schema=labels.CONFLICTS)]
    visible = boxes.filter(pl.col("visibility") != "1")
    for split, kinds in cfg.sources.items():
        for place, winner in enumerate(kinds):
            for overruled in kinds[place + 1:]:
                both = samples.filter((pl.col("split") == split) & (pl.col("label_source") == winner)
                                      & pl.col(f"covers_{overruled}"))
                parts.append(labels.conflicts(visible.join(both, on="sample_token", how="semi"),
                                              found[overruled].join(both, on="sample_token", how="semi"),
                                              cfg.conflict_distance_m))
    return pl.concat(parts)


# rows of the small tables ---------------------------------------------------------------------------------------------
def _scene_rows(cfg: Knobs, scenes: Scenes, samples: pl.DataFrame,
                files: Mapping[str, labels.LabelFiles]) -> pl.DataFrame:
    ends = samples.sort("stamp_us").group_by("scene_token").agg(
        pl.len().cast(pl.Int64).alias("nbr_samples"), pl.col("sample_token").first().alias("first_sample_token"),
        pl.col("sample_token").last().alias("last_sample_token"))
    reviewed = []
    for row in scenes.rows.iter_rows(named=True):
        kinds = itertools.takewhile(lambda kind: kind != "auto", cfg.sources[row["split"]])
        covered = [bounds for kind in kinds for drive, *bounds in files[kind].covered.iter_rows()
                   if drive == row["drive_token"]]
        reviewed.append(labels.union_us(covered, row["start_us"], row["end_us"]))
    packs = [scenes.sampled[token].outputs["pack.tar"].digest for token in scenes.rows["scene_token"]]
    return scenes.rows.join(ends, on="scene_token", maintain_order="left").with_columns(
        pl.Series("log_token", [tables.token("log", drive) for drive in scenes.rows["drive_token"]], pl.String),
        pl.Series("pack_digest", packs, pl.String), pl.Series("reviewed_us", reviewed, pl.List(pl.Int64)),
    ).rename({"scene_token": "token", "scene_name": "name"}).select(*SCENE)


def _overlap_us(scenes: pl.DataFrame, intervals: pl.DataFrame) -> int:
    both = scenes.select("drive_token", a="start_us", b="end_us").join(intervals, on="drive_token")
    length = pl.min_horizontal("b", "end_us") - pl.max_horizontal("a", "start_us")
    return both.select(length.clip(0).sum()).item()


def _notes(cfg: Knobs, dataset: Path, num_scenes: int) -> tuple[str, ...]:
    splits = tables.read(dataset / "tables" / "scene.parquet").select(pl.col("token").alias("scene_token"), "split")
    samples = tables.read(dataset / "tables" / "sample.parquet", ["scene_token", "label_source"]).join(
        splits, on="scene_token")
    counts = samples.group_by("split").agg(num=pl.len(), bare=(pl.col("label_source") == "").sum()).sort("split")
    notes = [f"{split}: {bare} of {num} samples have no labels from {', '.join(cfg.sources[split])}"
             for split, num, bare in counts.iter_rows() if bare]
    conflicts = pl.scan_parquet(dataset / "conflicts.parquet").select(pl.len()).collect().item()
    if conflicts:
        notes.append(f"{conflicts} boxes differ between label sources: data/merge/conflicts.parquet")
    if num_scenes > cfg.view_max_scenes:
        notes.append(f"the nuScenes JSON view has {cfg.view_max_scenes} of {num_scenes} scenes "
                     "(merge.view_max_scenes); `roadmill export OUT` makes a view of any others")
    return tuple(notes)
