"""Velodyne's packets: what a person works out from the data sheet, what another decoder made of real ones, and a drive
whose lidar comes as packets, one by one or in scans, against the same drive with PointCloud2."""

from __future__ import annotations

import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from rosbags.typesys import get_types_from_msg

from stages import sample
from stages.lib import bag, geometry, knobs, pack, packets, tables
from stages.lib.errors import ConfigError, DataError
from stages.lib.stage import Item
from tests import tinybags, tinydrive, velodyne
from tests.tinybags import T0_US

HOUR_US = 3_600_000_000
AZIMUTH_DEG = 0.011  # the packet's digits 0.005, the decoder's table 0.005, the rate between blocks 0.001
NOTHING = np.zeros((12, 32))


def scan_of(*data, stamps_us=None, header_us=T0_US):
    stamps_us = stamps_us or [T0_US] * len(data)
    return velodyne.scan(header_us, list(zip(stamps_us, data)))


def one_return(laser, distance_m, intensity, *, block=0, firing=0, **options):
    """A packet at 90 deg (to the right), turning 0.4 deg a block, in which one laser sees something."""
    distances, intensities = NOTHING.copy(), NOTHING.copy()
    distances[block, 16 * firing + laser], intensities[block, 16 * firing + laser] = distance_m, intensity
    return velodyne.packet(90 + 0.4 * np.arange(12), distances, intensities, 0, **options)


def azimuth_deg(points):
    return np.degrees(np.arctan2(-points[:, 1].astype(float), points[:, 0])) % 360


def difference_deg(one, other):
    return (one - other + 180) % 360 - 180


# one packet -------------------------------------------------------------------------------------------------------

def test_a_return_at_90_degrees_lies_to_the_right_at_its_beams_height():
    """Laser 0 looks 15 deg down from 11.2 mm above the centre: 10 m away that is 9.659 m aside and 2.577 m down."""
    cloud = packets.decode(scan_of(one_return(0, 10.0, 37)), T0_US)
    np.testing.assert_allclose(cloud.points, [[0, -9.6593, -2.5882 + 0.0112, 37, 0]], atol=1e-4)
    assert (cloud.points.dtype, cloud.num_dropped) == (np.float32, 0)


def test_a_beams_azimuth_and_time_follow_its_place_in_the_packet():
    """Block 3, second firing, laser 5: 55.296 x 7 + 2.304 x 5 µs after the first; the head has turned 0.4 deg in two
    firings, so 0.2417 deg since the block's azimuth of 91.2 deg."""
    both = one_return(5, 10.0, 1, block=3, firing=1)
    both = np.concatenate([one_return(0, 10.0, 1)[:100], both[100:]])
    cloud = packets.decode(scan_of(both, stamps_us=[T0_US + 2000]), T0_US)
    assert azimuth_deg(cloud.points)[1] == pytest.approx(91.2 + 0.4 * (55.296 + 11.52) / 110.592, abs=AZIMUTH_DEG)
    np.testing.assert_allclose(cloud.after_us, [2000, 2000 + 7 * 55.296 + 5 * 2.304], atol=0.01)


def test_rings_count_from_the_lowest_beam():
    found = [packets.decode(scan_of(one_return(laser, 10.0, 1)), T0_US).points[0] for laser in range(16)]
    rings = np.array(found)[:, 4]
    np.testing.assert_array_equal(rings, velodyne.RING)
    np.testing.assert_array_equal(np.argsort(velodyne.ELEVATION_DEG), np.argsort(rings))


@pytest.mark.parametrize(("last", "strongest", "expected"), [
    (((10.0, 5), (10.0, 5)), None, [[10.0, 5]]),
    (((12.0, 5), (10.0, 9)), None, [[12.0, 5], [10.0, 9]]),
    (((12.0, 5), (0.0, 0)), None, [[12.0, 5]]),
], ids=["the same", "two", "one only"])
def test_of_a_firing_with_two_returns_both_stay_and_twins_once(last, strongest, expected):
    distances, intensities = NOTHING.copy(), NOTHING.copy()
    for block, (distance, intensity) in enumerate(last):
        distances[block, 1], intensities[block, 1] = distance, intensity
    data = velodyne.packet(np.repeat(90 + 0.2 * np.arange(6), 2), distances, intensities, 0, mode=velodyne.DUAL)
    points = packets.decode(scan_of(data), T0_US).points
    ranges = np.linalg.norm(points[:, :3] - [0, 0, velodyne.OFFSET_M[1]], axis=1)
    np.testing.assert_allclose(np.column_stack([ranges, points[:, 3]]), expected, atol=1e-3)


