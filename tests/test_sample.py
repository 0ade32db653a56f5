"""The sample stage on a small drive written here, where every number can be worked out by hand.

The car drives 5 m/s along a slight left curve for 2 s. LIDAR_TOP turns at 10 Hz and sees one pole; CAM_FRONT (10 Hz,
distorted) sees a landmark ahead, CAM_BACK (5 Hz, no distortion) one behind. Each sensor has a clock of its own.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
import yaml
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from stages import ingest, sample
from stages.lib import bag, calibration, cameras, geometry, images, knobs, pack, tables
from stages.lib.calibration import CameraModel, Sensor
from stages.lib.errors import ConfigError, DataError
from stages.lib.stage import Blob, Item, Out, Result, Upstream

CONF = yaml.safe_load((Path(__file__).parents[1] / "conf/sample/default.yaml").read_text())
T0 = 1_700_000_000_000_000
END = T0 + 2_000_000
STORE = get_typestore(Stores.ROS2_HUMBLE)
OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
K = np.array([[110.0, 0, 79], [0, 110, 47], [0, 0, 1]])
D = np.array([-0.25, 0.06, 0.001, -0.001, 0.0])
POLE, AHEAD, BEHIND = np.array([8.0, 4.0, 0.5]), np.array([20.0, 10.0, 3.5]), np.array([-12.0, 3.0, 0.5])
CLOCKS_US = {"LIDAR_TOP": 7_000_000, "CAM_FRONT": -64_000_123, "CAM_BACK": 0}


def pose(at_us):
    """T_map_ego: 5 m/s, 0.2 rad/s, from the origin along x."""
    t = (at_us - T0) * 1e-6
    yaw = 0.2 * t
    return geometry.transform([25 * np.sin(yaw), 25 * (1 - np.cos(yaw)), 0], geometry.yaw_wxyz(yaw))


def sensors():
    back = geometry.transform([-0.5, 0, 1.6], geometry.yaw_wxyz(np.pi)) @ OPTICAL
    front = geometry.transform([1.5, 0.1, 1.6], geometry.yaw_wxyz(0.05)) @ OPTICAL
    lidar = geometry.transform([1.0, 0.0, 2.0], geometry.yaw_wxyz(-np.pi / 2))
    lens = {channel: CameraModel("plumb_bob", 160, 96, K, coefficients)
            for channel, coefficients in (("CAM_FRONT", D), ("CAM_BACK", 0 * D))}
    mounts = {"LIDAR_TOP": lidar, "CAM_FRONT": front, "CAM_BACK": back}
    return {channel: Sensor(channel, "camera" if channel in lens else "lidar", f"/{channel.lower()}", channel, T,
                            lens.get(channel), CLOCKS_US[channel], True) for channel, T in mounts.items()}


def header(channel, at_us):
    sec, us = divmod(at_us - CLOCKS_US[channel], 1_000_000)
    time = STORE.types["builtin_interfaces/msg/Time"](sec, us * 1000 + 777)
    return STORE.types["std_msgs/msg/Header"](time, channel)


def picture(channel, at_us, landmark, suffix=".jpg"):
    """What the camera sees: a blurred dot where the landmark is."""
    sensor = sensors()[channel]
    T_cam_map = geometry.invert(pose(at_us) @ sensor.T_ego_sensor)
    (x, y), = cameras.project(geometry.apply(T_cam_map, landmark[None]), K, sensor.camera.D)[0]
    v, u = np.mgrid[:96, :160]
    grey = (220 * np.exp(-((u - x) ** 2 + (v - y) ** 2) / 18) + 10).astype(np.uint8)
    data = cv2.imencode(suffix, np.dstack([grey] * 3))[1].reshape(-1)
    return STORE.types["sensor_msgs/msg/CompressedImage"](header(channel, at_us), suffix[1:], data)


def turn(begin_us, stamp_us):
    """What the lidar sees of the pole: 8 points at 8 times of its turn, one of them lost."""
    after_us = np.array([500, 12_000, 27_500, 40_000, 55_000, 70_000, 85_000, 99_500])
    still = np.array([geometry.apply(geometry.invert(pose(begin_us + dt) @ sensors()["LIDAR_TOP"].T_ego_sensor),
                                     POLE[None] + np.array([0, 0, 0.1 * n]))[0] for n, dt in enumerate(after_us)])
    still[5] = np.nan
    rows = np.zeros(8, np.dtype([("xyz", "<f4", 3), ("intensity", "u1"), ("ring", "<u2"), ("t", "<u4")]))
    rows["xyz"], rows["intensity"], rows["ring"] = still, 50, np.arange(8)
    rows["t"] = 1000 * (begin_us + after_us - stamp_us).clip(0)
    field = STORE.types["sensor_msgs/msg/PointField"]
    fields = [field("x", 0, 7, 1), field("y", 4, 7, 1), field("z", 8, 7, 1), field("intensity", 12, 2, 1),
              field("ring", 13, 4, 1), field("t", 15, 6, 1)]
    return STORE.types["sensor_msgs/msg/PointCloud2"](
        header("LIDAR_TOP", stamp_us), 1, 8, fields, False, rows.itemsize, rows.nbytes,
        np.frombuffer(rows.tobytes(), np.uint8), False)


def messages():
    """(channel, true stamp [us], receive time [ns], message), in the order in which they arrive."""
    rows = [("LIDAR_TOP", T0 + 70_000 + 100_000 * k, turn(T0 + 20_000 + 100_000 * k, T0 + 20_000 + 100_000 * k), 90_000)
            for k in range(20)]
    rows += [("CAM_FRONT", T0 + 30_000 + 100_000 * k, picture("CAM_FRONT", T0 + 30_000 + 100_000 * k, AHEAD), 15_000)
             for k in range(20)]
    rows += [("CAM_BACK", T0 + 90_000 + 200_000 * k, picture("CAM_BACK", T0 + 90_000 + 200_000 * k, BEHIND), 25_000)
             for k in range(10)]
    arrived = [(channel, at_us, 1000 * (at_us + late_us) + 321, message) for channel, at_us, message, late_us in rows]
    return sorted(arrived, key=lambda row: row[2])


def write(folder, rows, rig=None, poses_us=None):
    """The recording of these messages and what ingest makes of it: (item, inputs)."""
    folder.mkdir()
    rig = rig or sensors()
    with Writer(folder / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        topics = {}
        for channel, _, receive_ns, message in rows:
            if channel not in topics:
                topics[channel] = writer.add_connection(f"/{channel.lower()}", message.__msgtype__, typestore=STORE)
            writer.write(topics[channel], receive_ns, STORE.serialize_cdr(message, message.__msgtype__))
    seen, index = {}, []
    for channel, at_us, receive_ns, _ in rows:
        seq = seen[channel, receive_ns] = seen.get((channel, receive_ns), -1) + 1
        index.append((channel, at_us, receive_ns, seq, 0, receive_ns))
    tables.write(pl.DataFrame(index, tables.INDEX, orient="row"), folder / "index")
    stamps = np.arange(T0, END + 1, 20_000) if poses_us is None else poses_us
    numbers = np.array([np.hstack(geometry.split(pose(at))) for at in stamps])
    speed = np.tile([5, 0, 0.2], (len(stamps), 1))
    columns = np.hstack([stamps[:, None], numbers, speed]).T
    tables.write(tables.frame(dict(zip(tables.TRAJECTORY, columns)), tables.TRAJECTORY), folder / "trajectory")
    tables.write(tables.frame({"stamp_us": [T0 - 1, T0, END - 1, END], "signal": ["speed_mps"] * 4, "value": [5.0] * 4},
                              tables.SIGNALS), folder / "signals")
    calibration.write(rig, folder / "calibration")
    item = Item("area-drive-1", {"scene_token": "5" * 32, "scene_name": "area-drive-1", "drive_token": "d" * 32,
                                 "drive_name": "area/drive", "start_us": T0, "end_us": END, "pose_gaps_us": []}, {})
    return item, {"recording": folder / "bag", **{name: folder / name for name in (
        "index", "trajectory", "signals", "calibration")}}


def settings(**changed):
    return knobs.load(sample.Knobs, CONF | changed, "sample")


class Sampled:
    """A scene that was sampled, read back through nothing but its files."""

    def __init__(self, out, facts):
        self.out, self.facts = out, facts
        self.sample, self.data, self.pose, self.sensor = (
            tables.read(out / f"{name}.parquet") for name in ("sample", "sample_data", "ego_pose", "calibrated_sensor"))

    def rows(self, channel):
        poses = self.pose.rename({"token": "ego_pose_token", "stamp_us": "pose_us"})
        mounts = self.sensor.select(pl.col("token").alias("calibrated_sensor_token"), *tables.POSE, "camera_intrinsic")
        return self.data.filter(pl.col("channel") == channel).join(poses, on="ego_pose_token").join(
            mounts, on="calibrated_sensor_token", suffix="_sensor").sort("stamp_us").to_dicts()

    def content(self, row):
        return pack.read_member(self.out / "pack.tar", row["offset"], row["bytes"])

    @staticmethod
    def T_map_sensor(row):
        at, mount = ([row[name + suffix] for name in tables.POSE] for suffix in ("", "_sensor"))
        return geometry.transform(at[:3], at[3:]) @ geometry.transform(mount[:3], mount[3:])


def run(folder, written, **changed):
    folder.mkdir()
    item, inputs = written
    return Sampled(folder, sample.run(settings(**changed), item, inputs, folder))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("drive") / "in", messages())


@pytest.fixture(scope="module")
def sampled(written, tmp_path_factory):
    return run(tmp_path_factory.mktemp("sampled") / "out", written)


# geometry ---------------------------------------------------------------------------------------------------------

def errors_m(scene):
    """How far each saved point lies from where the pole is, in the map frame."""
    errors = []
    for row in scene.rows("LIDAR_TOP"):
        points = pack.read_points(scene.content(row))
        xyz = geometry.apply(scene.T_map_sensor(row), points[:, :3].astype(float))
        errors.append(np.linalg.norm(xyz - (POLE + np.outer(points[:, 4], [0, 0, 0.1])), axis=1))
    return np.concatenate(errors)


def errors_px(scene, channel, landmark):
    """How far the landmark's dot in each saved image lies from where the tables put it."""
    errors = []
    for row in scene.rows(channel):
        intrinsic = np.reshape(row["camera_intrinsic"], (3, 3))
        xyz_cam = geometry.apply(geometry.invert(scene.T_map_sensor(row)), landmark[None])
        (expected,), _ = cameras.project(xyz_cam, intrinsic)
        grey = images.decode(scene.content(row))[..., 0].astype(float)
        weight = np.where(grey > 60, grey - 10, 0)
        v, u = np.mgrid[:grey.shape[0], :grey.shape[1]]
        errors.append(np.hypot((weight * u).sum() / weight.sum() - expected[0],
                               (weight * v).sum() / weight.sum() - expected[1]))
    return np.array(errors)


