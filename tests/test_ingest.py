"""ingest on the tiny drive, on what can go wrong with it, and on a drive of the simulator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from stages import ingest
from stages.lib import calibration, geometry, knobs, recordings, rig, tables
from stages.lib.bag import open_bag
from stages.lib.errors import ConfigError, DataError
from stages.lib.faults import FAULTS, POLICIES
from stages.lib.stage import Item, Upstream
from stages.sim import sensors as sim
from tests import tinybags, world
from tests.tinybags import T0_US
from tests.tinydrive import CFG, LATE_NS, RIG, Ingested, Stream, collected, record, stream, with_rig

CONF = Path(__file__).parents[1] / "conf" / "rig"


@pytest.fixture
def go(tmp_path) -> Callable[..., Ingested]:
    """Records a stream and ingests it."""
    def go_(what: Stream | None = None, rig_values: dict[str, Any] = RIG, name: str = "drive", **options: Any):
        return Ingested(record(tmp_path / name, what or stream(), **options), tmp_path / f"{name}.out", rig_values)
    return go_


# what comes out ---------------------------------------------------------------------------------------------------
def test_the_same_recording_gives_the_same_bytes(tmp_path):
    recording = record(tmp_path / "drive", stream())
    one, two = Ingested(recording, tmp_path / "one"), Ingested(recording, tmp_path / "two")
    names = sorted(path.name for path in one.out.iterdir())
    assert names == ["calibration.json", "index.parquet", "motion.parquet", "preview.jpg", "signals.parquet",
                     "trajectory.parquet"]
    assert json.dumps(one.facts) == json.dumps(two.facts)
    for name in names:
        assert (one.out / name).read_bytes() == (two.out / name).read_bytes(), name


def test_a_sound_drive_has_no_faults_and_every_message_in_its_index(go):
    drive = go()
    assert drive.faults() == {("unstamped", "signals"): 5}
    index = drive.table("index")
    assert dict(index.group_by("channel").len().iter_rows()) == {"CAM_FRONT": 17, "LIDAR_TOP": 38}
    assert index["stamp_us"].is_sorted()
    assert drive.channel("LIDAR_TOP") == {
        "channel": "LIDAR_TOP", "modality": "lidar", "topic": "/points", "rate_hz": 10.0, "num_messages": 38,
        "num_duplicate": 0, "num_backward": 0, "num_dropped": 0, "max_gap_us": 100_000}


def test_index_stamps_are_the_middle_of_exposure_or_turn_in_the_common_clock(go):
    drive = go(rig_values=with_rig(channels__CAM_FRONT__stamp="end", channels__CAM_FRONT__duration_us=20_000,
                                   channels__CAM_FRONT__clock_offset_us=7))
    index = drive.table("index")
    lidar = index.filter(pl.col("channel") == "LIDAR_TOP")
    camera = index.filter(pl.col("channel") == "CAM_FRONT")
    assert lidar["stamp_us"][0] == T0_US + 100_000 + 50_000
    assert camera["stamp_us"][0] == T0_US + 300_000 - 10_000 + 7
    assert lidar["receive_ns"][0] == (T0_US + 100_000) * 1000 + LATE_NS


def test_an_index_row_finds_its_message(go, tmp_path):
    drive = go()
    row = drive.table("index").filter(pl.col("channel") == "CAM_FRONT").row(3, named=True)
    with open_bag(tmp_path / "drive") as bag:
        message, = bag.messages(["/cam"], row["receive_ns"], row["receive_ns"] + 1)
        assert bag.sensor_us(message) == row["stamp_us"] == T0_US + 900_000
        assert len(message.data) == row["bytes"]


def test_mounts_are_chained_across_tf_static_messages(go):
    """base_link -> mast (0.5, 0, 1) in one message, mast -> lidar (0, 0, 1) in another."""
    drive = go()
    sensors = calibration.read(drive.out / "calibration.json")
    T_ego_lidar = geometry.transform(np.array([0.5, 0, 2]), np.array([1, 0, 0, 0]))
    assert sensors["LIDAR_TOP"].T_ego_sensor == pytest.approx(T_ego_lidar)
    ahead = geometry.apply(sensors["CAM_FRONT"].T_ego_sensor, np.array([[0.0, 0, 10]]))
    assert ahead == pytest.approx(np.array([[11.5, 0, 1]]))
    assert sensors["CAM_FRONT"].camera.K[0, 0] == 30.0
    assert sensors["CAM_FRONT"].frame_id == "cam"


def test_the_rigs_mounts_go_before_the_recordings(go):
    level = {"rotation_wxyz": [1.0, 0.0, 0.0, 0.0]}
    drive = go(rig_values=with_rig(mounts={"LIDAR_TOP": {"translation_m": [9.0, 0.0, 0.0], **level},
                                           "mast": {"translation_m": [0.0, 0.0, 5.0], **level}}))
    sensors = calibration.read(drive.out / "calibration.json")
    assert sensors["LIDAR_TOP"].T_ego_sensor[:3, 3] == pytest.approx([9, 0, 0])
    assert sensors["CAM_FRONT"].T_ego_sensor[:3, 3] == pytest.approx([1, 0, 5])


def test_trajectory_signals_and_motion_are_what_the_car_did(go):
    drive = go()
    at_2_s = drive.table("trajectory").filter(pl.col("stamp_us") == T0_US + 2_000_000).row(0, named=True)
    assert (at_2_s["x_m"], at_2_s["y_m"], at_2_s["vx_mps"], at_2_s["qw"]) == pytest.approx((110, 200, 5, 1))
    signals = drive.table("signals")
    assert signals.filter(pl.col("signal") == "charge_ratio")["value"].to_list() == pytest.approx([0.8] * 5)
    assert signals.filter(pl.col("signal") == "speed_mps")["value"].unique().to_list() == [5.0]
    motion = drive.table("motion")
    assert len(motion) == 41
    assert motion["x_m"].diff().drop_nulls().to_numpy() == pytest.approx(0.5)


def test_odometry_of_another_frame_becomes_the_ego_frames_pose(go):
    """The odometry is of the mast, which stands 0.5 m before base_link and 1 m above it."""
    what = stream()
    what["/odom"] = [(at, tinybags.odometry(at, (5 * (at - T0_US) / 1e6, 0, 1), 0.0, speed_mps=5.0, child="mast"))
                     for at, _ in what["/odom"]]
    row = go(what).table("trajectory").row(0, named=True)
    assert (row["x_m"], row["y_m"], row["z_m"], row["vx_mps"]) == pytest.approx((-0.5, 0, 0, 5))


def test_the_usable_interval_has_all_required_channels_and_the_pose_over_whole_turns(go):
    """The camera begins last, at 0.3 s, and ends first, at 3.5 s; its last frame is inside."""
    assert go().interval_us == (T0_US + 300_000, T0_US + 3_500_001)


def test_the_usable_interval_leaves_room_for_half_a_turn_at_the_poses_ends(go):
    what = stream()
    what["/odom"] = [(at, m) for at, m in what["/odom"] if T0_US + 1_000_000 <= at <= T0_US + 3_000_000]
    assert go(what).interval_us == (T0_US + 1_050_000, T0_US + 2_950_001)


def test_a_channel_that_is_not_required_does_not_shorten_the_interval(go):
    drive = go(rig_values=with_rig(channels__CAM_FRONT__required=False))
    assert drive.interval_us == (T0_US + 150_000, T0_US + 3_850_001)


# faults -----------------------------------------------------------------------------------------------------------
def test_twins_steps_back_and_missing_messages_are_counted_and_left_out(go):
    what = stream()
    points = what["/points"]
    points[5] = points[5][0], points[4][1]  # the stamp of the one before
    points[9] = points[9][0], tinybags.cloud(T0_US, np.ones((3, 3)))  # a stamp before all
    del points[20:24]
    drive = go(what)
    row = drive.channel("LIDAR_TOP")
    assert (row["num_messages"], row["num_duplicate"], row["num_backward"]) == (34, 1, 1)
    assert row["num_dropped"] == 6
    assert row["max_gap_us"] == 500_000
    assert {key: count for key, count in drive.faults().items() if key[1] == "LIDAR_TOP"} == {
        ("duplicate", "LIDAR_TOP"): 1, ("backward", "LIDAR_TOP"): 1, ("dropped", "LIDAR_TOP"): 6,
        ("silence", "LIDAR_TOP"): 1}
    gap_us = T0_US + 2_000_000 + 50_000
    assert drive.facts["gaps"] == [{"channel": "LIDAR_TOP", "start_us": gap_us, "end_us": gap_us + 500_000}]
    assert drive.table("index").filter(pl.col("channel") == "LIDAR_TOP")["stamp_us"].is_unique().all()


def test_a_silence_of_the_ego_pose_is_listed_and_has_no_motion(go):
    what = stream()
    what["/odom"] = [(at, m) for at, m in what["/odom"] if not T0_US + 1_000_000 < at < T0_US + 1_500_000]
    drive = go(what)
    assert drive.facts["gaps"] == [{"channel": "ego_pose", "start_us": T0_US + 1_000_000, "end_us": T0_US + 1_500_000}]
    assert drive.table("motion").filter(pl.col("stamp_us").is_between(
        T0_US + 1_000_000, T0_US + 1_500_000, closed="none")).is_empty()


def test_a_channel_without_stamps_falls_back_to_reception_and_says_so(go):
    what = stream()
    what["/points"] = [(at, tinybags.cloud(0, np.ones((3, 3)))) for at, _ in what["/points"]]
    drive = go(what)
    assert drive.faults()["unstamped", "LIDAR_TOP"] == 38
    first_us = drive.table("index").filter(pl.col("channel") == "LIDAR_TOP")["stamp_us"][0]
    assert first_us == T0_US + 100_000 + LATE_NS // 1000 + 50_000


def test_values_that_are_no_numbers_are_left_out_and_counted(go):
    what = stream()
    what["/charge"][2] = what["/charge"][2][0], tinybags.number(np.nan)
    at = what["/odom"][7][0]
    what["/odom"][7] = at, tinybags.odometry(at, (np.nan, 0, 0), 0.0)
    drive = go(what)
    assert drive.faults()["not_finite", "signals"] == 1
    assert drive.faults()["not_finite", "ego_pose"] == 1
    assert len(drive.table("trajectory")) == 80


def test_a_camera_info_that_changes_is_counted_and_the_first_one_holds(go):
    what = stream()
    for number in (4, 5):
        at = what["/cam_info"][number][0]
        what["/cam_info"][number] = at, tinybags.camera_info(at, fx=31.0)
    drive = go(what)
    assert drive.faults()["camera_info_changed", "CAM_FRONT"] == 2
    assert calibration.read(drive.out / "calibration.json")["CAM_FRONT"].camera.K[0, 0] == 30.0


def test_a_topic_that_is_declared_and_empty_is_named_or_left_out_if_not_required(go):
    what = stream()
    del what["/cam"]
    empty = {"/cam": "sensor_msgs/msg/CompressedImage"}
    with pytest.raises(DataError) as caught:
        go(what, empty=empty)
    assert str(caught.value) == (
        "drive: /cam of CAM_FRONT is declared, but has no messages; "
        "topics with messages: /cam_info, /charge, /odom, /points, /tf_static\n"
        "  name another in conf/rig/tiny.yaml: channels.CAM_FRONT.topic, or say required: false")
    drive = go(what, with_rig(channels__CAM_FRONT__required=False), "other", empty=empty)
    assert drive.faults()["empty_topic", "CAM_FRONT"] == 1
    assert list(calibration.read(drive.out / "calibration.json")) == ["LIDAR_TOP"]
    assert [row["channel"] for row in drive.facts["channels"]] == ["LIDAR_TOP"]


def test_a_topic_that_is_missing_is_named_with_the_nearest_one(go):
    with pytest.raises(DataError, match=r"/point of LIDAR_TOP is not in the recording, did you mean /points\?"):
        go(rig_values=with_rig(channels__LIDAR_TOP__topic="/point"))
    with pytest.raises(DataError, match=r"/odometry of the ego pose is not in the recording(.|\n)*ego_pose.topic"):
        go(rig_values=with_rig(ego_pose__topic="/odometry"), name="other")


def test_a_topic_of_another_type_is_named_with_both_types(go):
    with pytest.raises(DataError, match="/cam_info of LIDAR_TOP is sensor_msgs/msg/CameraInfo, expected "
                                        "sensor_msgs/msg/PointCloud2"):
        go(rig_values=with_rig(channels__LIDAR_TOP__topic="/cam_info"))


def test_a_camera_that_was_never_calibrated_or_has_another_size_is_an_error(go):
    what = stream()
    what["/cam_info"] = [(at, tinybags.camera_info(at, fx=0.0)) for at, _ in what["/cam_info"]]
    with pytest.raises(DataError, match=r"CAM_FRONT .*CameraInfo holds no calibration: fx 0, fy 0"):
        go(what)
    for _, message in what["/cam_info"]:
        message.k = np.array([30.0, 0, 16, 0, 30, 10, 0, 0, 0])
    with pytest.raises(DataError, match=r"CAM_FRONT .*no calibration: fx 30, fy 30, third row of K 0 0 0"):
        go(what, name="flat")
    for _, message in what["/cam_info"]:
        message.k, message.d = np.array([30.0, 0, 16, 0, 30, 10, 0, 0, 1]), np.array([0, np.inf, 0, 0, 0])
    with pytest.raises(DataError, match=r"CAM_FRONT .*no calibration: distortion 0 inf 0 0 0"):
        go(what, name="bent")
    what = stream()
    what["/cam"] = [(at, tinybags.image(at, size_px=(64, 40))) for at, _ in what["/cam"]]
    with pytest.raises(DataError, match="its images are 64x40, its CameraInfo is for 32x20"):
        go(what, name="other")
    what = stream()
    what["/cam_info"] = [(at, tinybags.camera_info(at, model="mirror")) for at, _ in what["/cam_info"]]
    with pytest.raises(DataError, match="5 coefficients of the distortion model 'mirror', known are plumb_bob"):
        go(what, name="third")


def test_a_sensor_that_nothing_mounts_is_an_error(go):
    what = stream()
    what["/tf_static"] = what["/tf_static"][:1]
    with pytest.raises(DataError, match=r"no transform joins base_link and 'cam', the frame of /cam; frames: cam, "
                                        r"lidar, mast\n  state T_ego_cam in conf/rig: mounts.cam"):
        go(what)


def test_a_field_that_a_message_has_not_is_a_config_error(go):
    with pytest.raises(ConfigError, match=r"signals.speed_mps.field is 'twist.twist.linaer.x', but /odom has no "
                                          r"'linaer' there, did you mean linear\?; it has linear, angular"):
        go(rig_values=with_rig(signals__speed_mps__field="twist.twist.linaer.x"))


# clocks -----------------------------------------------------------------------------------------------------------
def odom_64_s_ahead() -> Stream:
    what = stream()
    what["/odom"] = [(at + 64_000_000, tinybags.odometry(at + 64_000_000, (k, 0, 0), 0.0, speed_mps=5.0))
                     for k, (at, _) in enumerate(what["/odom"])]
    return what


def test_clocks_that_disagree_are_named_with_the_size_and_the_drive_has_no_usable_time(go, tmp_path):
    drive = go(odom_64_s_ahead(), with_rig(signals={}))
    start_us, end_us = drive.interval_us
    assert start_us == end_us
    fault, = (row for row in drive.facts["faults"] if row["fault"] == "clock")
    assert fault["detail"] == (
        "the ego pose's stamps run 63.9 to 64.2 s ahead of the sensors': no usable time; state it in "
        "conf/rig/tiny.yaml: ego_pose.clock_offset_us, from -64150000 to -63850000 (now 0)")
    out, summary = collected(tmp_path, drive)
    assert summary.notes == (f"drive: {fault['detail']}",)
    assert summary.num_out == 1
    page = (out.results / "report.html").read_text()
    assert "the ego pose&#39;s stamps run 63.9 to 64.2 s ahead of the sensors&#39;" in page


def test_the_stated_offset_brings_the_clocks_together(go):
    drive = go(odom_64_s_ahead(), with_rig(signals={}, ego_pose__clock_offset_us=-64_000_000))
    assert drive.interval_us == (T0_US + 300_000, T0_US + 3_500_001)
    assert drive.faults() == {}


def test_sensors_that_never_overlap_are_named(go):
    what = stream()
    what["/points"] = [(at + 9_000_000, tinybags.cloud(at + 9_000_000, np.ones((3, 3)))) for at, _ in what["/points"]]
    what["/odom"] = [(at, tinybags.odometry(at, (k, 0, 0), 0.0)) for k, at in
                     enumerate(range(T0_US, T0_US + 15_000_000, 50_000))]
    drive = go(what, with_rig(signals={}))
    assert drive.interval_us[0] == drive.interval_us[1]
    assert "LIDAR_TOP begins 5.6 s after CAM_FRONT ended" in drive.facts["faults"][-1]["detail"]


def test_stamps_that_run_away_from_reception_are_named_even_if_the_spans_overlap(go):
    """The lidar's clock is 2 s ahead; it is received when the others are."""
    what = stream()
    what["/points"] = [(at, tinybags.cloud(at + 2_000_000, np.ones((3, 3)))) for at, _ in what["/points"]]
    drive = go(what)
    fault, = (row for row in drive.facts["faults"] if row["fault"] == "clock")
    assert fault["detail"] == (
        "stamps run 2.0 s ahead of the time of reception, if other topics' do not; to shift them, set "
        "channels.LIDAR_TOP.clock_offset_us to -2000000 (now 0)")
    stated = go(what, with_rig(channels__LIDAR_TOP__clock_offset_us=-2_000_000), "other")
    assert ("clock", "LIDAR_TOP") not in stated.faults()