@pytest.mark.parametrize(("model", "distance_m"), [(velodyne.VLP16, 0.06), (0x28, 240.0)], ids=["VLP-16", "VLP-32C"])
def test_every_return_stays_however_near_or_far(model, distance_m):
    """A VLP-32C counts in steps of 4 mm."""
    told_m = distance_m / 2 if model == 0x28 else distance_m
    (point,) = packets.decode(scan_of(one_return(0, told_m, 1, model=model)), T0_US).points
    assert np.linalg.norm(point[:3]) == pytest.approx(distance_m, abs=0.01)


def test_a_scan_without_packets_or_returns_is_a_cloud_without_points():
    for scan in (scan_of(), scan_of(velodyne.packet(np.arange(12), NOTHING, NOTHING, 0))):
        cloud = packets.decode(scan, T0_US)
        assert (cloud.points.shape, cloud.after_us, cloud.missing) == ((0, 5), None, ("time",))


@pytest.mark.parametrize(("model", "said"), [(0x00, "Model ID in packet: 0"), (0x31, "Velarray"), (0x23, "VLP-32A or")])
def test_packets_of_a_model_that_is_not_known_are_refused_by_name(model, said):
    with pytest.raises(DataError, match=f"its packets can't be decoded: .*{said}.*; those of VLP-16, Puck Hi-Res, "
                                        r"HDL-32E, VLP-32C and VLS-128 \(Alpha Prime\) can"):
        packets.decode(scan_of(one_return(0, 10.0, 1, model=model)), T0_US)


def test_packets_of_another_size_are_refused():
    """By Velodyne's own definition there are none; a recording may bring another."""
    whole = one_return(0, 10.0, 1)
    with pytest.raises(DataError, match="a packet of 600 bytes, Velodyne's have 1206"):
        packets.decode(scan_of(whole, whole[:600]), T0_US)


def test_packets_of_two_models_in_one_scan_are_refused():
    with pytest.raises(DataError, match="Expected model ID <34> in packet, got <40>"):
        packets.decode(scan_of(one_return(0, 10.0, 1), one_return(0, 10.0, 1, model=0x28)), T0_US)


# a turn and its time ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def fired():
    """0.4 s of a sensor that stands; its own clock passes the hour 30 ms after its first whole turn began."""
    return velodyne.fire(T0_US, 301, velodyne.standing, sensor_us=HOUR_US - 80_000)


@pytest.fixture(scope="module")
def turn(fired):
    return velodyne.turns(fired)[0]


def truth(turn, header_us):
    return (np.concatenate([one.points for one in turn]),
            np.concatenate([one.stamp_us - header_us + one.times_us for one in turn]))


@pytest.mark.parametrize("at", [0, -1, 40], ids=["first packet", "last packet", "another"])
def test_a_turn_is_what_the_sensor_saw_when_it_saw_it_whichever_packet_the_header_is_of(turn, at):
    header_us = turn[at].stamp_us
    cloud = packets.decode(velodyne.scan(header_us, [(one.stamp_us, one.data) for one in turn]), header_us)
    points, after_us = truth(turn, header_us)
    assert len(cloud.points) == len(points) == 76 * 384
    np.testing.assert_array_equal(cloud.points[:, 3:], points[:, 3:])
    radius = [np.hypot(xyz[:, 0], xyz[:, 1]) for xyz in (cloud.points, points)]
    assert np.abs(radius[0] - radius[1]).max() < 1e-4
    assert np.abs(cloud.points[:, 2] - points[:, 2]).max() < 1e-4
    assert np.abs(difference_deg(azimuth_deg(cloud.points), azimuth_deg(points))).max() < AZIMUTH_DEG
    assert np.abs(cloud.after_us - after_us).max() < 0.5