def test_a_pole_lies_in_every_sweep_within_two_millimetres_of_its_place(sampled):
    assert len(sampled.rows("LIDAR_TOP")) == 18
    assert errors_m(sampled).max() < 0.002


def test_without_compensation_it_lies_up_to_a_quarter_metre_off(written, tmp_path):
    assert 0.2 < errors_m(run(tmp_path / "out", written, motion_compensate=False)).max() < 0.3


@pytest.mark.parametrize("stamp_after_us", [0, 50_000, 100_000], ids=["begin", "middle", "end"])
def test_points_are_right_whatever_moment_of_the_turn_the_stamp_is(stamp_after_us, tmp_path):
    """Relative point times count from the stamp, so before it they are negative: float32 seconds here."""
    rows = []
    for channel, at_us, receive_ns, message in messages():
        if channel == "LIDAR_TOP":
            message.header = header("LIDAR_TOP", at_us - 50_000 + stamp_after_us)
            layout = np.dtype([("rest", "V15"), ("t", "<u4")])
            cloud = np.frombuffer(message.data, layout).copy().astype([("rest", "V15"), ("t", "<f4")])
            cloud["t"] = np.frombuffer(message.data, layout)["t"] * 1e-9 - stamp_after_us * 1e-6
            message.data = np.frombuffer(cloud.tobytes(), np.uint8)
            message.fields[-1] = STORE.types["sensor_msgs/msg/PointField"]("time", 15, 7, 1)
        rows.append((channel, at_us, receive_ns, message))
    assert errors_m(run(tmp_path / "out", write(tmp_path / "in", rows))).max() < 0.002


