"""A drive of 4 s whose every number is known, and one recording's way through ingest.

The car drives 5 m/s along +x from (100, 200). Odometry comes at 20 Hz, CAM_FRONT at 5 Hz, LIDAR_TOP turns at 10 Hz and
says when a turn begins; mounts come in two /tf_static messages. All is received 10 ms after its stamp.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stages import ingest
from stages.lib import knobs, tables
from stages.lib.stage import Blob, Item, Out, Result
from tests import tinybags
from tests.tinybags import T0_US

CFG = knobs.load(ingest.Knobs, {"rig": {}, "max_failed_ratio": 0.0}, "ingest")
LATE_NS = 10_000_000
OPTICAL = (0.5, -0.5, 0.5, -0.5)  # x right, y down, z forward
CHANNEL = {"clock_offset_us": 0, "stamp": "middle", "duration_us": 0, "max_gap_us": 350_000, "required": True}
RIG: dict[str, Any] = {
    "vehicle": "car", "location": "town", "ego_frame": "base_link",
    "channels": {
        "CAM_FRONT": {**CHANNEL, "modality": "camera", "topic": "/cam", "info_topic": "/cam_info", "rate_hz": 5.0},
        "LIDAR_TOP": {**CHANNEL, "modality": "lidar", "topic": "/points", "info_topic": None, "rate_hz": 10.0,
                      "stamp": "begin", "duration_us": 100_000}},
    "ego_pose": {"source": "odometry", "topic": "/odom", "gnss_topic": None, "imu_topic": None, "origin_deg": None,
                 "clock_offset_us": 0, "georeferenced": False, "max_gap_us": 200_000},
    "signals": {"speed_mps": {"topic": "/odom", "field": "twist.twist.linear.x", "scale": 1.0, "clock_offset_us": 0},
                "charge_ratio": {"topic": "/charge", "field": "data", "scale": 0.01, "clock_offset_us": 0}},
    "mounts": {}}

Stream = dict[str, list[tuple[int, Any]]]
"""Topic -> (stamp [µs], message)."""


def stream() -> Stream:
    """What the car says, before anything goes wrong."""
    dice = np.random.default_rng(0)
    return {
        "/tf_static": [
            (T0_US, tinybags.tf([("mast", "lidar", (0, 0, 1), (1, 0, 0, 0)), ("mast", "cam", (1, 0, 0), OPTICAL)])),
            (T0_US + 1, tinybags.tf([("base_link", "mast", (0.5, 0, 1), (1, 0, 0, 0))]))],
        "/odom": [(at, tinybags.odometry(at, (100 + 5 * (at - T0_US) / 1e6, 200, 0), 0.0, speed_mps=5.0))
                  for at in range(T0_US, T0_US + 4_000_001, 50_000)],
        "/cam": [(at, tinybags.image(at, level=50 + 8 * k)) for k, at in
                 enumerate(range(T0_US + 300_000, T0_US + 3_500_001, 200_000))],
        "/cam_info": [(at, tinybags.camera_info(at)) for at in range(T0_US + 300_000, T0_US + 3_500_001, 200_000)],
        "/points": [(at, tinybags.cloud(at, dice.normal(0, 10, (20, 3))))
                    for at in range(T0_US + 100_000, T0_US + 3_800_001, 100_000)],
        "/charge": [(at, tinybags.number(80.0)) for at in range(T0_US, T0_US + 4_000_001, 1_000_000)]}


def record(path: Path, what: Stream, **options: Any) -> Path:
    events = [(topic, at * 1000 + LATE_NS, message) for topic, messages in what.items() for at, message in messages]
    return tinybags.write(path, sorted(events, key=lambda event: event[1]), **options)


def with_rig(**changes: Any) -> dict[str, Any]:
    """RIG with values at dotted paths, dots written as __."""
    changed = copy.deepcopy(RIG)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = changed
        for parent in parents:
            place = place[parent]
        place[last] = value
    return changed


class Ingested:
    """One drive through ingest: its facts and files."""

    def __init__(self, recording: Path, out: Path, rig_values: dict[str, Any] = RIG, rig_name: str = "tiny") -> None:
        out.mkdir(parents=True)
        self.out = out
        self.item = Item(recording.name, {
            "drive_name": recording.name, "drive_token": tables.token("drive", "0" * 64, recording.name),
            "recording_digest": "0" * 64, "rig_name": rig_name, "rig": rig_values}, {"recording": "0" * 64})
        self.facts = ingest.run(CFG, self.item, {"recording": recording}, out)

    @property
    def interval_us(self) -> tuple[int, int]:
        return self.facts["drive"]["start_us"], self.facts["drive"]["end_us"]

    def table(self, name: str) -> pl.DataFrame:
        return tables.read(self.out / f"{name}.parquet")

    def faults(self) -> dict[tuple[str, str], int]:
        return {(row["fault"], row["channel"]): row["count"] for row in self.facts["faults"]}

    def channel(self, name: str) -> dict[str, Any]:
        return next(row for row in self.facts["channels"] if row["channel"] == name)

    def result(self) -> Result:
        outputs = {path.name: Blob("0" * 64, path.stat().st_size) for path in self.out.iterdir()}
        return Result(self.item.name, json.loads(json.dumps(self.facts)), outputs, lambda name: self.out / name)


def collected(tmp_path: Path, *drives: Ingested) -> tuple[Out, Any]:
    out = Out(tmp_path / "data", tmp_path / "results")
    out.data.mkdir()
    out.results.mkdir()
    return out, ingest.collect(CFG, sorted((drive.result() for drive in drives), key=lambda r: r.name), out)
