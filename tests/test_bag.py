"""The one door to recordings: what comes out of it, and that only DataError does when they are damaged."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2.storage_mcap import McapReader

from stages.lib import bag as bags
from stages.lib.bag import open_bag, stamp_us
from stages.lib.errors import DataError
from tests import tinybags
from tests.tinybags import ROS1_STORE, T0_US

T0_NS = T0_US * 1000


def noise(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def drive(path: Path, storage: str = "mcap", num: int = 40) -> Path:
    """Odometry every 100 ms, and a cloud of 120 kB that nothing can compress, received 5 ms after its stamp."""
    events = []
    for k in range(num):
        at_us = T0_US + k * 100_000
        events.append(("/odom", at_us * 1000 + 1000, tinybags.odometry(at_us, (k, 0, 0), 0.0)))
        points = noise(120_000, k).view(np.uint8).astype(np.float32)[:30_000].reshape(-1, 3)
        events.append(("/points", at_us * 1000 + 5_000_000, tinybags.cloud(at_us, points)))
    return tinybags.write(path, events, storage, empty={"/silent": "std_msgs/msg/Float32"})


def read_all(path: Path) -> list[tuple[str, int, int, bytes]]:
    with open_bag(path) as bag:
        return [(m.topic, m.receive_ns, m.seq, bytes(m.data)) for m in bag.messages(bag.topics)]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_messages_come_in_receive_order_with_their_bytes_and_types(tmp_path, storage):
    with open_bag(drive(tmp_path / "drive", storage)) as bag:
        assert {t.name: (t.msgtype, t.count) for t in bag.topics.values()} == {
            "/odom": ("nav_msgs/msg/Odometry", 40), "/points": ("sensor_msgs/msg/PointCloud2", 40),
            "/silent": ("std_msgs/msg/Float32", 0)}
        messages = list(bag.messages(bag.topics))
        assert [m.receive_ns for m in messages] == sorted(m.receive_ns for m in messages)
        assert len(messages) == 80
        third = [m for m in messages if m.topic == "/odom"][2]
        assert bag.decode(third).pose.pose.position.x == 2.0
        assert bag.sensor_us(third) == stamp_us(bag.decode(third).header) == T0_US + 200_000


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_window_is_half_open_and_gives_what_a_full_pass_gives_there(tmp_path, storage):
    path = drive(tmp_path / "drive", storage)
    start_ns, stop_ns = T0_NS + 1_000_000_000 + 1000, T0_NS + 2_000_000_000 + 1000
    wanted = [row for row in read_all(path) if row[0] == "/odom" and start_ns <= row[1] < stop_ns]
    with open_bag(path) as bag:
        got = [(m.topic, m.receive_ns, m.seq, bytes(m.data)) for m in bag.messages(["/odom"], start_ns, stop_ns)]
    assert got == wanted
    assert len(got) == 10
    assert got[0][1] == start_ns


def test_a_window_of_an_mcap_file_reads_only_its_chunks(tmp_path):
    """The cost of a scene must not grow with the drive: chunks outside the window are not even read."""
    path = drive(tmp_path / "drive")
    with McapReaderSpy(next(path.glob("*.mcap"))) as spy, open_bag(path) as bag:
        list(bag.messages(["/odom"], T0_NS, T0_NS + 300_000_000))
        few = spy.bytes_read
        list(bag.messages(["/odom"]))
        all_ = spy.bytes_read - few
    assert few < 0.25 * all_


class McapReaderSpy:
    """Counts the bytes of chunks that are decompressed."""

    def __init__(self, file: Path) -> None:
        self.file, self.bytes_read = file, 0

    def __enter__(self):
        from rosbags.rosbag2 import storage_mcap
        self.module, self.original = storage_mcap, storage_mcap.decompress

        def counted(data, *rest):
            self.bytes_read += len(data)
            return self.original(data, *rest)
        storage_mcap.decompress = counted
        return self

    def __exit__(self, *_):
        self.module.decompress = self.original


def test_twins_of_one_receive_time_are_told_apart_by_seq_whatever_the_window(tmp_path):
    at = [0, 0, 0, 1000, 1000]
    events = [("/odom", T0_NS + ns, tinybags.odometry(T0_US + k, (k, 0, 0), 0.0)) for k, ns in enumerate(at)]
    with open_bag(tinybags.write(tmp_path / "drive", events)) as bag:
        assert [(m.receive_ns - T0_NS, m.seq) for m in bag.messages(["/odom"])] == [
            (0, 0), (0, 1), (0, 2), (1000, 0), (1000, 1)]
        assert [(bag.decode(m).pose.pose.position.x, m.seq) for m in bag.messages(["/odom"], T0_NS + 1000)] == [
            (3.0, 0), (4.0, 1)]


def test_nanoseconds_become_microseconds_on_integers():
    """In float64, 1700000000 s + 123456999 ns would be 1700000000123457 µs."""
    header = tinybags.header(0)
    header.stamp.sec, header.stamp.nanosec = 1_700_000_000, 123_456_999
    assert stamp_us(header) == 1_700_000_000_123_456
    assert bags.ns_to_us(1_700_000_000_123_456_999) == 1_700_000_000_123_456


def test_a_message_without_header_or_with_a_zero_stamp_has_no_sensor_time(tmp_path):
    events = [("/number", T0_NS, tinybags.number(1)), ("/odom", T0_NS, tinybags.odometry(0, (0, 0, 0), 0.0))]
    with open_bag(tinybags.write(tmp_path / "drive", events)) as bag:
        assert [bag.sensor_us(m) for m in bag.messages(bag.topics)] == [None, None]


def test_big_endian_stamps_are_read_as_such(tmp_path):
    message = tinybags.odometry(T0_US + 7, (0, 0, 0), 0.0)
    data = tinybags.STORE.serialize_cdr(message, message.__msgtype__, little_endian=False)
    path = tinybags.write(tmp_path / "drive", [("/odom", T0_NS, message)])
    with open_bag(path) as bag:
        big = bags.Message("/odom", message.__msgtype__, T0_NS, 0, bytes(data))
        assert bag.sensor_us(big) == T0_US + 7


def test_a_ros1_bag_comes_through_the_same_door(tmp_path):
    types = ROS1_STORE.types
    stamp = types["builtin_interfaces/msg/Time"](sec=1_700_000_000, nanosec=5_000_999)
    point = types["geometry_msgs/msg/PointStamped"](
        header=types["std_msgs/msg/Header"](seq=9, stamp=stamp, frame_id="map"),
        point=types["geometry_msgs/msg/Point"](x=1.0, y=2.0, z=3.0))
    clock = types["rosgraph_msgs/msg/Clock"](clock=stamp)
    path = tinybags.write_ros1(tmp_path / "a.bag", [("/point", T0_NS, point), ("/clock", T0_NS + 1, clock)])
    with open_bag(path) as bag:
        first, second = bag.messages(bag.topics)
        assert bag.decode(first).point.z == 3.0
        assert bag.sensor_us(first) == bag.sensor_us(second) == 1_700_000_000_005_000


def test_the_splits_of_one_bag_are_merged_by_time_even_where_they_overlap(tmp_path):
    """rosbag2 stamps in its middleware, so that a message may land in the file after the one it belongs to."""
    folder = tinybags.write(tmp_path / "drive", [
        ("/odom", T0_NS + k, tinybags.odometry(T0_US, (k, 0, 0), 0.0)) for k in (0, 2, 4)])
    other = tinybags.write(tmp_path / "other", [
        ("/odom", T0_NS + k, tinybags.odometry(T0_US, (k, 0, 0), 0.0)) for k in (3, 5)])
    (other / "other.mcap").rename(folder / "drive_1.mcap")
    metadata = folder / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace("  - drive.mcap\n", "  - drive.mcap\n  - drive_1.mcap\n"))
    with open_bag(folder) as bag:
        assert bag.topics["/odom"].count == 5
        assert [m.receive_ns - T0_NS for m in bag.messages(["/odom"])] == [0, 2, 3, 4, 5]
        assert [m.receive_ns - T0_NS for m in bag.messages(["/odom"], T0_NS + 3)] == [3, 4, 5]


def test_an_unknown_topic_is_named_with_the_nearest_one(tmp_path):
    with (open_bag(drive(tmp_path / "drive", num=1)) as bag,
          pytest.raises(DataError, match=r"drive: has no topic /pionts, did you mean /points\?")):
        list(bag.messages(["/pionts"]))


# damage -----------------------------------------------------------------------------------------------------------
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "cut off": (cut, "ends early, at byte .* MCAP end mark.*`mcap recover"),
    "empty": (lambda path: path.write_bytes(b""), "is empty .0 bytes.; copy it again"),
    "lfs pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
                    "is a Git-LFS pointer of .* bytes, not the recording; fetch that: `git lfs pull`"),
    "other file": (lambda path: path.write_bytes(b"GIF89a" + bytes(100)), "does not begin as a .mcap file does"),
    "gone": (lambda path: path.unlink(), "1 file.s., 1 of them missing, first drive.mcap"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_none_is_named_with_the_way_out(tmp_path, damage):
    break_, text = DAMAGES[damage]
    path = drive(tmp_path / "drive", num=3)
    break_(path / "drive.mcap")
    with pytest.raises(DataError, match=text) as caught, open_bag(path, "town/drive"):
        pass
    assert str(caught.value).startswith("town/drive")
    assert len(str(caught.value).splitlines()) == 1


METADATA = {
    "storage_identifier: mcap": ("storage_identifier: ''", "storage_identifier is '', expected 'mcap' or 'sqlite3'"),
    "serialization_format: cdr": ("serialization_format: x", "serialization_format of /odom is 'x', expected 'cdr'"),
    "relative_file_paths": ("files", "metadata.yaml: can't be read: KeyError 'relative_file_paths'"),
    "rosbag2_bagfile_information": ("[", "metadata.yaml: can't be read: ParserError"),
}


@pytest.mark.parametrize("old", METADATA)
def test_a_wrong_metadata_yaml_is_named_with_the_way_out(tmp_path, old):
    new, text = METADATA[old]
    path = drive(tmp_path / "drive", num=3)
    (path / "metadata.yaml").write_text((path / "metadata.yaml").read_text().replace(old, new))
    with pytest.raises(DataError, match=text) as caught, open_bag(path):
        pass
    assert "`ros2 bag" in str(caught.value)


def test_a_damaged_chunk_is_named_with_file_topic_and_time(tmp_path):
    path = drive(tmp_path / "drive")
    file = path / "drive.mcap"
    reader = McapReader(file)
    reader.open()
    chunk = reader.chunks[2]
    reader.close()
    data = bytearray(file.read_bytes())
    first_record = chunk.chunk_start_offset + 9 + 40
    data[first_record + 1:first_record + 9] = b"\xff" * 8  # its length
    file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_all(path)
    assert "drive: damaged at the message after 17000000" in str(caught.value)
    assert "us of /odom, /points, /silent: " in str(caught.value)
    assert "ros2 bag reindex" in str(caught.value) or "mcap recover" in str(caught.value)


def test_messages_that_the_index_counts_and_no_chunk_gives_are_an_error(tmp_path):
    """rosbags skips messages outside their chunk's times, and chunks without message indexes, and says nothing."""
    path = drive(tmp_path / "drive")
    file = path / "drive.mcap"
    reader = McapReader(file)
    reader.open()
    start, end, *place = reader.chunks[2][:4]
    reader.close()
    data = file.read_bytes()
    in_index = struct.pack("<QQQQ", start, end, *place)
    assert data.count(in_index) == 1
    file.write_bytes(data.replace(in_index, struct.pack("<QQQQ", end, end, *place)))
    with pytest.raises(DataError, match=r"drive: the index counts 40 messages of /odom, 3\d can be read; "):
        read_all(path)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3", "ros1"])
