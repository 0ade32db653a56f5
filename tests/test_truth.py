"""What is exported lies where the simulator put it: bollards in cameras in px, vehicles and ground in the lidar in m.

A car passes a bend at 12 m/s between rows of bollards whose colour nothing else has. Each mistake of `MISTAKES`, made
on purpose, must push an error over its bound. `pytest tests/test_truth.py -s -k lies` prints the errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from scipy.spatial.transform import Rotation

from stages import ingest, sample
from stages.lib import calibration, cameras, digests, fragment, frames, geometry, knobs, openlabel, recordings, tables
from stages.lib.stage import Blob, Out, Result, Upstream
from stages.sim import sensors, shapes, simulate
from stages.sim.sensors import Spec
from stages.sim.world import CONE, CONE_LWH_M, KNOT_S, Actor, World, make_world
from tests import oracle
from tests.measured import Errors, measure
from tests.oracle import Frame

CONF = Path(__file__).parents[1] / "conf"
DRIVE, BEGIN_S, LONG_S = 8, 7.6, 2.5
SPEC = Spec(width_px=480, height_px=270)


@pytest.fixture(scope="module")
def drive(tmp_path_factory) -> Path:
    """The bag, its truth beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "make_world", lambda seed, number, duration_s: proving_ground(seed, duration_s))
        return simulate.simulate(tmp_path_factory.mktemp("drives"), 1, LONG_S, 0, workers=1, spec=SPEC)[0]


def proving_ground(seed: int, duration_s: float) -> World:
    """A drive from its bend on, with bollards on both pavements and in the middle."""
    world = make_world(seed, DRIVE, BEGIN_S + duration_s + 1)
    s_m = np.arange(120, 280, 6.0)
    poses = np.concatenate([world.street.middle.beside(left_m).pose(s_m + left_m / 4)
                            for left_m in (-7.9, 0, 7.9)])
    actors = (*world.actors, *(Actor(CONE, CONE_LWH_M, shapes.cone(CONE_LWH_M), pose) for pose in poses))
    begin = round(BEGIN_S / KNOT_S)
    return replace(world, start_us=world.start_us + round(BEGIN_S * 1e6), actors=actors,
                   ego=replace(world.ego, trip=world.ego.trip.later(-BEGIN_S)),
                   solids=shapes.columns([*(actor.parts for actor in actors), world.street.scenery]),
                   resting=np.concatenate([world.resting[:-1], poses, np.zeros((1, 3))]),
                   moving=world.moving[:, begin:], presence=world.presence[:, begin:])


def export(bag: Path, rig: dict, folder: Path, **changed) -> list[Frame]:
    """The frames of ingest and sample with this rig and changed knobs of sample."""
    places = {name: folder / name for name in ("recordings", "ingest", "split", "results", "run", "pack")}
    for place in places.values():
        place.mkdir()
    recordings.write_listing([recordings.Recording(bag.name, 0, "0" * 64, "sim")], places["recordings"] / "a.jsonl")
    settings = ingest.Knobs(rig={"sim": rig}, max_failed_ratio=0)
    item, = ingest.plan(settings, {"recordings": Upstream(places["recordings"])})
    facts = ingest.run(settings, item, {"recording": bag}, places["run"])
    made = {digests.digest_file(path): path for path in sorted(places["run"].iterdir())}
    result = Result(item.name, facts, {path.name: Blob(digest, 0) for digest, path in made.items()},
                    lambda name: places["run"] / name)
    ingest.collect(settings, [result], Out(places["ingest"], places["results"]))
    span = {name: facts["drive"][name] for name in ("drive_token", "drive_name", "start_us", "end_us")}
    tables.write(tables.frame([{**span, "scene_token": "scene", "scene_name": "scene", "split": "train", "group": 0}],
                              tables.SPLIT), places["split"] / "scenes.parquet")
    conf = yaml.safe_load((CONF / "sample/default.yaml").read_text())
    settings = knobs.load(sample.Knobs, {**conf, **changed}, "sample")
    item, = sample.plan(settings, {"ingest": Upstream(places["ingest"], (result,)), "split": Upstream(places["split"])})
    inputs = {role: made.get(digest, bag) for role, digest in item.inputs.items()}
    sample.run(settings, item, inputs, places["pack"])
    return oracle.frames(places["pack"], lambda digest: places["pack"] / "pack.tar")