# plan and collect -------------------------------------------------------------------------------------------------
def planned(tmp_path: Path, rig_name: str, rigs: dict[str, Any]) -> list[Item]:
    recordings.write_listing([recordings.Recording("b/two", 5, "2" * 64, rig_name),
                              recordings.Recording("a/one.mcap", 5, "1" * 64, rig_name)], tmp_path / "scan.jsonl")
    cfg = knobs.load(ingest.Knobs, {"rig": rigs, "max_failed_ratio": 0.0}, "ingest")
    return ingest.plan(cfg, {"recordings": Upstream(tmp_path)})


def test_an_item_is_a_recording_with_its_own_rig(tmp_path):
    one, two = planned(tmp_path, "tiny", {"tiny": RIG, "other": with_rig(vehicle="bus")})
    assert (one.name, two.name) == ("a/one.mcap", "b/two")
    assert one.inputs == {"recording": "1" * 64}
    assert one.params == {"drive_name": "a/one.mcap", "drive_token": tables.token("drive", "1" * 64, "a/one.mcap"),
                          "recording_digest": "1" * 64, "rig_name": "tiny", "rig": RIG}
    assert knobs.keyed(CFG) == {}


def test_an_unknown_or_wrong_rig_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"a/one.mcap was scanned with the rig 'tinny', which ingest.rig lacks, did "
                                          r"you mean tiny\?\n  add it to rig@ingest.rig in conf/config.yaml"):
        planned(tmp_path, "tinny", {"tiny": RIG})
    with pytest.raises(ConfigError, match=r"rig.tiny.channels.CAM_FRONT.stamp is 'mid', expected one of begin, middle"):
        planned(tmp_path, "tiny", {"tiny": with_rig(channels__CAM_FRONT__stamp="mid")})