def test_no_flipped_byte_leaks_an_error_of_the_library(tmp_path, storage):
    """Eighty copies, each with three bits flipped or cut short: they are read, or a DataError says why not."""
    if storage == "ros1":
        types = ROS1_STORE.types
        numbers = [types["std_msgs/msg/Float64"](data=float(k)) for k in range(20)]
        path = file = tinybags.write_ros1(tmp_path / "a.bag", [("/n", T0_NS + k, n) for k, n in enumerate(numbers)])
    else:
        events = [("/odom", T0_NS + k, tinybags.odometry(T0_US + k, (k, 0, 0), 0.0)) for k in range(20)]
        path = tinybags.write(tmp_path / "drive", events, storage)
        file = next(p for p in path.iterdir() if p.suffix != ".yaml")
    whole, dice = file.read_bytes(), np.random.default_rng(5)
    refusals = []
    for trial in range(80):
        damaged = bytearray(whole)
        for at in dice.integers(0, len(whole), 3):
            damaged[at] ^= 1 << int(dice.integers(8))
        file.write_bytes(damaged if trial % 4 else damaged[:int(dice.integers(len(whole)))])
        try:
            with open_bag(path) as bag:
                for message in bag.messages(bag.topics):
                    bag.sensor_us(message)
                    bag.decode(message)
        except DataError as error:
            refusals.append(str(error))
    assert 10 < len(refusals) < 80
    assert max(len(text.splitlines()) for text in refusals) <= 3
    assert max(map(len, refusals)) < 600