def late_camera(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    rig["channels"]["CAM_FRONT_LEFT"]["clock_offset_us"] = 50_000
    return {}


def late_lidar(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    rig["channels"]["LIDAR_TOP"]["clock_offset_us"] = sensors.LIDAR_TURN_US // 2
    return {}


def late_ego_pose(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    rig["ego_pose"]["clock_offset_us"] = 50_000
    return {}


def turned_mount(channel: str, axis: str, patch: pytest.MonkeyPatch, rig: dict) -> dict:
    """The mount turned by half a degree about an axis of the vehicle, in place."""
    T = sensors.T_base_sensor(channel)
    turned = Rotation.from_euler(axis, 0.5, degrees=True) * Rotation.from_matrix(T[:3, :3])
    rig["mounts"][channel] = {"translation_m": T[:3, 3].tolist(), "rotation_wxyz": geometry.wxyz(turned).tolist()}
    return {}


def inverted_chain(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    """Each transform of /tf_static taken for its inverse."""
    add = frames.Frames.add
    patch.setattr(frames.Frames, "add", lambda self, parent, child, T: add(self, parent, child, geometry.invert(T)))
    return {}


def chain_without_kit(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    """Sensors mounted on the car where they are on the kit."""
    add = frames.Frames.add
    patch.setattr(frames.Frames, "add", lambda self, parent, child, T: add(
        self, parent, child, np.eye(4) if child == sensors.KIT_FRAME else T))
    return {}


def ignored_lens(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    """Images kept as they are and said to be without distortion."""
    read = calibration.read

    def without_lens(path: Path) -> dict[str, calibration.Sensor]:
        found = read(path)
        for channel in sensors.CAMERAS:
            found[channel] = replace(found[channel], camera=replace(found[channel].camera, D=np.zeros(5)))
        return found

    patch.setattr(calibration, "read", without_lens)
    return {}


def pose_of_the_key_frame(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    """One ego pose for all frames of a sample, as at its lidar's stamp."""
    ego_poses = fragment.ego_poses

    def at_key_frame(data: pl.DataFrame, poses: object) -> pl.DataFrame:
        key = data.filter(pl.col("channel") == "LIDAR_TOP", "is_key_frame").select("sample_token", at_us="stamp_us")
        at_us = data.join(key, on="sample_token", how="left", maintain_order="left")["at_us"]
        return ego_poses(data.with_columns(stamp_us=at_us), poses)

    patch.setattr(fragment, "ego_poses", at_key_frame)
    return {}


def nearest_pose(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    """The odometry message nearest to a stamp instead of the pose between two of them."""
    def nearest(stamps_us: np.ndarray, xyz_m: np.ndarray, wxyz: np.ndarray, at_us: np.ndarray) -> tuple:
        row = np.abs(np.asarray(at_us)[:, None] - stamps_us).argmin(1)
        return xyz_m[row], wxyz[row]

    patch.setattr(geometry, "interpolate_poses", nearest)
    return {}


def stale_intrinsics(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    """Images scaled down, K not."""
    patch.setattr(cameras, "scaled", lambda K, scale_x, scale_y: K)
    return {"image_width_px": SPEC.width_px // 2}


def no_motion_compensation(patch: pytest.MonkeyPatch, rig: dict) -> dict:
    return {"motion_compensate": False}


ALL_CAMERAS = set(sensors.CAMERAS)
MISTAKES: dict[str, tuple[Callable, set[str]]] = {
    "late_camera": (late_camera, {"CAM_FRONT_LEFT"}),
    "late_lidar": (late_lidar, {"LIDAR_TOP"}),
    "late_ego_pose": (late_ego_pose, ALL_CAMERAS | {"LIDAR_TOP"}),
    "camera_turned_about_z": (partial(turned_mount, "CAM_BACK", "z"), {"CAM_BACK"}),
    "camera_turned_about_y": (partial(turned_mount, "CAM_BACK_LEFT", "y"), {"CAM_BACK_LEFT"}),
    "lidar_turned_about_z": (partial(turned_mount, "LIDAR_TOP", "z"), {"LIDAR_TOP"}),
    "lidar_turned_about_y": (partial(turned_mount, "LIDAR_TOP", "y"), {"LIDAR_TOP"}),
    "inverted_chain": (inverted_chain, ALL_CAMERAS | {"LIDAR_TOP"}),
    "chain_without_kit": (chain_without_kit, ALL_CAMERAS | {"LIDAR_TOP"}),
    "ignored_lens": (ignored_lens, ALL_CAMERAS),
    "pose_of_the_key_frame": (pose_of_the_key_frame, ALL_CAMERAS | {"LIDAR_TOP"}),
    "nearest_pose": (nearest_pose, {"CAM_FRONT", "LIDAR_TOP"}),
    "stale_intrinsics": (stale_intrinsics, ALL_CAMERAS),
    "no_motion_compensation": (no_motion_compensation, {"LIDAR_TOP"}),
}


@pytest.fixture(scope="module")
def truth(drive) -> pl.DataFrame:
    """The boxes that the simulator wrote beside the bag."""
    return openlabel.read(drive.with_name(f"{drive.name}.truth.json")).boxes


@pytest.fixture
def rig() -> dict:
    return yaml.safe_load((CONF / "rig/sim.yaml").read_text())["sim"]


@pytest.fixture
def errors(drive, truth, rig, tmp_path) -> Callable[..., Errors]:
    """Errors of the export with this rig and changed knobs of sample."""
    return lambda **changed: measure(export(drive, rig, tmp_path, **changed), truth)


@pytest.mark.parametrize("changed", [{}, {"undistort": False}, {"image_width_px": 360}], ids=str)
def test_exported_objects_lie_where_the_simulator_put_them(errors, changed):
    found = errors(**changed)
    print(f"\n{changed}: {found}")
    assert found.wrong() == {}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_stamp_frame_lens_or_pose_is_out_of_bounds(errors, rig, monkeypatch, name):
    make, channels = MISTAKES[name]
    wrong = errors(**make(monkeypatch, rig)).wrong()
    print(f"\n{name}: {wrong}")
    assert wrong.keys() >= channels
    assert len(channels) > 1 or wrong.keys() == channels