def test_late_packets_do_not_move_the_points_in_time(turn):
    late_us = np.where(np.arange(len(turn)) % 3 == 0, 700 + 400 * np.arange(len(turn)) % 5000, 0).tolist()
    stamped = [(one.stamp_us + late, one.data) for one, late in zip(turn, late_us)]
    cloud = packets.decode(velodyne.scan(T0_US, stamped), T0_US)
    assert np.abs(cloud.after_us - truth(turn, T0_US)[1]).max() < 0.5


@pytest.mark.parametrize(("stamp_us", "num"), [(0, 76), (0, 1), (T0_US, 76)], ids=["none", "none, one packet", "same"])
def test_packets_that_are_not_stamped_each_have_points_without_time(turn, stamp_us, num):
    cloud = packets.decode(velodyne.scan(T0_US, [(stamp_us, one.data) for one in turn[:num]]), T0_US)
    assert (cloud.after_us, cloud.missing, len(cloud.points)) == (None, ("time",), num * 384)


def test_a_scans_cloud_does_not_depend_on_what_was_decoded_before(turn):
    scan = velodyne.scan(T0_US, [(one.stamp_us, one.data) for one in turn])
    before = packets.decode(scan, T0_US)
    packets.decode(scan_of(one_return(0, 10.0, 1, model=0x28)), T0_US)
    np.testing.assert_array_equal(before.points, packets.decode(scan, T0_US).points)


# single packets ---------------------------------------------------------------------------------------------------

def cut(messages):
    """(number of the message that ended it, turn) of each whole turn; received 1000 ns after one another."""
    turns = packets.Turns()
    found = [(number, turns.add(message, 1000 * number)) for number, message in enumerate(messages)]
    return [(number, turn) for number, turn in found if turn]


def test_single_packets_become_whole_turns_cut_behind_the_sensor(fired):
    found = cut(velodyne.single(one.stamp_us, one.data) for one in fired)
    assert [len(turn.packets) for _, turn in found] == [len(turn) for turn in velodyne.turns(fired)] == [76, 75, 75]
    for (number, turn), expected in zip(found, velodyne.turns(fired)):
        assert bag.stamp_us(turn.header) == expected[-1].stamp_us == fired[number].stamp_us
        azimuths = azimuth_deg(packets.decode(turn, T0_US).points)
        assert 184.7 < azimuths[0] < 189.6
        assert 184.7 < azimuths[-1] < 189.6


def test_a_turn_is_found_again_by_who_reads_from_where_it_says(fired):
    messages = [velodyne.udp(one.stamp_us, one.data) for one in fired]
    for number, turn in cut(messages):
        turns = packets.Turns()
        again = [turns.add(message, 1000 * place) for place, message in enumerate(messages)
                 if turn.from_ns <= 1000 * place <= 1000 * number]
        assert [found is not None for found in again] == [False] * (len(again) - 1) + [True]
        assert [p.data.tobytes() for p in again[-1].packets] == [p.data.tobytes() for p in turn.packets]
        assert again[-1].header == turn.header


@pytest.mark.parametrize(("lost", "whole"), [
    (slice(130, 140), [76, 65, 75]), (slice(130, 160), [76, 75]), (slice(100, 265), []), (slice(5, 7), [76, 75, 75]),
    (slice(50, 80), [75, 75]), (slice(100, 130), [75]),
], ids=["10 packets: a gap", "30 packets: no turn", "2 turns", "before the first turn", "over the sensor's hour",
        "over the cut"])
def test_a_turn_with_a_hole_is_none(fired, lost, whole):
    left = fired[:lost.start] + fired[lost.stop:]
    assert [len(turn.packets) for _, turn in cut(velodyne.single(one.stamp_us, one.data) for one in left)] == whole


def test_a_sensor_that_stands_still_makes_no_turn_and_keeps_no_packets(fired):
    turns = packets.Turns()
    assert [turn for one in fired[:50] if (turn := turns.add(velodyne.single(T0_US, one.data), 0))] == []
    begin_us = HOUR_US - 80_000 + round(50 * velodyne.PACKET_US)
    for number in range(1000):
        data = velodyne.packet([240] * 12, NOTHING, NOTHING, begin_us + round(number * velodyne.PACKET_US))
        assert turns.add(velodyne.single(T0_US, data), number) is None
    assert not turns._packets