@pytest.mark.parametrize(("channel", "landmark"), [("CAM_FRONT", AHEAD), ("CAM_BACK", BEHIND)])
def test_a_landmark_is_seen_within_a_sixth_of_a_pixel_of_where_the_tables_put_it(sampled, channel, landmark):
    assert errors_px(sampled, channel, landmark).max() < 0.16


def test_resized_images_have_it_in_the_right_place_too(written, tmp_path):
    scene = run(tmp_path / "out", written, image_width_px=80)
    assert scene.data.filter(pl.col("channel") == "CAM_FRONT")["width_px"].unique().to_list() == [80]
    assert images.decode(scene.content(scene.rows("CAM_BACK")[0])).shape == (48, 80, 3)
    assert errors_px(scene, "CAM_FRONT", AHEAD).max() < 0.2
    assert errors_px(scene, "CAM_BACK", BEHIND).max() < 0.2


@pytest.mark.parametrize("wrong", ["stamp", "frame", "lens", "pose", "clock"])
def test_the_geometric_errors_tell_when_something_is_wrong(wrong, tmp_path):
    rig, rows = sensors(), messages()
    if wrong == "stamp":
        rows = [(channel, at_us + 40_000, receive_ns, message) for channel, at_us, receive_ns, message in rows]
    if wrong == "frame":
        rig = {c: dataclasses.replace(s, T_ego_sensor=geometry.transform([0.2, 0, 0], [1, 0, 0, 0]) @ s.T_ego_sensor)
               for c, s in rig.items()}
    if wrong == "lens":
        rig["CAM_FRONT"] = dataclasses.replace(rig["CAM_FRONT"], camera=CameraModel("plumb_bob", 160, 96, K, D * 1.5))
    if wrong == "clock":
        rig["LIDAR_TOP"] = dataclasses.replace(rig["LIDAR_TOP"], clock_offset_us=CLOCKS_US["LIDAR_TOP"] + 10_000)
    item, inputs = write(tmp_path / "in", rows, rig)
    if wrong == "pose":
        table = tables.read(inputs["trajectory"])
        tables.write(table.with_columns(pl.col("y_m") + 0.2), inputs["trajectory"])
    scene = run(tmp_path / "out", (item, inputs))
    assert max(errors_m(scene).max() / 0.02, errors_px(scene, "CAM_FRONT", AHEAD).max()) > 0.5


# key frames and sweeps --------------------------------------------------------------------------------------------