def test_a_definition_that_lacks_an_expected_field_is_named(tmp_path):
    path = drive(tmp_path / "drive", num=1)
    file = path / "drive.mcap"
    file.write_bytes(file.read_bytes().replace(b"child_frame_id", b"child_fraem_id"))
    with (pytest.raises(DataError, match="drive: its nav_msgs/msg/Odometry has no field 'child_frame_id': that "),
          open_bag(path) as bag):
        assert bag.decode(next(bag.messages(["/odom"]))).child_frame_id == "base_link"


def test_a_failing_disk_is_not_the_recordings_fault(tmp_path, monkeypatch):
    path = drive(tmp_path / "drive", num=3)

    def broken(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(McapReader, "open", broken)
    with pytest.raises(OSError, match="Input/output error"), open_bag(path):
        pass


# real recordings --------------------------------------------------------------------------------------------------
GOOD = {"ros1_rosbagjs/example-unsorted-chunks.bag", "ros2_no_metadata_mcap/multiple_files_0.mcap",
        "ros2_no_metadata_mcap/multiple_files_1.mcap", "ros2_no_metadata_mcap/multiple_files_2.mcap",
        "ros2_no_metadata_sqlite/multiple_files_0.db3", "ros2_no_metadata_sqlite/multiple_files_1.db3",
        "ros2_no_metadata_sqlite/multiple_files_2.db3"}
EMPTY = {"ros1_rosbagjs/no-messages.bag", "ros2_empty_bag", "ros2_empty_bag/empty_bag_0.db3"}
ROOT = Path(os.environ.get("ROADMILL_REAL_DATA", "/nowhere")) / "bad_inputs"
CASES = sorted(path.relative_to(ROOT).as_posix() for kind in ("real", "derived") for path in (ROOT / kind).rglob("*")
               if path.is_dir() or path.suffix in (".mcap", ".db3", ".bag", ".txt", ".jpg", ".bin", ".mp4"))


@pytest.mark.parametrize("case", CASES or ["none"])
def test_real_broken_recordings_are_read_or_give_a_data_error_of_three_lines_at_most(real_data, case):
    path, name = real_data / "bad_inputs" / case, case.partition("/")[2]
    problems, num = set(), 0
    try:
        with open_bag(path, name) as bag:
            for message in bag.messages(bag.topics):
                num += 1
                try:
                    bag.sensor_us(message)
                    bag.decode(message)
                except DataError as error:
                    problems.add(str(error))
    except DataError as error:
        problems.add(str(error))
    assert (not problems and num > 0) == (name in GOOD)
    assert (not problems and num == 0) == (name in EMPTY)
    for text in problems:
        assert text.startswith(name)
        assert len(text.splitlines()) <= 3
        assert "`" in text, "no way out is named"


def test_real_truncated_mcap_is_named_with_place_and_way_out(real_data):
    with (pytest.raises(DataError) as caught,
          open_bag(real_data / "bad_inputs/derived/radiate_mcap_truncated", "radiate_mcap_truncated")):
        pass
    assert str(caught.value) == (
        "radiate_mcap_truncated/radiate_fog6_ros2_mcap.mcap: ends early, at byte 3000000 without the MCAP end mark "
        "(a broken copy, or a recorder that was cut off); copy it again, or `mcap recover IN.mcap -o OUT.mcap` saves "
        "what is readable")


def test_definitions_that_cannot_be_parsed_spoil_their_own_topics_only(real_data):
    """rosbags' own reader refuses the whole recording for them."""
    with open_bag(real_data / "bad_inputs/real/ros2_mcap_service_events") as bag:
        message = next(bag.messages(["/test_topic1"]))
        assert hasattr(bag.decode(message), "string_value")
        service = next(bag.messages(["/test_service1/_service_event"]))
        with pytest.raises(DataError, match="definition of test_msgs/srv/BasicTypes_Event can't be read"):
            bag.decode(service)


def test_a_native_ros1_bag_is_read_with_its_sensor_times(real_data):
    with open_bag(real_data / "drives/husky_outdoor.bag") as bag:
        assert {t.name: t.count for t in bag.topics.values()} == {
            "/fix": 989, "/husky_velocity_controller/odom": 3952, "/imu/data": 11865}
        message = next(bag.messages(["/fix"]))
        assert bag.sensor_us(message) == stamp_us(bag.decode(message).header) == 1_432_235_498_039_089