def test_blocks_that_are_empty_do_not_matter_for_the_cut(fired):
    """A VLS-128 leaves the last four of a packet empty in dual-return mode."""
    data = [np.concatenate([one.data[:800], np.zeros(400, np.uint8), one.data[1200:]]) for one in fired]
    found = cut(velodyne.single(one.stamp_us, half) for one, half in zip(fired, data))
    assert [len(turn.packets) for _, turn in found] == [76, 75, 75]


def test_position_packets_on_the_same_port_are_passed_over(fired):
    messages = [velodyne.udp(one.stamp_us, one.data) for one in fired]
    messages.insert(100, velodyne.udp(T0_US, np.zeros(512, np.uint8)))
    assert [len(turn.packets) for _, turn in cut(messages)] == [76, 75, 75]


# real packets -----------------------------------------------------------------------------------------------------

PCD = [(name, "<f4") for name in ("x", "y", "z")] + [("intensity", "u1"), ("kind", "u1"), ("ring", "<u2")] + [
    (name, "<f4") for name in ("azimuth_rad", "elevation_rad", "distance_m")] + [("time_ns", "<u4")]
DEG_PER_US = 360 / 100_250  # of that sensor: its turns take 100.25 ms


@pytest.fixture(scope="module")
def real(real_data):
    """Scans of a VLP-16 in dual-return mode, and of the last one what Roadmill and what tier4/nebula make of it, sorted
    alike: ring, range [2 mm], intensity, azimuth [deg], range [m], z [m], time after its packet's first firing [µs]."""
    folder = real_data / "lidar_packets/vlp16"
    with bag.open_bag(folder / "1673400471837873222") as opened:
        scans = [opened.decode(message) for message in opened.messages(["/velodyne_packets"])]
    content = (folder / "1673400472138016708.pcd").read_bytes()
    theirs = np.frombuffer(content.partition(b"DATA binary\n")[2], PCD)
    # theirs begins with the packet in which 0 deg is passed, the last one of the scan before, and ends below 359 deg
    scan = SimpleNamespace(header=scans[3].header, packets=[scans[2].packets[-1], *scans[3].packets])
    header_us = bag.stamp_us(scan.header)
    cloud = packets.decode(scan, header_us)
    begins_us = packets._sensor_us(np.array([packet.data for packet in scan.packets]))
    begins_us = begins_us - begins_us[0] + cloud.after_us.min() - 2.304
    number = np.searchsorted(begins_us, cloud.after_us + 0.1) - 1
    azimuths = azimuth_deg(cloud.points)
    own = (azimuths < 359.005) & ~((number == len(scan.packets) - 1) & (azimuths < 180))
    ranges = np.linalg.norm(cloud.points[:, :3] - np.outer(offsets_m(cloud.points[:, 4]), [0, 0, 1]), axis=1)
    mine = np.column_stack([cloud.points[:, 4], np.rint(ranges / 0.002), cloud.points[:, 3], azimuths, ranges,
                            cloud.points[:, 2], cloud.after_us - begins_us[number]])[own]
    yours = np.column_stack([
        theirs["ring"], np.rint(theirs["distance_m"] / 0.002), theirs["intensity"], np.degrees(theirs["azimuth_rad"]),
        theirs["distance_m"], theirs["z"], theirs["time_ns"] / 1e3])
    return scans, *(rows[np.lexsort(rows.T[3::-1])] for rows in (mine, yours))


def offsets_m(rings):
    return velodyne.OFFSET_M[np.argsort(velodyne.RING)][rings.astype(int)]


def test_real_packets_have_the_points_that_another_decoder_finds(real):
    """All 14,831, each with the same ring, range and intensity; it places beams without their vertical offsets."""
    _, mine, yours = real
    assert len(mine) == len(yours) == 14_831
    np.testing.assert_array_equal(mine[:, :3], yours[:, :3])
    assert np.abs(mine[:, 4] - yours[:, 4]).max() < 2e-5
    assert np.abs(mine[:, 5] - yours[:, 5] - offsets_m(mine[:, 0])).max() < 5.1e-5  # 0.1 mm is a digit of the manual