def test_key_frames_are_half_a_second_apart_from_the_first_lidar_frame_with_poses_all_around(sampled):
    """Turn 0 begins before a pose is known 110 ms before its middle; turn 19 ends too late."""
    assert (sampled.sample["stamp_us"] - T0).to_list() == [170_000, 670_000, 1_170_000, 1_670_000]
    assert sampled.facts["num_no_pose"] == 2


def test_each_sample_has_the_nearest_frame_of_every_channel_once(sampled):
    keys = sampled.data.filter("is_key_frame")
    assert keys.group_by("sample_token", "channel").len()["len"].to_list() == [1] * 12
    stamps = {c: (keys.filter(pl.col("channel") == c).sort("stamp_us")["stamp_us"] - T0).to_list() for c in sensors()}
    assert stamps["LIDAR_TOP"] == (sampled.sample["stamp_us"] - T0).to_list()
    assert stamps["CAM_FRONT"] == [130_000, 630_000, 1_130_000, 1_630_000]
    assert stamps["CAM_BACK"] == [90_000, 690_000, 1_090_000, 1_690_000]


def test_key_frames_and_sweeps_are_one_chain_per_channel(sampled):
    for channel, num in (("LIDAR_TOP", 18), ("CAM_FRONT", 20), ("CAM_BACK", 10)):
        rows = sampled.rows(channel)
        assert len(rows) == num
        tokens = [row["token"] for row in rows]
        assert [row["prev"] for row in rows] == ["", *tokens[:-1]]
        assert [row["next"] for row in rows] == [*tokens[1:], ""]
        assert len({row["is_key_frame"] for row in rows}) == 2
    tokens = sampled.sample["token"].to_list()
    assert sampled.sample["prev"].to_list() == ["", *tokens[:-1]]
    assert sampled.sample["next"].to_list() == [*tokens[1:], ""]


def test_a_sweeps_sample_is_the_one_that_follows_and_the_last_one_at_the_end(sampled):
    stamp = dict(sampled.sample.select("token", "stamp_us").iter_rows())
    last = max(stamp.values())
    for row in sampled.data.filter(~pl.col("is_key_frame")).iter_rows(named=True):
        following = min((at for at in stamp.values() if at >= row["stamp_us"]), default=last)
        assert stamp[row["sample_token"]] == following


def test_each_frame_has_a_pose_of_its_own_at_its_own_stamp(sampled):
    assert sampled.pose["token"].n_unique() == len(sampled.data) == len(sampled.pose)
    for row in sampled.rows("CAM_FRONT"):
        assert row["pose_us"] == row["stamp_us"]
        numbers = [row[name] for name in tables.POSE]
        np.testing.assert_allclose(geometry.transform(numbers[:3], numbers[3:]), pose(row["stamp_us"]), atol=1e-4)


@pytest.mark.parametrize(("camera_hz", "lidar_hz", "expected"), [
    (0, 0, (4, 4, 4)), (None, 0, (20, 10, 4)), (0, None, (4, 4, 18)), (4, 5, (8, 8, 11))])
def test_sweeps_are_kept_at_the_rate_asked_for(written, tmp_path, camera_hz, lidar_hz, expected):
    """At 5 Hz, lidar frames 170, 370, 570, … ms stay, and the key frames at 670 and 1670 ms between them."""
    scene = run(tmp_path / "out", written, camera_sweep_hz=camera_hz, lidar_sweep_hz=lidar_hz)
    counts = dict(scene.data.group_by("channel").len().iter_rows())
    assert (counts["CAM_FRONT"], counts["CAM_BACK"], counts["LIDAR_TOP"]) == expected
    assert len(scene.data.filter("is_key_frame")) == 12


def test_key_frames_may_be_as_frequent_as_the_slowest_required_channel(written, tmp_path):
    assert len(run(tmp_path / "out", written, keyframe_hz=5.0).sample) == 9


def test_a_rig_without_lidar_has_its_key_frames_on_the_front_camera(tmp_path):
    rig = {channel: sensor for channel, sensor in sensors().items() if channel != "LIDAR_TOP"}
    scene = run(tmp_path / "out", write(tmp_path / "in", [row for row in messages() if row[0] in rig], rig))
    assert scene.facts["reference_channel"] == "CAM_FRONT"
    assert scene.sample["stamp_us"].to_list() == [T0 + 30_000 + 500_000 * k for k in range(4)]
    assert not (scene.out / "preview.jpg").exists()


def test_signals_and_trajectory_are_those_of_the_scene(sampled):
    assert tables.read(sampled.out / "signals.parquet")["stamp_us"].to_list() == [T0, END - 1]
    assert len(tables.read(sampled.out / "trajectory.parquet")) == 100


# files ------------------------------------------------------------------------------------------------------------

def test_a_jpeg_that_nothing_changes_is_copied_byte_by_byte(sampled):
    recorded = {at_us: message.data.tobytes() for channel, at_us, _, message in messages() if channel == "CAM_BACK"}
    assert {row["stamp_us"]: sampled.content(row) for row in sampled.rows("CAM_BACK")} == recorded


