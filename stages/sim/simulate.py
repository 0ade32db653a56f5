"""Drives that never happened, on disk: for each a rosbag2 folder, its full truth, and labels for a part of it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import cv2
import numpy as np
import yaml

from stages.lib import openlabel
from stages.lib.errors import ConfigError
from stages.sim import camera, lidar, recorder, sensors, truth
from stages.sim.recorder import Event
from stages.sim.sensors import Spec
from stages.sim.street import Ground, paint_ground
from stages.sim.world import World, make_world

VERSION = 1     # of what is simulated: raise it when the same settings give other bytes
BEFORE_US, AFTER_US = 100_000, 250_000      # how much longer than the sensors the vehicle reports
LIDAR_PHASE_US = 20_000


def simulate(out: Path, num_drives: int, duration_s: float, seed: int, workers: int, *, spec: Spec = Spec(),  # noqa: B008
             progress: Callable[[str, int, int], None] = lambda name, done, total: None) -> list[Path]:
    """Bags `out`/drive_0000 …, beside each `<bag>.truth.json` and, where somebody labelled, `<bag>.labels.json`.

    A drive depends on its number, duration, seed and spec alone, so that more drives can be added later; a drive that
    is there is kept. progress(name, done, total) is called after each. Returns the folders of all drives.
    Raises ConfigError where `out` holds a drive of other settings, or for settings that make none.
    """
    if num_drives < 1 or duration_s < 1 or workers < 1:
        raise ConfigError(f"cannot simulate {num_drives} drives of {duration_s:g} s with {workers} workers: "
                          "all must be at least 1; set --drives, --seconds or --workers")
    settings = {"version": VERSION, "seed": seed, "duration_s": float(duration_s), **asdict(spec)}
    notes = {out / f"drive_{number:04d}": json.dumps({**settings, "number": number}, sort_keys=True)
             for number in range(num_drives)}
    missing = [folder for folder, note in notes.items() if not _is_there(folder, note)]
    out.mkdir(parents=True, exist_ok=True)
    done = num_drives - len(missing)
    make = partial(_drive, duration_s=duration_s, seed=seed, spec=spec)
    for folder in _each(make, {folder: notes[folder] for folder in missing}, workers):
        done += 1
        progress(folder.name, done, num_drives)
    return list(notes)


def _is_there(folder: Path, note: str) -> bool:
    if not folder.exists():
        return False
    try:
        metadata = yaml.safe_load((folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
        found = metadata["custom_data"]["simulation"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        found = "something else"
    if found != note:
        raise ConfigError(f"{folder} holds {found},\n  wanted {note}:\n  name another folder, or `rm -r {folder}`")
    return True


def _each(make: Callable[[Path, str], Path], jobs: dict[Path, str], workers: int) -> Iterator[Path]:
    if workers == 1 or len(jobs) < 2:
        for folder, note in jobs.items():
            yield make(folder, note)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), initializer=_die_with_parent) as pool:
        for future in as_completed([pool.submit(make, folder, note) for folder, note in jobs.items()]):
            yield future.result()


def _die_with_parent() -> None:
    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _drive(folder: Path, note: str, duration_s: float, seed: int, spec: Spec) -> Path:
    """One drive, complete or not at all: made in a .part folder, its bag moved in place last."""
    number = json.loads(note)["number"]
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    threads = cv2.getNumThreads()
    world = make_world(seed, number, duration_s)
    seen_s = np.full((len(world.actors) + 1, 2), np.nan)
    cv2.setNumThreads(1)        # one picture is too small to share
    try:
        recorder.write(part / folder.name, _events(world, (seed, number), duration_s, spec, seen_s), note)
    finally:
        cv2.setNumThreads(threads)
    openlabel.write(truth.truth(world, duration_s), part / f"{folder.name}.truth.json")
    labels = truth.human(world, (seed, number), duration_s, seen_s)
    if labels:
        openlabel.write(labels, part / f"{folder.name}.labels.json")
    for path in sorted(part.iterdir(), key=lambda path: path.is_dir()):
        path.replace(folder.with_name(path.name))
    part.rmdir()
    return folder


def _events(world: World, dice: tuple[int, int], duration_s: float, spec: Spec, seen_s: np.ndarray) -> Iterator[Event]:
    """Everything that the vehicle sends; seen_s is filled in as the lidar's messages are made.

    dice: seed and drive number, which all chance in the drive comes from
    """
    rng = np.random.default_rng([*dice, 5])
    start_us, end_us = world.start_us, int(duration_s * 1_000_000)

    def schedule(hz: float, phase_us: int, jitter_us: float, from_us: int, to_us: int) -> list[int]:
        """Stamps after the start, about every 1/hz: real sensors are never quite on time."""
        regular = np.arange(from_us + phase_us, to_us, round(1_000_000 / hz))
        late = np.clip(rng.normal(0, jitter_us, len(regular)), -2.5 * jitter_us, 2.5 * jitter_us)
        return (regular + np.round(late)).astype(int).tolist()

    def received(offset_us: int, low_ms: float, high_ms: float) -> int:
        return (start_us + offset_us) * 1000 + int(rng.uniform(low_ms, high_ms) * 1e6)

    yield from _tf(start_us - BEFORE_US)
    for at in schedule(sensors.LIDAR_HZ, LIDAR_PHASE_US, 150, 0, end_us):
        make = partial(_cloud, world, spec, at, [*dice, 6, at], seen_s)
        yield Event(received(at + sensors.LIDAR_TURN_US, 8, 20), "/sensing/lidar/top/points", make)
    ground = paint_ground(world.street, dice[0])
    for channel, mount in sensors.CAMERAS.items():
        topic, frame = f"/sensing/camera/{channel.lower()}", sensors.camera_frame(channel)
        for at in schedule(sensors.CAMERA_HZ, mount.phase_us, 1500, 0, end_us):
            receive_ns = received(at, 25, 45)
            yield Event(receive_ns, f"{topic}/image_raw/compressed", partial(_image, world, ground, channel, spec, at))
            size_px = (spec.width_px, spec.height_px)
            yield Event(receive_ns + 200_000, f"{topic}/camera_info", partial(
                recorder.camera_info, start_us + at, frame, size_px, mount.K(spec), mount.distortion))
    for at in schedule(sensors.ODOMETRY_HZ, 0, 200, -BEFORE_US, end_us + AFTER_US):
        _, speed, yaw_rate = _motion(world, at)
        pose = world.ego.pose(at * 1e-6)
        yield Event(received(at, 2, 6), "/localization/kinematic_state",
                    partial(recorder.odometry, start_us + at, pose, speed, yaw_rate))
    for at in schedule(sensors.VELOCITY_HZ, 7_000, 400, -BEFORE_US, end_us + AFTER_US):
        _, speed, yaw_rate = _motion(world, at)
        speed, yaw_rate = speed + rng.normal(0, 0.01), yaw_rate + rng.normal(0, 0.001)
        yield Event(received(at, 1, 4), "/vehicle/status/velocity_status",
                    partial(recorder.velocity, start_us + at, speed, yaw_rate))
    for at in schedule(sensors.STEERING_HZ, 13_000, 400, -BEFORE_US, end_us + AFTER_US):
        tire_angle = np.arctan(sensors.WHEELBASE_M * _motion(world, at)[0])
        yield Event(received(at, 1, 4), "/vehicle/status/steering_status",
                    partial(recorder.steering, start_us + at, tire_angle + rng.normal(0, 0.0005)))


def _tf(stamp_us: int) -> Iterator[Event]:
    """/tf_static in two messages: the kit on the car, and the sensors on the kit."""
    kit = {(sensors.BASE_FRAME, sensors.KIT_FRAME): sensors.T_BASE_KIT}
    on_kit = {(sensors.KIT_FRAME, sensors.camera_frame(channel)): mount.T_kit_cam
              for channel, mount in sensors.CAMERAS.items()}
    on_kit[sensors.KIT_FRAME, sensors.LIDAR_FRAME] = sensors.T_KIT_LIDAR
    for delay_ns, transforms in ((3_000_000, kit), (4_000_000, on_kit)):
        yield Event(stamp_us * 1000 + delay_ns, "/tf_static", partial(recorder.tf, stamp_us, transforms))


def _motion(world: World, at_us: int) -> tuple[float, float, float]:
    """The ego's curvature [1/m], speed [m/s] and yaw rate [rad/s]."""
    s_m, speed = world.ego.trip.at(at_us * 1e-6)
    curvature = world.ego.path.curvature(s_m)
    return float(curvature), float(speed), float(curvature * speed)


def _cloud(world: World, spec: Spec, at_us: int, seed: list[int], seen_s: np.ndarray) -> object:
    turn = lidar.sweep(world, spec, at_us * 1e-6, np.random.default_rng(seed))
    points = np.bincount(turn.owner[turn.owner >= 0], minlength=len(seen_s))
    seen = points >= truth.LABEL_MIN_POINTS
    seen_s[seen, 0] = np.fmin(seen_s[seen, 0], at_us * 1e-6)
    seen_s[seen, 1] = np.fmax(seen_s[seen, 1], at_us * 1e-6)
    return recorder.cloud(world.start_us + at_us, sensors.LIDAR_FRAME, turn)


def _image(world: World, ground: Ground, channel: str, spec: Spec, at_us: int) -> object:
    picture = camera.expose(world, ground, channel, spec, at_us * 1e-6)
    return recorder.image(world.start_us + at_us, sensors.camera_frame(channel), camera.jpeg(picture))