def test_real_points_lie_where_the_other_decoder_has_them_but_for_what_it_gets_wrong(real):
    """It takes a second return's azimuth from the next pair of blocks, and in a packet's last pair the head stands."""
    _, mine, yours = real
    block = np.floor(yours[:, 6] / 110.592 + 1e-6).astype(int)
    in_pair_us = np.rint(yours[:, 6] - 2 * block * 55.296)
    turned_deg = in_pair_us * DEG_PER_US
    expected_deg = np.where(block >= 10, turned_deg, np.where(block % 2, turned_deg - 110.592 * DEG_PER_US, 0))
    plain = (block < 10) & (block % 2 == 0)
    off_deg = difference_deg(mine[:, 3], yours[:, 3])
    assert plain.sum() > 12_000
    assert np.abs(off_deg[plain]).max() < 0.021
    assert np.abs(off_deg - expected_deg).max() < 0.031


def test_real_points_are_timed_by_what_the_packets_say_of_themselves(real):
    """Packets come 663.55 µs apart, 12 firings in dual-return mode; the other decoder's file times them as 24."""
    scans, mine, yours = real
    sensor_us = packets._sensor_us(np.array([packet.data for packet in scans[3].packets]))
    assert np.diff(sensor_us).mean() == pytest.approx(12 * 55.296, abs=0.05)
    block = np.floor(yours[:, 6] / 110.592 + 1e-6).astype(int)
    assert np.abs(yours[:, 6] - mine[:, 6] - 55.296 * (block + block % 2)).max() < 0.2
    assert mine[:, 6].min() > 0
    assert mine[:, 6].max() < 663.55


def test_real_scans_are_stamped_by_their_first_packet_and_their_points_by_the_sensors_own_clock(real):
    """The sensor's clock was never set: it shows 140 s past the hour when the host's shows 1671 s."""
    for scan in real[0]:
        header_us = bag.stamp_us(scan.header)
        assert bag.stamp_us(scan.packets[0]) == header_us
        after_us = packets.decode(scan, header_us).after_us
        assert -10 < after_us.min() < 10
        assert 99_500 < after_us.max() < 100_200


# a drive ----------------------------------------------------------------------------------------------------------

LATE_NS = 2_000_000
MOUNT = geometry.transform([1.0, 0.5, 1.5], geometry.yaw_wxyz(0.3))
RIG = tinydrive.with_rig(signals={}, ego_pose__max_gap_us=50_000,
                         channels={"LIDAR_TOP": {**tinydrive.CHANNEL, "modality": "lidar", "topic": "/lidar",
                                                 "info_topic": None, "rate_hz": 10.0, "stamp": "end",
                                                 "duration_us": 100_000}},
                         mounts={"LIDAR_TOP": {"translation_m": [1.0, 0.5, 1.5],
                                               "rotation_wxyz": geometry.yaw_wxyz(0.3).tolist()}})
SETTINGS = yaml.safe_load((Path(__file__).parents[1] / "conf/sample/default.yaml").read_text())


def T_map_ego(after_us):
    """15 m/s round a circle of 15 m about (0, 20), from (0, 5)."""
    cos, sin = np.cos(np.asarray(after_us) * 1e-6), np.sin(np.asarray(after_us) * 1e-6)
    T = np.tile(np.eye(4), (len(cos), 1, 1))
    T[:, 0, 0], T[:, 0, 1], T[:, 1, 0], T[:, 1, 1] = cos, -sin, sin, cos
    T[:, 0, 3], T[:, 1, 3] = 15 * sin, 20 - 15 * cos
    return T


@pytest.fixture(scope="module")
def driven():
    """2 s of packets from a car that drives and turns."""
    return velodyne.fire(T0_US + 200_000, 1500, lambda after_us: T_map_ego(after_us + 200_000) @ MOUNT,
                         sensor_us=HOUR_US - 1_000_000)