def test_without_undistortion_jpegs_are_copied_and_the_table_says_the_distortion(written, tmp_path):
    scene = run(tmp_path / "out", written, undistort=False)
    recorded = {at_us: message.data.tobytes() for channel, at_us, _, message in messages() if channel == "CAM_FRONT"}
    assert {row["stamp_us"]: scene.content(row) for row in scene.rows("CAM_FRONT")} == recorded
    kept = dict(scene.sensor.select("channel", "camera_distortion").iter_rows())
    assert kept == {"CAM_FRONT": D.tolist(), "CAM_BACK": [], "LIDAR_TOP": []}


def test_undistorted_images_have_no_distortion_left_in_the_table(sampled):
    rows = {row["channel"]: row for row in sampled.sensor.to_dicts()}
    assert rows["CAM_FRONT"]["camera_distortion"] == []
    assert rows["CAM_FRONT"]["camera_intrinsic"] == K.flatten().tolist()
    assert rows["LIDAR_TOP"]["camera_intrinsic"] == []
    assert rows["LIDAR_TOP"]["modality"] == "lidar"


def test_png_becomes_jpeg(tmp_path):
    rows = [(channel, at_us, ns, picture(channel, at_us, BEHIND, ".png") if channel == "CAM_BACK" else message)
            for channel, at_us, ns, message in messages()]
    scene = run(tmp_path / "out", write(tmp_path / "in", rows))
    assert all(scene.content(row).startswith(images.JPEG) for row in scene.rows("CAM_BACK"))
    assert errors_px(scene, "CAM_BACK", BEHIND).max() < 0.1


def test_the_pack_holds_every_frame_under_its_nuscenes_name(sampled, tmp_path):
    names = pack.extract(sampled.out / "pack.tar", tmp_path)
    assert sorted(names) == sorted(sampled.data["filename"])
    assert f"samples/LIDAR_TOP/area-drive__LIDAR_TOP__{T0 + 170_000}.pcd.bin" in names
    assert f"sweeps/CAM_BACK/area-drive__CAM_BACK__{T0 + 290_000}.jpg" in names
    for row in sampled.data.iter_rows(named=True):
        assert (tmp_path / row["filename"]).read_bytes() == sampled.content(row)
        assert row["filename"].startswith("samples/") == row["is_key_frame"]
        assert row["fileformat"] == ("pcd" if row["channel"] == "LIDAR_TOP" else "jpg")
    digest = hashlib.sha256((sampled.out / "pack.tar").read_bytes()).hexdigest()
    assert set(sampled.data["pack_digest"]) == {digest} == {sampled.facts["pack_digest"]}


def test_points_are_rows_of_five_without_nan_in_the_messages_order(sampled):
    points = pack.read_points(sampled.content(sampled.rows("LIDAR_TOP")[3]))
    np.testing.assert_array_equal(points[:, 4], [0, 1, 2, 3, 4, 6, 7])
    np.testing.assert_array_equal(points[:, 3], 50)
    assert sampled.facts["num_invalid_points"] == 18


def test_twice_gives_equal_bytes(written, sampled, tmp_path):
    again = run(tmp_path / "out", written)
    assert json.dumps(again.facts, sort_keys=True) == json.dumps(sampled.facts, sort_keys=True)
    files = sorted(path.name for path in again.out.iterdir())
    assert files == sorted(path.name for path in sampled.out.iterdir())
    assert len(files) == 8
    for name in files:
        assert (again.out / name).read_bytes() == (sampled.out / name).read_bytes(), name


# faults -----------------------------------------------------------------------------------------------------------

def without(channel, *numbers):
    rows = messages()
    lost = [row for row in rows if row[0] == channel]
    lost = [id(lost[number]) for number in numbers]
    return [row for row in rows if id(row) not in lost]


def test_a_key_frame_moves_to_the_next_lidar_frame_where_a_camera_has_lost_one(tmp_path):
    """CAM_FRONT lacks 630 and 730 ms: 670 is 60 ms from none; 570 has 530, 770 has 830, and 570 comes first."""
    scene = run(tmp_path / "out", write(tmp_path / "in", without("CAM_FRONT", 6, 7)))
    assert (scene.sample["stamp_us"] - T0).to_list() == [170_000, 570_000, 1_170_000, 1_670_000]
    assert scene.facts["num_lost_key_frames"] == 0


def test_a_key_frame_is_lost_and_counted_where_a_required_channel_is_silent(tmp_path):
    scene = run(tmp_path / "out", write(tmp_path / "in", without("CAM_FRONT", *range(3, 11))))
    assert (scene.sample["stamp_us"] - T0).to_list() == [170_000, 1_170_000, 1_670_000]
    assert scene.facts["num_lost_key_frames"] == 1
    assert scene.facts["missing"]["CAM_FRONT"] == 1


def test_a_channel_that_is_not_required_may_lack_a_frame(tmp_path):
    rig = sensors()
    rig["CAM_FRONT"] = dataclasses.replace(rig["CAM_FRONT"], required=False)
    scene = run(tmp_path / "out", write(tmp_path / "in", without("CAM_FRONT", *range(3, 11)), rig))
    assert len(scene.sample) == 4
    assert len(scene.data.filter(pl.col("is_key_frame") & (pl.col("channel") == "CAM_FRONT"))) == 3


