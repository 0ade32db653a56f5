"""A tiny world that was scanned, split, sampled and labelled: what merge reads, made without those stages.

Two drives go along +x at 5 m/s. drive_a has two scenes, drive_b one, of 2 s each with key frames twice a second: lidar
at 10 Hz, one camera at 5 Hz. A car drives beside at 3 m/s, a little askew, and a pedestrian stands; every lidar sweep
has 5 points in the car, 3 in the pedestrian. Labels stand at 10 Hz, 30 ms after the lidar's stamps. The truth knows
both for all drives, people reviewed the first scene of drive_a, and the labeller calls the car a truck in the scenes'
second samples, misses the pedestrian, and sees a ghost.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import yaml

from stages import merge
from stages.lib import knobs, openlabel, pack, tables
from stages.lib.stage import Blob, Out, Result, Summary, Upstream

REPO = Path(__file__).parent.parent
START_US = 1_700_000_000_000_000
SCENE_US = 2_000_000
LABEL_OFFSET_US = 30_000
EGO_MPS, CAR_MPS = 5.0, 3.0
CAR_YAW_RAD = 0.1
CAR_LWH_M, PEDESTRIAN_LWH_M = (4.0, 2.0, 1.5), (0.6, 0.6, 1.8)
CAR, PEDESTRIAN, GHOST = "1", "2", "3"
MOUNTS = {"LIDAR_TOP": ((0.0, 0.0, 1.8), (1.0, 0.0, 0.0, 0.0)),
          "CAM_FRONT": ((1.5, 0.0, 1.5), (0.5, -0.5, 0.5, -0.5))}
PERIODS_US = {"LIDAR_TOP": 100_000, "CAM_FRONT": 200_000}
CAMERA_LAG_US = 7_000
WIDTH_PX, HEIGHT_PX = 16, 12
INTRINSIC = [10.0, 0.0, 8.0, 0.0, 10.0, 6.0, 0.0, 0.0, 1.0]


@dataclass(frozen=True)
class World:
    """What merge reads, and the packs."""

    inputs: dict[str, Upstream]
    packs: Mapping[str, Path]

    def open_pack(self, digest: str) -> Path:
        return self.packs[digest]


def build(root: Path, splits: tuple[str, str, str] = ("train", "train", "val"), *, georeferenced: bool = True) -> World:
    """The world under `root`; splits of drive_a's first and second scene and of drive_b's."""
    names = ["drive_a", "drive_a", "drive_b"]
    starts = [START_US, START_US + SCENE_US, START_US + 60_000_000]
    scenes = [{"drive_name": name, "drive_token": tables.token("drive", name), "start_us": start,
               "end_us": start + SCENE_US, "scene_name": f"{name}-{start}", "split": split, "group": 0,
               "scene_token": tables.token("scene", tables.token("drive", name), start, start + SCENE_US)}
              for name, start, split in zip(names, starts, splits)]
    sampled = [_sample(root / "store" / "sample" / scene["scene_name"], scene) for scene in scenes]
    labelled = [_autolabel(root / "store" / "autolabel" / scene["scene_name"], scene) for scene in scenes]
    _ingest(root / "ingest", georeferenced)
    for folder, rule in (("curate", "min_speed"), ("split", "place_of_other_split")):
        tables.write(pl.DataFrame(scenes).select(*tables.SPLIT), root / folder / "scenes.parquet")
        dropped = pl.DataFrame(scenes[:1]).select(*tables.SCENES).with_columns(rule=pl.lit(rule))
        tables.write(dropped, root / folder / "dropped.parquet")
    policy = {"by": "place" if georeferenced else "drive", "cell_m": 50.0, "num_drives_by_place": 2,
              "num_drives_by_drive_alone": 0}
    (root / "split" / "policy.json").write_text(json.dumps(policy))
    _labels(root / "labels")
    folders = {name: Upstream(root / name) for name in ("ingest", "curate", "split", "labels")}
    packs = {result.outputs["pack.tar"].digest: result.path("pack.tar") for result in sampled}
    for stage, results in (("sample", sampled), ("autolabel", labelled)):
        (root / stage).mkdir()
        rows = [{"name": r.name, "outputs": {k: b.digest for k, b in r.outputs.items()}} for r in results]
        (root / stage / "manifest.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        folders[stage] = Upstream(root / stage, tuple(results))
    return World(folders, packs)


def merge_knobs(**changes: object) -> merge.Knobs:
    """The knobs of conf/merge/default.yaml with these changes."""
    values = yaml.safe_load((REPO / "conf" / "merge" / "default.yaml").read_text())
    return knobs.load(merge.Knobs, values | changes, "merge")


def run_merge(world: World, root: Path, **changes: object) -> tuple[Out, Summary]:
    """merge's outputs under `root`, and what it says."""
    out = Out(root / "data", root / "results")
    out.data.mkdir(parents=True)
    out.results.mkdir(parents=True)
    return out, merge.run(merge_knobs(**changes), world.inputs, out)