WRONG_RIGS = {
    "channels.CAM_FRONT.info_topic is null, but images need their CameraInfo":
        {"channels__CAM_FRONT__info_topic": None},
    "ego_pose.topic is null, but ego_pose.source odometry needs it": {"ego_pose__topic": None},
    "ego_pose.gnss_topic is null, but ego_pose.source gnss_imu needs it": {"ego_pose__source": "gnss_imu"},
    "mounts.mast.rotation_wxyz has the length 2, expected a unit quaternion":
        {"mounts": {"mast": {"translation_m": [0.0, 0.0, 0.0], "rotation_wxyz": [2.0, 0.0, 0.0, 0.0]}}}}


@pytest.mark.parametrize("text", WRONG_RIGS)
def test_what_a_rig_needs_together_is_asked_for(text):
    with pytest.raises(ConfigError, match=f"conf/rig/tiny.yaml: {text}"):
        rig.load(with_rig(**WRONG_RIGS[text]), "tiny")


def test_collect_writes_the_tables_of_all_drives_by_name_the_same_every_time(go, tmp_path):
    what = stream()
    del what["/points"][20:24]
    drives = [go(name="b"), go(what, name="a")]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, summary = collected(tmp_path / "one", *drives)
    two, _ = collected(tmp_path / "two", *drives[::-1])
    for name, schema in (("drives", tables.DRIVES), ("channels", tables.CHANNELS), ("gaps", tables.GAPS),
                         ("motion", tables.MOTION), ("faults", FAULTS)):
        assert tables.read(one.data / f"{name}.parquet").schema == schema
        assert (one.data / f"{name}.parquet").read_bytes() == (two.data / f"{name}.parquet").read_bytes()
    assert (one.results / "report.html").read_bytes() == (two.results / "report.html").read_bytes()
    assert tables.read(one.data / "drives.parquet")["drive_name"].to_list() == ["a", "b"]
    tokens = tables.read(one.data / "motion.parquet")["drive_token"]
    assert tokens.rle_id().max() == 1, "the rows of a drive stand together"
    assert (summary.num_in, summary.num_out, summary.unit, summary.notes) == (2, 2, "drives", ())


def test_every_fault_has_a_policy():
    sources = [path.read_text() for path in (Path(ingest.__file__), *(
        Path(ingest.__file__).parent / "lib" / f"{name}.py" for name in ("egopose", "sensors", "faults")))]
    for fault in POLICIES:
        assert any(f'"{fault}"' in source for source in sources)


# the simulator ----------------------------------------------------------------------------------------------------
def test_the_simulators_mounts_and_poses_come_out_as_it_made_them(tmp_path):
    folder = world.tiny_world(tmp_path, 1)
    values = yaml.safe_load((CONF / "sim.yaml").read_text())["sim"]
    drive = Ingested(folder / "drive_0000", tmp_path / "out", values, "sim")
    assert drive.facts["faults"] == []
    for name, sensor in calibration.read(drive.out / "calibration.json").items():
        assert sensor.T_ego_sensor == pytest.approx(sim.T_base_sensor(name), abs=1e-9)
    start_us, end_us = drive.interval_us
    assert end_us - start_us > 3_000_000