def lidar_messages(kind, driven):
    """(stamp, message): a scan or cloud is sent with its last packet."""
    if kind in ("VelodynePacket", "UdpPacket"):
        make = velodyne.single if kind == "VelodynePacket" else velodyne.udp
        return [(one.stamp_us, make(one.stamp_us, one.data)) for one in driven]
    if kind == "VelodyneScan":
        return [(turn[-1].stamp_us, velodyne.scan(turn[-1].stamp_us, [(one.stamp_us, one.data) for one in turn]))
                for turn in velodyne.turns(driven)]
    return [(turn[-1].stamp_us, velodyne.cloud(turn[-1].stamp_us, turn)) for turn in velodyne.turns(driven)]


def drive(folder, kind, driven, rig=RIG, messages=None, **options):
    odometry = []
    for at_us in range(T0_US, T0_US + 2_400_001, 10_000):
        (T,) = T_map_ego([at_us - T0_US])
        odometry.append((at_us, tinybags.odometry(at_us, tuple(T[:3, 3]), (at_us - T0_US) * 1e-6, speed_mps=15,
                                                  yaw_rate_radps=1.0)))
    events = [("/odom", at * 1000, message) for at, message in odometry]
    events += [("/lidar", at * 1000 + LATE_NS, message) for at, message in messages or lidar_messages(kind, driven)]
    recording = tinybags.write(folder / "bag", sorted(events, key=lambda event: event[1]), **options)
    return recording, tinydrive.Ingested(recording, folder / "ingest", rig)


class Sweeps:
    """A scene of a drive: each sweep's points, T_map_sensor at its stamp, and the pack's bytes."""

    def __init__(self, folder, kind, driven, *, window_us=None, messages=None, **changed):
        folder.mkdir()
        recording, self.ingested = drive(folder, kind, driven, messages=messages)
        start_us, end_us = window_us or self.ingested.interval_us
        params = {"scene_token": "5" * 32, "scene_name": "s", "drive_token": "d" * 32, "drive_name": "bag",
                  "start_us": start_us, "end_us": end_us, "pose_gaps_us": []}
        inputs = {"recording": recording, "calibration": folder / "ingest/calibration.json",
                  **{name: folder / f"ingest/{name}.parquet" for name in ("trajectory", "index", "signals")}}
        (folder / "out").mkdir()
        self.facts = sample.run(knobs.load(sample.Knobs, SETTINGS | changed, "sample"), Item("s", params, {}), inputs,
                                folder / "out")
        data = tables.read(folder / "out/sample_data.parquet").sort("stamp_us")
        self.points = {row["stamp_us"]: pack.read_points(pack.read_member(folder / "out/pack.tar", row["offset"],
                                                                          row["bytes"]))
                       for row in data.iter_rows(named=True)}
        self.packed = (folder / "out/pack.tar").read_bytes()

    def off_walls_m(self):
        found = []
        for at_us, points in self.points.items():
            (T,) = T_map_ego([at_us - T0_US]) @ MOUNT
            found.append(velodyne.off_walls_m(geometry.apply(T, points[:, :3].astype(float))))
        return np.concatenate(found)


KINDS = ("VelodyneScan", "VelodynePacket", "UdpPacket")


