"""Boxes without a human: what a geometric labeller sees in the lidar sweeps of a scene.

Every sweep shows what stands over the ground (`raw.parquet`, kept as seen, so that all later thresholds can be tuned
again); what measures and moves like a road user becomes a track, with a box at each key frame (`boxes.parquet`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stages.lib import draw, geometry, objects, pack, report, sightings, tables
from stages.lib.boxes import count_inside, not_overlapped
from stages.lib.clusters import Clustering
from stages.lib.knobs import knob
from stages.lib.objects import Category, Motion, Rules
from stages.lib.stage import Facts, Item, Out, Result, Summary, Upstream
from stages.lib.standing import Standing
from stages.lib.tracking import Tracking

INPUTS = ("sample",)
SOURCE = "geometric"
RANGE_SHOWN_M = 40

SCENES = {"scene_token": pl.String, "scene_name": pl.String, "labeller": pl.String, "num_sweeps": pl.Int64,
          "num_sightings": pl.Int64, "num_tracks": pl.Int64, "num_boxes": pl.Int64, "mean_score": pl.Float64}


@dataclass(frozen=True)
class Knobs:
    """What is looked at, and what counts as an object."""

    channel: str = knob("the lidar that is looked at")
    frame_stride: int = knob("of its sweeps between key frames, every n-th is looked at", low=1)
    clustering: Clustering = knob("points to clusters")
    standing: Standing = knob("points to standing things")
    tracking: Tracking = knob("clusters to tracks")
    motion: Motion = knob("which tracks move")
    categories: tuple[Category, ...] = knob("what a box may be, by its measures; the first that fits is taken")
    min_score: float = knob("tracks of a lower score give no boxes", low=0, high=1)
    min_points: int = knob("boxes with fewer points of their key frame are dropped", low=1)
    num_pictures: int = knob("scenes shown in the report", low=0, in_key=False)


@dataclass(frozen=True)
class Sweep:
    """One sweep of the scene: its sample's token where it is a key frame, else ''; turn_s: from sweep to sweep."""

    stamp_us: int
    sample_token: str
    offset: int
    num_bytes: int
    turn_s: float
    T_map_ego: np.ndarray
    T_ego_sensor: np.ndarray

    def xyz_sensor(self, pack_path: Path) -> np.ndarray:
        """Points (N, 3) [m] in the sensor frame, in their order in the pack."""
        points = pack.read_points(pack.read_member(pack_path, self.offset, self.num_bytes))
        return points[:, :3].astype(float)

    def xyz_ego(self, pack_path: Path) -> np.ndarray:
        """Points (N, 3) [m] in the ego frame at the sweep's stamp."""
        return geometry.apply(self.T_ego_sensor, self.xyz_sensor(pack_path))


def plan(cfg: Knobs, inputs: Mapping[str, Upstream]) -> list[Item]:
    """One item per scene, with the scene's pack and tables."""
    files = {"pack": "pack.tar"} | {name: f"{name}.parquet" for name in
                                    ("sample", "sample_data", "ego_pose", "calibrated_sensor")}
    return [Item(name=result.name, params={"labeller": SOURCE},
                 inputs={role: result.outputs[file].digest for role, file in files.items()})
            for result in inputs["sample"].results]