def test_messages_received_at_the_same_nanosecond_are_told_apart(tmp_path):
    rows = messages()
    back = [row for row in rows if row[0] == "CAM_BACK"]
    rows = [(*row[:2], back[3][2], row[3]) if row[0] == "CAM_BACK" and row[1] == back[2][1] else row for row in rows]
    scene = run(tmp_path / "out", write(tmp_path / "in", sorted(rows, key=lambda row: (row[2], row[1]))))
    assert len(scene.rows("CAM_BACK")) == 10
    assert errors_px(scene, "CAM_BACK", BEHIND).max() < 0.1


def test_no_pose_is_interpolated_over_a_silence_of_the_trajectory(tmp_path):
    stamps = np.arange(T0, END + 1, 20_000)
    stamps = stamps[(stamps < T0 + 600_000) | (stamps > T0 + 1_200_000)]
    item, inputs = write(tmp_path / "in", messages(), poses_us=stamps)
    item = dataclasses.replace(item, params={**item.params, "pose_gaps_us": [[T0 + 580_000, T0 + 1_220_000]]})
    scene = run(tmp_path / "out", (item, inputs))
    off = (scene.data["stamp_us"] - T0).to_numpy()
    assert not ((off > 580_000) & (off < 1_220_000)).any()
    lidar, front, back = 2 + 8, 6, 4  # a turn of 100 ms is compensated where poses are known 110 ms before and after
    assert scene.facts["num_no_pose"] == lidar + front + back
    assert errors_m(scene).max() < 0.002


def test_clouds_without_ring_and_time_are_counted_and_not_moved(tmp_path):
    rows = messages()
    for channel, _, _, message in rows:
        if channel == "LIDAR_TOP":
            message.fields = message.fields[:4]
    scene = run(tmp_path / "out", write(tmp_path / "in", rows))
    assert [scene.facts[f"num_clouds_without_{what}"] for what in ("intensity", "ring", "time")] == [0, 18, 18]
    assert (pack.read_points(scene.content(scene.rows("LIDAR_TOP")[0]))[:, 4] == 0).all()


def test_too_few_key_frames_say_which_channel_lacks_what(tmp_path):
    written = write(tmp_path / "in", without("CAM_FRONT", *range(20 - 17), *range(5, 20)))
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", written)
    assert str(caught.value) == (
        "area-drive-1: 1 key frames, sample.min_key_frames wants 2\n"
        "  LIDAR_TOP has 18 frames with an ego pose, 4 have none of CAM_FRONT near\n"
        "  say `required: false` of a channel in the rig, or go on without such scenes: sample.max_failed_ratio")


def test_an_image_that_cannot_be_decoded_is_named_with_topic_and_stamp(tmp_path):
    rows = messages()
    _, at_us, _, message = next(row for row in rows if row[0] == "CAM_BACK" and row[1] > T0 + 500_000)
    message.data = message.data[:200]
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", write(tmp_path / "in", rows))
    assert str(caught.value) == (
        f"area/drive: /cam_back at {at_us} us: a damaged or cut-off JPEG of 200 bytes\n"
        "  leave CAM_BACK out of the rig, or go on without such scenes: sample.max_failed_ratio")


def test_a_copied_image_of_another_size_than_its_calibration_is_named(tmp_path):
    rows = messages()
    for channel, at_us, _, message in rows:
        if channel == "CAM_BACK" and at_us > T0 + 500_000:
            message.data = cv2.imencode(".jpg", np.zeros((90, 150, 3), np.uint8))[1].reshape(-1)
    with pytest.raises(DataError, match=r"/cam_back at \d+ us: the image is 150x90, its CameraInfo is for 160x96"):
        run(tmp_path / "out", write(tmp_path / "in", rows))


def test_a_jpeg_with_padding_behind_its_end_is_copied_with_it(tmp_path):
    """Some drivers pad; where the end mark is not at the end, decoding tells whether the file is whole."""
    rows = messages()
    for channel, _, _, message in rows:
        if channel == "CAM_BACK":
            message.data = np.append(message.data, np.zeros(5, np.uint8))
    scene = run(tmp_path / "out", write(tmp_path / "in", rows))
    assert scene.content(scene.rows("CAM_BACK")[0]).endswith(b"\xff\xd9" + bytes(5))
    assert errors_px(scene, "CAM_BACK", BEHIND).max() < 0.16


def test_point_times_that_no_turn_has_are_an_error_and_never_guessed(tmp_path):
    rig = sensors()
    rig["LIDAR_TOP"] = dataclasses.replace(rig["LIDAR_TOP"], clock_offset_us=0)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", write(tmp_path / "in", messages(), rig))
    lines = str(caught.value).splitlines()
    assert lines[0] == (f"area/drive: /lidar_top at {T0 + 170_000} us: its points say they were measured -7049.500 to "
                        "-6950.500 ms after the stamp, a turn takes 100.0 ms")
    assert "set sample.motion_compensate=false" in lines[1]