@pytest.fixture(scope="module")
def sweeps(driven, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packets")
    return {kind: Sweeps(folder / kind, kind, driven) for kind in ("PointCloud2", *KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_drives_index_has_a_row_a_turn_however_its_packets_are_sent(kind, sweeps):
    clouds, own = sweeps["PointCloud2"].ingested, sweeps[kind].ingested
    columns = ["channel", "stamp_us", "receive_ns", "seq"]
    assert own.table("index").select(columns).equals(clouds.table("index").select(columns))
    assert own.channel("LIDAR_TOP")["num_messages"] == 19
    assert own.channel("LIDAR_TOP")["rate_hz"] == pytest.approx(10, abs=0.1)
    assert own.interval_us == clouds.interval_us
    assert own.faults() == {}
    assert (own.table("index")["decode_from_ns"] <= own.table("index")["receive_ns"]).all()
    assert 75 * 1206 < own.table("index")["bytes"].min() <= own.table("index")["bytes"].max() < 76 * 1300


@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_of_packets_are_those_of_the_clouds_within_the_sensors_resolution(kind, driven, tmp_path):
    clouds, own = (Sweeps(tmp_path / name, name, driven, motion_compensate=False).points
                   for name in ("PointCloud2", kind))
    assert list(own) == list(clouds)
    assert len(own) == 19
    for at_us, points in own.items():
        np.testing.assert_array_equal(points[:, 3:], clouds[at_us][:, 3:])
        ranges = [np.linalg.norm(xyz[:, :2], axis=1) for xyz in (points, clouds[at_us])]
        assert np.abs(ranges[0] - ranges[1]).max() < 0.002
        assert np.abs(points[:, 2] - clouds[at_us][:, 2]).max() < 0.002
        assert np.abs(difference_deg(azimuth_deg(points), azimuth_deg(clouds[at_us]))).max() < AZIMUTH_DEG


def test_the_same_packets_make_the_same_pack_however_they_are_sent(sweeps):
    assert sweeps["VelodyneScan"].packed == sweeps["VelodynePacket"].packed == sweeps["UdpPacket"].packed


@pytest.mark.parametrize("kind", ["PointCloud2", *KINDS])
def test_the_walls_are_where_they_are_although_the_car_drove_and_turned(kind, sweeps):
    """0.01 deg at 50 m are 9 mm; the poses' own curve between two of 10 ms is below 1 mm."""
    assert sweeps[kind].off_walls_m().max() < 0.012
    assert sweeps[kind].facts["num_clouds_without_time"] == 0


def test_uncompensated_they_are_off_by_what_the_car_drove_in_half_a_turn(driven, sweeps, tmp_path):
    """15 m/s and 1 rad/s for 50 ms: 0.75 m and 0.05 rad, which is 2.5 m across at 50 m."""
    off = Sweeps(tmp_path / "off", "UdpPacket", driven, motion_compensate=False).off_walls_m()
    assert 0.75 < off.max() < 3.5
    assert np.median(off) > 100 * np.median(sweeps["UdpPacket"].off_walls_m())


def test_a_scene_in_the_middle_has_the_same_sweeps_as_the_whole_drive(driven, sweeps, tmp_path):
    start_us, end_us = sweeps["UdpPacket"].ingested.interval_us
    part = Sweeps(tmp_path / "part", "UdpPacket", driven, window_us=(start_us + 600_000, end_us - 400_000)).points
    assert 6 <= len(part) <= 8
    for at_us, points in part.items():
        np.testing.assert_array_equal(points, sweeps["UdpPacket"].points[at_us])


def test_a_turn_that_lost_packets_is_missing_and_counted_the_others_stay(driven, sweeps, tmp_path):
    lossy = Sweeps(tmp_path / "lossy", "UdpPacket", driven[:720] + driven[750:])
    assert lossy.ingested.faults() == {("dropped", "LIDAR_TOP"): 1}
    whole = sweeps["UdpPacket"].points
    assert (len(whole), len(lossy.points), set(lossy.points) < set(whole)) == (19, 18, True)
    for at_us, points in lossy.points.items():
        np.testing.assert_array_equal(points, whole[at_us])


def test_a_scan_of_one_packet_is_a_sweep_of_its_points(driven, tmp_path):
    messages = lidar_messages("VelodyneScan", driven)
    at_us, scan = messages[7]
    messages[7] = at_us, velodyne.TYPES["VelodyneScan"](scan.header, scan.packets[-1:])
    points = Sweeps(tmp_path / "partial", "VelodyneScan", driven, messages=messages).points
    assert [len(sweep) for sweep in points.values()][6:9] == [76 * 384, 384, 75 * 384]


def test_a_ros1_bags_scans_are_the_same(turn, tmp_path):
    tinybags.ROS1_STORE.register(get_types_from_msg("time stamp\nuint8[1206] data\n", packets.SINGLE[0]))
    tinybags.ROS1_STORE.register(get_types_from_msg("Header header\nvelodyne_msgs/VelodynePacket[] packets\n",
                                                    packets.SCAN))
    kinds = tinybags.ROS1_STORE.types

    def time(at_us):
        return kinds["builtin_interfaces/msg/Time"](sec=at_us // 1_000_000, nanosec=at_us % 1_000_000 * 1000)

    parts = [kinds[packets.SINGLE[0]](stamp=time(one.stamp_us), data=one.data) for one in turn]
    header = kinds["std_msgs/msg/Header"](seq=7, stamp=time(T0_US), frame_id="velodyne")
    recording = tinybags.write_ros1(tmp_path / "r.bag", [("/p", T0_US * 1000, kinds[packets.SCAN](header, parts))])
    with bag.open_bag(recording) as opened:
        (scan,) = map(opened.decode, opened.messages(["/p"]))
    cloud = packets.decode(scan, T0_US)
    expected = packets.decode(velodyne.scan(T0_US, [(one.stamp_us, one.data) for one in turn]), T0_US)
    np.testing.assert_array_equal(cloud.points, expected.points)
    np.testing.assert_array_equal(cloud.after_us, expected.after_us)


def test_packets_without_a_turn_are_refused_with_what_they_lack(driven, tmp_path):
    with pytest.raises(DataError, match="bag: LIDAR_TOP: the 60 packets of /lidar hold no whole turn of a "
                                        "Velodyne lidar, cut behind it, of 1206 bytes each\n"
                                        "  correct the recording, or leave the channel out"):
        drive(tmp_path, "UdpPacket", driven[:60])


def test_packets_that_name_no_frame_need_the_rigs_mount(driven, tmp_path):
    with pytest.raises(DataError, match=r"bag: LIDAR_TOP: the messages of /lidar name no frame\n"
                                        r"  state where it is in the rig: mounts.LIDAR_TOP"):
        drive(tmp_path, "VelodynePacket", driven, {**RIG, "mounts": {}})


@pytest.mark.parametrize("stamp", ["begin", "middle"])
def test_single_packets_are_stamped_at_the_end_of_their_turn_and_a_rig_that_says_else_is_wrong(stamp, driven, tmp_path):
    rig = {**RIG, "channels": {"LIDAR_TOP": {**RIG["channels"]["LIDAR_TOP"], "stamp": stamp}}}
    with pytest.raises(ConfigError, match=f"bag: channels.LIDAR_TOP.stamp is {stamp}, but /lidar has a packet a "
                                          "message, and a turn of them the stamp of its last\n  say `stamp: end` in"):
        drive(tmp_path, "UdpPacket", driven, rig)


def test_packets_of_an_unknown_model_stop_the_drive_with_topic_and_way_out(driven, tmp_path):
    strange = [velodyne.Fired(one.stamp_us, np.append(one.data[:-1], np.uint8(0x99)), one.points, one.times_us,
                              one.azimuth_deg) for one in driven[:200]]
    with pytest.raises(DataError, match=r"bag: LIDAR_TOP \(/lidar, first message\): its packets can't be decoded: .*\n"
                                        "  correct the recording, or leave the channel out of the rig"):
        drive(tmp_path, "VelodyneScan", strange)


def test_a_recording_without_definitions_still_has_scans(driven, tmp_path):
    recording, _ = drive(tmp_path, "VelodyneScan", driven, storage="sqlite3")
    (path,) = recording.glob("*.db3")
    database = sqlite3.connect(path)
    database.execute("DELETE FROM message_definitions")
    database.commit()
    database.close()
    with bag.open_bag(recording) as opened:
        scans = [opened.decode(message) for message in opened.messages(["/lidar"])]
    assert [len(scan.packets) for scan in scans[:3]] == [76, 75, 75]


def test_a_udp_packet_is_read_by_its_layout_on_the_wire():
    """Little-endian CDR: stamp, frame, address, a port of two bytes, payload."""
    wire = struct.pack("<4xiII6s2xI14sHI3s", 7, 8, 6, b"lidar", 14, b"192.168.1.201", 2368, 3, b"abc")
    message = bag._known().deserialize_cdr(b"\0\1\0\0" + wire[4:], "udp_msgs/msg/UdpPacket")
    assert (message.header.stamp.sec, message.header.frame_id, message.address) == (7, "lidar", "192.168.1.201")
    assert (message.src_port, message.data.tobytes()) == (2368, b"abc")


def test_who_has_no_packets_does_not_load_the_decoder():
    code = "import sys; import stages.ingest, stages.sample; print('velodyne_decoder' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.stdout.strip() == "False"