def run(cfg: Knobs, item: Item, inputs: Mapping[str, Path], out: Path) -> Facts:
    """raw.parquet (`sightings.RAW`), boxes.parquet BOXES of one scene, and picture.jpg of its middle key frame."""
    sample = tables.read(inputs["sample"]).sort("stamp_us")
    sweeps = [s for n, s in enumerate(_sweeps(cfg.channel, inputs)) if s.sample_token or n % cfg.frame_stride == 0]
    raw = detect(cfg, sweeps, inputs["pack"])
    key_frames = {sweep.sample_token: sweep for sweep in sweeps if sweep.sample_token}
    boxes = label(cfg, raw, sample, key_frames, inputs["pack"])
    tables.write(raw, out / "raw.parquet")
    tables.write(boxes, out / "boxes.parquet")
    if key_frames:
        middle = list(key_frames.values())[len(key_frames) // 2]
        (out / "picture.jpg").write_bytes(_picture(middle, boxes, inputs["pack"]))
    by_category = dict(boxes.group_by("category").len().sort("category").iter_rows())
    return {"scene_token": sample["scene_token"][0], "labeller": SOURCE, "num_sweeps": len(sweeps),
            "num_sightings": len(raw), "num_tracks": boxes["track_id"].n_unique(), "num_boxes": len(boxes),
            "num_boxes_by_category": by_category, "mean_score": round(boxes["score"].mean(), 6) if len(boxes) else None}


def detect(cfg: Knobs, sweeps: list[Sweep], pack_path: Path) -> pl.DataFrame:
    """The table `sightings.RAW` of all sweeps."""
    scans = [sightings.scan(s.stamp_us, s.xyz_sensor(pack_path), s.T_map_ego, s.T_ego_sensor, turn_s=s.turn_s,
                            cfg=cfg.clustering) for s in sweeps]
    return sightings.find(scans, cfg.clustering, cfg.standing)


def label(cfg: Knobs, raw: pl.DataFrame, sample: pl.DataFrame, key_frames: Mapping[str, Sweep],
          pack_path: Path) -> pl.DataFrame:
    """The table BOXES: the objects in raw, at the samples whose key frames (by sample token) have points of them."""
    rules = Rules(cfg.tracking, cfg.motion, cfg.categories)
    found = [t for t in objects.find(raw, sample["stamp_us"].to_numpy(), rules) if t.score >= cfg.min_score]
    rows = []
    for number, (token, stamp_us, scene) in enumerate(sample.select("token", "stamp_us", "scene_token").iter_rows()):
        if token not in key_frames:
            continue
        present = [(track_id, track, int(at[0])) for track_id, track in enumerate(found)
                   if len(at := np.flatnonzero(track.sample == number))]
        boxes = np.array([track.box(at) for _, track, at in present]).reshape(-1, 7)
        T = key_frames[token].T_map_ego
        num_points = count_inside(geometry.apply(T, key_frames[token].xyz_ego(pack_path)), boxes)
        kept = not_overlapped(boxes, np.array([track.score for _, track, _ in present]))
        for (track_id, track, at), box, num, keep in zip(present, boxes, num_points, kept):
            if keep and num >= cfg.min_points:
                rows.append((token, stamp_us, tables.token("track", scene, SOURCE, track_id), track.category,
                             *box, *track.states[at, 1], track.score, SOURCE, int(num)))
    return pl.DataFrame(rows, schema=tables.BOXES, orient="row")


def collect(cfg: Knobs, results: list[Result], out: Out) -> Summary:
    """scenes.parquet SCENES with one count per category, and report.html with the scenes of most boxes."""
    categories = sorted(kind.name for kind in cfg.categories)
    rows = [{**{name: result.facts.get(name) for name in SCENES}, "scene_name": result.name,
             **{f"num_{c}": result.facts["num_boxes_by_category"].get(c, 0) for c in categories}} for result in results]
    scenes = tables.frame(rows, SCENES | {f"num_{c}": pl.Int64 for c in categories})
    tables.write(scenes, out.data / "scenes.parquet")
    num_boxes = scenes["num_boxes"].sum()
    shown = sorted(results, key=lambda result: (-result.facts["num_boxes"], result.name))[:cfg.num_pictures]
    pictures = tuple((f"{r.name}: its middle key frame from above, forward is up", r.path("picture.jpg").read_bytes())
                     for r in shown if "picture.jpg" in r.outputs)
    report.write(out.results / "report.html", "Automatic labels", [
        report.Section("Boxes", f"{num_boxes} boxes of {scenes['num_tracks'].sum()} tracks in {len(scenes)} scenes, "
                       "made from lidar geometry alone. The score grows with what was seen of an object; it is not a "
                       "probability.", scenes.drop("scene_token")),
        report.Section("Scenes with most boxes", pictures=pictures)])
    empty = scenes.filter(pl.col("num_boxes") == 0).height
    notes = () if empty < len(scenes) else (
        "no scene has any automatic box: look at the picture in results/autolabel/report.html, then at the knobs "
        "autolabel.clustering.*",)
    return Summary(num_in=len(results), num_out=num_boxes, unit_in="scenes", unit="boxes",
                   dropped={"scenes without boxes": empty} if empty else {}, notes=notes)


def _sweeps(channel: str, inputs: Mapping[str, Path]) -> list[Sweep]:
    """The channel's sweeps in order of time; none where the rig has no such channel."""
    rows = (tables.read(inputs["sample_data"]).filter(pl.col("channel") == channel)
            .join(tables.read(inputs["ego_pose"]).select(pl.col("token").alias("ego_pose_token"), *tables.POSE),
                  on="ego_pose_token")
            .join(tables.read(inputs["calibrated_sensor"]).select(pl.col("token").alias("calibrated_sensor_token"),
                                                                  *tables.POSE),
                  on="calibrated_sensor_token", suffix="_sensor").sort("stamp_us", "filename"))
    turn_s = float(np.median(np.diff(rows["stamp_us"]))) / 1e6 if len(rows) > 1 else 0.0
    return [Sweep(stamp_us=row["stamp_us"], sample_token=row["sample_token"] if row["is_key_frame"] else "",
                  offset=row["offset"], num_bytes=row["bytes"], turn_s=turn_s, T_map_ego=_transform(row, ""),
                  T_ego_sensor=_transform(row, "_sensor")) for row in rows.iter_rows(named=True)]


def _transform(row: Mapping[str, float], suffix: str) -> np.ndarray:
    numbers = np.array([row[name + suffix] for name in tables.POSE])
    return geometry.transform(numbers[:3], numbers[3:])


def _picture(sweep: Sweep, boxes: pl.DataFrame, pack_path: Path) -> bytes:
    rows = boxes.filter(pl.col("sample_token") == sweep.sample_token)
    T_ego_map = geometry.invert(sweep.T_map_ego)
    array = rows.select("x_m", "y_m", "z_m", "length_m", "width_m", "height_m", "yaw_rad").to_numpy().copy()
    array[:, :3] = geometry.apply(T_ego_map, array[:, :3])
    array[:, 6] += np.arctan2(T_ego_map[1, 0], T_ego_map[0, 0])
    return draw.jpeg(draw.from_above(sweep.xyz_ego(pack_path), [draw.Layer(array, draw.ORANGE)], RANGE_SHOWN_M))