def test_a_topic_of_another_type_is_named(tmp_path):
    rig = sensors()
    rig["LIDAR_TOP"] = dataclasses.replace(rig["LIDAR_TOP"], topic="/cam_back")
    with pytest.raises(DataError, match="/cam_back is sensor_msgs/msg/CompressedImage, expected sensor_msgs"):
        run(tmp_path / "out", write(tmp_path / "in", messages(), rig))


def test_a_camera_without_intrinsics_is_named(tmp_path):
    rig = sensors()
    rig["CAM_BACK"] = dataclasses.replace(rig["CAM_BACK"], camera=None)
    with pytest.raises(DataError, match="CAM_BACK: /cam_back has no CameraInfo"):
        run(tmp_path / "out", write(tmp_path / "in", messages(), rig))
    rig["CAM_BACK"] = dataclasses.replace(rig["CAM_BACK"], camera=CameraModel("mirror", 160, 96, K, D))
    with pytest.raises(DataError, match="CAM_BACK: distortion model 'mirror' is not one of"):
        run(tmp_path / "out2", write(tmp_path / "in2", messages(), rig))


def test_an_index_that_is_not_the_recordings_is_found_out(written, tmp_path):
    item, inputs = written
    other = tables.read(inputs["index"]).with_columns(
        receive_ns=pl.when(pl.col("stamp_us") == T0 + 490_000).then(pl.col("receive_ns") + 1).otherwise("receive_ns"))
    tables.write(other, tmp_path / "index")
    with pytest.raises(DataError, match="area/drive: 1 messages that its index lists are not in the recording"):
        run(tmp_path / "out", (item, {**inputs, "index": tmp_path / "index"}))


# plan and collect -------------------------------------------------------------------------------------------------

def upstreams(tmp_path, channels=("LIDAR_TOP", "CAM_FRONT"), rate_hz=10.0):
    for name in ("ingest", "split"):
        (tmp_path / name).mkdir()
    drives = {"drive_token": ["d" * 32], "drive_name": ["area/drive"], "recording_digest": ["r" * 64], "rig": ["car"],
              "vehicle": ["car"], "location": ["here"], "georeferenced": [True], "start_us": [T0], "end_us": [END]}
    tables.write(tables.frame(drives, tables.DRIVES), tmp_path / "ingest/drives.parquet")
    rows = [{"drive_token": "d" * 32, "channel": channel, "rate_hz": rate_hz} for channel in channels]
    tables.write(tables.frame(rows, tables.CHANNELS), tmp_path / "ingest/channels.parquet")
    silences = [("d" * 32, "ego_pose", start_us, start_us + 200_000) for start_us in (T0 + 9, T0 - 3_000_000)]
    others = [("d" * 32, "CAM_FRONT", T0, END), ("e" * 32, "ego_pose", T0, END)]
    tables.write(pl.DataFrame([*silences, *others], tables.GAPS, orient="row"), tmp_path / "ingest/gaps.parquet")
    scenes = [{"scene_token": token * 32, "scene_name": f"area-drive-{token}", "drive_token": "d" * 32, "group": 0,
               "drive_name": "area/drive", "start_us": T0, "end_us": END, "split": "train"} for token in "12"]
    tables.write(tables.frame(scenes, tables.SPLIT), tmp_path / "split/scenes.parquet")
    files = ("calibration.json", "trajectory.parquet", "index.parquet", "signals.parquet", "motion.parquet")
    result = Result("area/drive", {}, {file: Blob(file[0] * 64, 1) for file in files}, Path)
    return {"ingest": Upstream(tmp_path / "ingest", (result,)), "split": Upstream(tmp_path / "split")}


def test_a_scene_depends_on_its_drives_files_and_silences_and_not_on_its_split(tmp_path):
    first, second = sample.plan(settings(), upstreams(tmp_path))
    assert (first.name, second.name) == ("area-drive-1", "area-drive-2")
    assert first.inputs == {"recording": "r" * 64, "calibration": "c" * 64, "trajectory": "t" * 64, "index": "i" * 64,
                            "signals": "s" * 64}
    assert first.params == {"scene_token": "1" * 32, "scene_name": "area-drive-1", "drive_token": "d" * 32,
                            "drive_name": "area/drive", "start_us": T0, "end_us": END,
                            "pose_gaps_us": [[T0 + 9, T0 + 200_009]]}


def test_key_frames_faster_than_the_reference_channel_are_a_config_error(tmp_path):
    with pytest.raises(ConfigError) as caught:
        sample.plan(settings(keyframe_hz=20.0), upstreams(tmp_path, rate_hz=9.97))
    assert str(caught.value) == ("sample.keyframe_hz is 20, but LIDAR_TOP of area/drive has only 9.97 frames a second\n"
                                 "  set sample.keyframe_hz to at most that, or key frames on another channel: "
                                 "sample.reference_channel")