def drive_start_us(drive_name: str) -> int:
    return START_US + (60_000_000 if drive_name == "drive_b" else 0)


def car_xyz(drive_name: str, stamp_us: int) -> tuple[float, float, float]:
    """The car's centre in the map [m]."""
    return 10.0 + CAR_MPS * (stamp_us - drive_start_us(drive_name)) / 1e6, 4.0, 0.75


def pedestrian_xyz() -> tuple[float, float, float]:
    return 8.0, -3.0, 0.9


def ego_x(drive_name: str, stamp_us: int) -> float:
    return EGO_MPS * (stamp_us - drive_start_us(drive_name)) / 1e6


def result(name: str, folder: Path, facts: dict) -> Result:
    """The result of an action that left `folder`."""
    files = {path.name: Blob(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
             for path in sorted(folder.iterdir())}
    return Result(name, facts, files, functools.partial(_in, folder))


def _in(folder: Path, name: str) -> Path:
    return folder / name


def _ingest(folder: Path, georeferenced: bool) -> None:
    drives = [{"drive_token": tables.token("drive", name), "drive_name": name, "recording_digest": name, "rig": "tiny",
               "vehicle": "tiny-car", "location": "tiny-town", "georeferenced": georeferenced,
               "start_us": drive_start_us(name), "end_us": drive_start_us(name) + 2 * SCENE_US}
              for name in ("drive_a", "drive_b")]
    tables.write(tables.frame(drives, tables.DRIVES), folder / "drives.parquet")


def _labels(folder: Path) -> None:
    for kind, name, length_us in (("truth", "drive_a", 2 * SCENE_US), ("truth", "drive_b", 2 * SCENE_US),
                                  ("human", "drive_a", SCENE_US)):
        start = drive_start_us(name)
        stamps = range(start - 100_000 + LABEL_OFFSET_US, start + length_us + 100_000, 100_000)
        rows = [label(name, stamp, what) for stamp in stamps for what in (CAR, PEDESTRIAN)]
        labels = openlabel.Labels(tables.frame(rows, openlabel.BOXES), ((start, start + length_us),))
        (folder / kind).mkdir(parents=True, exist_ok=True)
        openlabel.write(labels, folder / kind / f"{name}.json")


def label(drive_name: str, stamp_us: int, what: str) -> dict:
    """A row of openlabel.BOXES."""
    xyz, size, category, speed = {
        CAR: (car_xyz(drive_name, stamp_us), CAR_LWH_M, "vehicle.car", CAR_MPS),
        PEDESTRIAN: (pedestrian_xyz(), PEDESTRIAN_LWH_M, "human.pedestrian.adult", 0.0)}[what]
    return {"stamp_us": stamp_us, "object_id": what, "category": category, **dict(zip(("x_m", "y_m", "z_m"), xyz)),
            **dict(zip(("length_m", "width_m", "height_m"), size)), "yaw_rad": CAR_YAW_RAD if what == CAR else 0.0,
            "vx_mps": speed, "vy_mps": 0.0}


def _points(drive_name: str, stamp_us: int) -> np.ndarray:
    """(N, 5) in the sensor frame: 5 points in the car, 3 in the pedestrian, 4 on the ground around."""
    steps = np.array([-1.5, -0.75, 0.0, 0.75, 1.5])
    car = np.array(car_xyz(drive_name, stamp_us)) + np.column_stack([steps, 0 * steps, 0 * steps])
    person = np.array(pedestrian_xyz()) + np.array([[0, 0, -0.5], [0, 0, 0], [0, 0, 0.5]])
    ground = np.array([[30.0, 20, 0], [30, -20, 0], [-5, 9, 0], [0, -9, 0]])
    xyz = np.concatenate([car, person, ground]) - [ego_x(drive_name, stamp_us), 0, MOUNTS["LIDAR_TOP"][0][2]]
    rest = np.column_stack([np.full(len(xyz), 7.0), np.arange(len(xyz)) % 4])
    return np.column_stack([xyz, rest]).astype(np.float32)


def _jpeg(stamp_us: int) -> bytes:
    return cv2.imencode(".jpg", np.full((HEIGHT_PX, WIDTH_PX, 3), stamp_us // 100_000 % 200, np.uint8))[1].tobytes()


def sample_stamps(scene: dict) -> list[int]:
    return list(range(scene["start_us"] + 100_000, scene["end_us"], 500_000))


def _sample(folder: Path, scene: dict) -> Result:
    folder.mkdir(parents=True)
    token, drive = scene["scene_token"], scene["drive_name"]
    stamps = sample_stamps(scene)
    samples = [tables.token("sample", token, stamp) for stamp in stamps]
    tables.write(tables.frame([
        {"token": sample, "stamp_us": stamp, "scene_token": token, "prev": before, "next": after}
        for sample, stamp, before, after in zip(samples, stamps, ["", *samples[:-1]], [*samples[1:], ""])],
        tables.SAMPLE), folder / "sample.parquet")
    rows, poses, sensors = [], [], []
    with pack.PackWriter(folder / "pack.tar") as writer:
        for channel, (translation, rotation) in MOUNTS.items():
            camera = channel.startswith("CAM")
            sensor = tables.token("calibrated_sensor", token, channel)
            sensors.append({"token": sensor, "scene_token": token, "channel": channel,
                            "modality": "camera" if camera else "lidar", **_pose(translation, rotation),
                            "camera_intrinsic": INTRINSIC if camera else [], "camera_distortion": []})
            lag = CAMERA_LAG_US if camera else 0
            frames = list(range(scene["start_us"] + 100_000 + lag, scene["end_us"], PERIODS_US[channel]))
            keys = {min(frames, key=lambda frame: abs(frame - stamp)): sample for stamp, sample in zip(stamps, samples)}
            tokens = [tables.token("sample_data", token, channel, frame) for frame in frames]
            for n, frame in enumerate(frames):
                pose = tables.token("ego_pose", token, channel, frame)
                poses.append({"token": pose, "stamp_us": frame, **_ego_pose(drive, frame)})
                kind, end = ("samples" if frame in keys else "sweeps"), ("jpg" if camera else "pcd.bin")
                name = f"{kind}/{channel}/{drive}__{channel}__{frame}.{end}"
                offset, size = writer.add(name, _jpeg(frame) if camera else pack.points_bytes(_points(drive, frame)))
                following = next((keys[later] for later in frames[n:] if later in keys), samples[-1])
                rows.append({
                    "token": tokens[n], "sample_token": following, "ego_pose_token": pose, "scene_token": token,
                    "calibrated_sensor_token": sensor, "channel": channel, "stamp_us": frame,
                    "is_key_frame": frame in keys, "fileformat": "jpg" if camera else "pcd", "filename": name,
                    "width_px": WIDTH_PX if camera else 0, "height_px": HEIGHT_PX if camera else 0,
                    "prev": tokens[n - 1] if n else "",
                    "next": tokens[n + 1] if n + 1 < len(tokens) else "", "offset": offset, "bytes": size})
    tables.write(tables.frame(rows, tables.SAMPLE_DATA).with_columns(pack_digest=pl.lit(writer.digest)),
                 folder / "sample_data.parquet")
    tables.write(tables.frame(poses, tables.EGO_POSE), folder / "ego_pose.parquet")
    tables.write(tables.frame(sensors, tables.CALIBRATED_SENSOR), folder / "calibrated_sensor.parquet")
    times = range(scene["start_us"], scene["end_us"], 20_000)
    tables.write(tables.frame([{"stamp_us": t, **_ego_pose(drive, t), "vx_mps": EGO_MPS, "vy_mps": 0.0,
                                "yaw_rate_radps": 0.0} for t in times], tables.TRAJECTORY),
                 folder / "trajectory.parquet")
    tables.write(tables.frame([{"stamp_us": t, "signal": signal, "value": value} for t in times for signal, value in
                               (("speed_mps", EGO_MPS), ("steering_tire_angle_rad", 0.1))], tables.SIGNALS),
                 folder / "signals.parquet")
    return result(scene["scene_name"], folder, {"scene_token": token})


def _pose(translation: tuple[float, ...], rotation: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(tables.POSE, (*translation, *rotation)))


def _ego_pose(drive_name: str, stamp_us: int) -> dict[str, float]:
    return _pose((ego_x(drive_name, stamp_us), 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))


def _autolabel(folder: Path, scene: dict) -> Result:
    folder.mkdir(parents=True)
    rows = []
    for n, stamp in enumerate(sample_stamps(scene)):
        x, y, z = car_xyz(scene["drive_name"], stamp)
        for what, place, category, num in ((CAR, (x + 0.3, y, z), "vehicle.truck" if n == 1 else "vehicle.car", 5),
                                           (GHOST, (20.0, -15.0, 1.0), "vehicle.car", 1)):
            rows.append({"sample_token": tables.token("sample", scene["scene_token"], stamp), "stamp_us": stamp,
                         "track_id": tables.token("track", scene["scene_token"], what), "category": category,
                         **dict(zip(("x_m", "y_m", "z_m"), place)),
                         **dict(zip(("length_m", "width_m", "height_m"), CAR_LWH_M)), "yaw_rad": 0.0,
                         "vx_mps": float("nan"), "vy_mps": float("nan"), "score": 0.5, "source": "geometric",
                         "num_lidar_pts": num})
    tables.write(tables.frame(rows, tables.BOXES), folder / "boxes.parquet")
    return result(scene["scene_name"], folder, {"scene_token": scene["scene_token"]})