def test_ten_hertz_may_be_asked_of_a_lidar_measured_at_a_little_less(tmp_path):
    assert len(sample.plan(settings(keyframe_hz=10.0), upstreams(tmp_path, rate_hz=9.97))) == 2


def test_key_frames_faster_than_a_channel_they_need_are_a_config_error(written, tmp_path):
    with pytest.raises(ConfigError, match="keyframe_hz is 10, but CAM_BACK of area/drive has only 5 frames a second"):
        run(tmp_path / "out", written, keyframe_hz=10.0)


def test_a_drive_without_reference_channel_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError) as caught:
        sample.plan(settings(reference_channel="LIDAR_TOPP", fallback_channel=None), upstreams(tmp_path))
    assert str(caught.value) == (
        "sample.reference_channel: area/drive has no LIDAR_TOPP, did you mean LIDAR_TOP?; it has CAM_FRONT, LIDAR_TOP\n"
        "  set sample.reference_channel to one of them")


def test_collect_lists_every_scene_with_its_counts_and_shows_some(sampled, tmp_path):
    out = Out(tmp_path / "data", tmp_path / "results")
    for folder in (out.data, out.results):
        folder.mkdir()
    outputs = {path.name: Blob("0" * 64, 1) for path in sampled.out.iterdir()}
    results = [Result(f"scene-{number}", sampled.facts, outputs, sampled.out.joinpath) for number in range(6)]
    summary = sample.collect(settings(num_pictures=2), results, out)
    scenes = tables.read(out.data / "scenes.parquet")
    assert scenes["scene_name"].to_list() == [f"scene-{number}" for number in range(6)]
    assert scenes.select("num_samples", "num_no_pose", "bytes").row(0) == (4, 2, sampled.facts["bytes"])
    assert (summary.num_in, summary.num_out, summary.dropped) == (6, 24, {"frames without a pose": 12})
    page = (out.results / "report.html").read_text()
    assert page.count("<img") == 2
    assert "scene-3" in page


# a real recording -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def radiate(real_data, tmp_path_factory):
    """Fog in Edinburgh: PNG cameras at 15 Hz, 18-byte points without times at 10 Hz, no localization."""
    folder, recording = tmp_path_factory.mktemp("radiate"), real_data / "drives/radiate_fog6"
    rig = yaml.safe_load((Path(__file__).parents[1] / "conf/rig/radiate.yaml").read_text())["radiate"]
    params = {"drive_name": "fog6", "drive_token": "d" * 32, "recording_digest": "r" * 64, "rig_name": "radiate",
              "rig": rig}
    for name in ("ingest", "out"):
        (folder / name).mkdir()
    facts = ingest.run(ingest.Knobs({}, 0.0), Item("fog6", params, {}), {"recording": recording}, folder / "ingest")
    scene = {"scene_token": "5" * 32, "scene_name": "fog6-1", "drive_token": "d" * 32, "drive_name": "fog6",
             "start_us": facts["drive"]["start_us"], "end_us": facts["drive"]["end_us"], "pose_gaps_us": []}
    inputs = {"recording": recording, "calibration": folder / "ingest/calibration.json",
              **{name: folder / f"ingest/{name}.parquet" for name in ("trajectory", "index", "signals")}}
    return recording, Sampled(folder / "out", sample.run(settings(), Item("fog6-1", scene, {}), inputs, folder / "out"))


def test_a_real_drive_gives_two_key_frames_a_second(radiate):
    _, scene = radiate
    steps_ms = (scene.sample["stamp_us"].diff().drop_nulls() / 1000).to_list()
    assert len(scene.sample) >= 6
    assert all(440 < step < 560 for step in steps_ms)
    assert scene.facts["num_lost_key_frames"] == 0
    assert (scene.out / "preview.jpg").exists()


def test_real_points_are_the_messages_own_as_they_know_no_time(radiate):
    recording, scene = radiate
    rows = scene.rows("LIDAR_TOP")
    assert scene.facts["num_clouds_without_time"] == len(rows)
    with bag.open_bag(recording) as opened:
        clouds = [opened.decode(message) for message in opened.messages(["/sensing/lidar/points"])]
    layout = np.dtype([("xyzi", "<f4", 4), ("ring", "<u2")])
    recorded = {tuple(points["xyzi"][0]): points for points in (np.frombuffer(cloud.data, layout) for cloud in clouds)}
    for row in rows:
        saved = pack.read_points(scene.content(row))
        points = recorded[tuple(saved[0, :4])]
        np.testing.assert_array_equal(saved[:, :4], points["xyzi"])
        np.testing.assert_array_equal(saved[:, 4], points["ring"])


def test_real_images_are_undistorted_jpegs_of_the_cameras_size(radiate):
    _, scene = radiate
    for channel in ("CAM_FRONT", "CAM_FRONT_RIGHT"):
        row = scene.rows(channel)[0]
        content = scene.content(row)
        assert content.startswith(images.JPEG)
        assert images.decode(content).shape == (376, 672, 3) == (row["height_px"], row["width_px"], 3)
    assert all(left == [] for left in scene.sensor["camera_distortion"].to_list())
