"""Drives that come as video files with side files of stamps, beside a bag of the other sensors."""

from __future__ import annotations

import contextlib
import errno
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stages.lib import sidefiles, video
from stages.lib.bagfiles import MAGIC
from stages.lib.errors import DataError
from stages.lib.video import Film
from stages.lib.videodrive import open_drive
from stages.store.sources import FolderSource, Hashes, describe, discover, locate
from tests import tinyvideo
from tests.test_video import FIRST_US, NUM, STREAMS, Scene, drive, sent, stamp_us
from tests.tinydrive import record, stream, with_rig
from tests.tinyvideo import number_of, numbered


def rig(video: str, **changed: Any) -> dict[str, Any]:
    return with_rig(channels__CAM_FRONT__topic=video, channels__CAM_FRONT__info_topic="front.camera_info.yaml",
                    channels__CAM_FRONT__rate_hz=30.0, **changed)


def stamps_text(stamps_us: list[int], head: str = "stamp_us\n", scale: str = "{}") -> str:
    return head + "".join(scale.format(one) + "\n" for one in stamps_us)


STAMPS = [stamp_us(number) for number in range(NUM)]


def folder(path: Path, suffix: str, codec: str = "h264", num_b: int = 0, *, text: str = stamps_text(STAMPS),
           audio_first: bool = False) -> Path:
    """A drive of one video file, its stamps and calibration, and the bag of the others."""
    path.mkdir()
    tinyvideo.write_file(path / f"front{suffix}", codec, STREAMS[codec][num_b], audio_first)
    (path / "front.timestamps.csv").write_text(text)
    tinyvideo.write_camera_info(path / "front.camera_info.yaml")
    others = {topic: messages for topic, messages in stream().items() if not topic.startswith("/cam")}
    record(path / "bag", others)
    return path


@pytest.mark.parametrize(("suffix", "codec", "num_b"), [
    (".mp4", "h264", 0), (".mp4", "h264", 3), (".mp4", "hevc", 3), (".mkv", "h264", 3), (".mkv", "hevc", 0),
    (".mkv", "hevc", 3), (".hevc", "hevc", 0), (".h264", "h264", 0)])
def test_every_picture_of_a_file_has_the_stamp_of_its_row(tmp_path, suffix, codec, num_b):
    recording = folder(tmp_path / "drive", suffix, codec, num_b)
    scene = Scene(recording, tmp_path, rig(f"front{suffix}"))
    assert scene.numbers() == list(range(NUM))
    faults = scene.ingested.faults()
    assert faults.pop(("reordered", "CAM_FRONT"), 0) == (NUM if num_b else 0)
    assert faults == {("unstamped", "signals"): 5}


@pytest.mark.parametrize(("suffix", "codec", "num_b"), [
    (".mp4", "h264", 0), (".mp4", "hevc", 3), (".mkv", "h264", 3), (".hevc", "hevc", 0)])
def test_a_scene_in_the_middle_of_a_file_is_decoded_from_the_key_frame_before_it(tmp_path, suffix, codec, num_b):
    recording = folder(tmp_path / "drive", suffix, codec, num_b)
    scene = Scene(recording, tmp_path, rig(f"front{suffix}"), span_us=(stamp_us(47), stamp_us(90)))
    assert scene.numbers() == list(range(47, 90))
    assert scene.facts["num_decoded_pictures"] <= 90 - 30 + 3


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_open_groups_of_pictures_in_a_file_are_whole_too(tmp_path, codec):
    recording = folder(tmp_path / "drive", ".mp4", codec, 3)
    tinyvideo.write_file(recording / "front.mp4", codec, numbered(codec, NUM, num_b=4, options=":open-gop=1:b-adapt=0"))
    scene = Scene(recording, tmp_path, rig("front.mp4"), span_us=(stamp_us(47), stamp_us(90)))
    assert scene.numbers() == list(range(47, 90))


def test_the_video_need_not_be_the_first_stream(tmp_path):
    scene = Scene(folder(tmp_path / "drive", ".mp4", audio_first=True), tmp_path, rig("front.mp4"))
    assert scene.numbers() == list(range(NUM))


def test_a_drive_of_files_equals_the_same_drive_with_a_topic(tmp_path):
    for name in ("file", "topic"):
        (tmp_path / name).mkdir()
    one = Scene(folder(tmp_path / "file" / "drive", ".mkv", "h264", 3), tmp_path / "file", rig("front.mkv"))
    two = Scene(drive(tmp_path / "topic" / "drive", sent(STREAMS["h264"][3])), tmp_path / "topic")
    for table in ("sample", "ego_pose", "calibrated_sensor", "trajectory", "signals"):
        assert one.table(table).equals(two.table(table)), table
    first, second = one.images(), two.images()
    assert first.keys() == second.keys()
    assert all((first[at_us] == second[at_us]).all() for at_us in first)


def test_the_cost_of_a_window_does_not_grow_with_its_place_in_the_file(tmp_path):
    recording = folder(tmp_path / "drive", ".mp4")
    with open_drive(recording) as opened:
        rows = list(opened.messages(["front.mp4"]))
        late = list(opened.messages(["front.mp4"], rows[80].receive_ns, rows[85].receive_ns))
        assert [message.data for message in late] == [message.data for message in rows[80:85]]
        film = opened._reels["front.mp4"].film
        assert next(film.packets(rows[85].pts))[0] == rows[80].pts


@pytest.mark.parametrize(("head", "scale"), [
    ("", "{}"), ("stamp_us\n", "{}"), ("", "{}000"), ("#timestamp [ns]\n", "{}000"),
    ("frame,timestamp_ns\n", "0,{}000"), ("# time_us\n", "{}.0"), ("\ufeffstamp_us\n", "{}")])
def test_stamps_are_read_in_the_forms_that_people_write(tmp_path, head, scale):
    (tmp_path / "x.csv").write_text(stamps_text(STAMPS, head, scale))
    assert sidefiles.read_stamps(tmp_path / "x.csv", "x.csv") == STAMPS


def test_stamps_in_seconds_are_read_without_loss(tmp_path):
    (tmp_path / "x.txt").write_text("1700000000.300001\n1700000000.333334\n")
    assert sidefiles.read_stamps(tmp_path / "x.txt", "x.txt") == [1_700_000_000_300_001, 1_700_000_000_333_334]


WRONG_STAMPS = {
    "x.csv: is empty; write one row a picture": "\n",
    "x.csv: is empty; write one row a picture, under the column name stamp_us": "stamp_us\n",
    "x.csv: is no text in UTF-8; write one row a picture, under the column name stamp_us": b"\xff\xfe5\0",
    "x.csv: NaN us is no time from 1970 to 2106; write one row a picture": "stamp_us\n5\nnan\n",
    "x.csv: Infinity s is no time from 1970 to 2106": "stamp_s\n5\ninf\n",
    "x.csv: -5 us is no time from 1970 to 2106": "stamp_us\n-5\n",
    "x.csv: 4294967296000 ms is no time from 1970 to 2106": "stamp_ms\n5\n4294967296000\n",
    "x.csv: 1E+999999999 us is no time from 1970 to 2106": "stamp_us\n1e999999999\n",
    "x.csv: 0 of its columns (frame, number) are named as stamps are; call one of them stamp_us": "frame,number\n1,2\n",
    "x.csv: has 2 columns without names; write names above, stamp_us one of them": "1,2\n",
    "x.csv: holds a row that is no number": "stamp_us\n5\nsix\n",
    "x.csv: the unit of its stamps (12) is not known; name their column stamp_s, stamp_ms, stamp_us or stamp_ns":
        "12\n13\n"}


WRONG_INFO = ("camera_name: cam\nimage_width: 160\nimage_height: 96\ndistortion_model: plumb_bob\n"
              "camera_matrix: {{data: {K}}}\ndistortion_coefficients: {{data: [0, 0, 0, 0, 0]}}\n")


@pytest.mark.parametrize("text", WRONG_STAMPS)
def test_what_is_wrong_with_a_file_of_stamps_is_named(tmp_path, text):
    content = WRONG_STAMPS[text]
    (tmp_path / "x.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(text)):
        sidefiles.read_stamps(tmp_path / "x.csv", "x.csv")


def test_as_many_stamps_as_pictures_are_wanted(tmp_path):
    recording = folder(tmp_path / "drive", ".mp4", text=stamps_text(STAMPS[:-1]))
    with pytest.raises(DataError, match=r"drive/front.mp4: 96 pictures, but 95 stamps in drive/front.timestamps.csv: "
                                        r"which picture has none is not known; write one row a picture"):
        Scene(recording, tmp_path, rig("front.mp4"))


def test_a_raw_stream_with_reordered_pictures_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"its pictures are reordered \(B-frames\), but its stamps increase"):
        Scene(folder(tmp_path / "drive", ".hevc", "hevc", 3), tmp_path, rig("front.hevc"))


def test_a_file_that_is_no_video_or_of_another_codec_is_named(tmp_path):
    recording = folder(tmp_path / "drive", ".mp4")
    (recording / "front.mp4").write_bytes(b"no video at all" * 99)
    with pytest.raises(DataError, match=r"drive/front.mp4: is no video that can be read: Invalid data found(.|\n)*"
                                        r"ffmpeg -i IN -c copy OUT.mkv"):
        Scene(recording, tmp_path, rig("front.mp4"))


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "h264"), (".mkv", "hevc")])
def test_a_damaged_file_is_read_or_named_and_never_the_machines_fault(tmp_path, suffix, codec):
    """libav says EPERM, EIO and ENOMEM of damaged files, and has texts that are none."""
    path = tinyvideo.write_file(tmp_path / f"x{suffix}", codec, STREAMS[codec][3][:20])
    whole, said = path.read_bytes(), set()
    begin, end = (whole.rfind(b"moov"), len(whole)) if suffix == ".mp4" else (0, 700)
    for seed in range(120):
        dice, damaged = np.random.default_rng(seed), bytearray(whole)
        for place in dice.integers(begin, end, 4):
            damaged[place] = dice.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            said.add(sum(1 for _ in Film(path, "x").packets()))
    assert 20 in said


def test_a_disk_that_fails_is_not_the_files_fault(tmp_path, monkeypatch):
    path = tinyvideo.write_file(tmp_path / "x.mp4", "h264", STREAMS["h264"][0][:2])

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(video.av, "open", lambda *_, **__: (_ for _ in ()).throw(
        av.error.OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        Film(path, "x")


def test_two_bags_in_one_drive_are_an_error(tmp_path):
    recording = folder(tmp_path / "drive", ".mp4")
    (recording / "other.mcap").write_bytes(MAGIC[".mcap"])
    with pytest.raises(DataError, match=r"drive: has 2 bags \(bag, other.mcap\), a drive of video files has one"):
        Scene(recording, tmp_path, rig("front.mp4"))


def test_a_calibration_that_lacks_something_is_named(tmp_path):
    recording = folder(tmp_path / "drive", ".mp4")
    (recording / "front.camera_info.yaml").write_text("camera_name: cam\n")
    with pytest.raises(DataError, match=r"front.camera_info.yaml: is not a calibration as ROS' camera_calibration "
                                        r"writes it \(KeyError 'image_width'\)"):
        Scene(recording, tmp_path, rig("front.mp4"))


@pytest.mark.parametrize("text", [
    "\xff", "", "[1, 2]", "[" * 100_000, WRONG_INFO.format(K="[1, 2]"), WRONG_INFO.format(K="5"),
    WRONG_INFO.format(K="[x]")], ids=["no text", "empty", "a list", "deep", "short", "a number", "a word"])
def test_a_calibration_of_any_other_shape_is_named(tmp_path, text):
    (tmp_path / "x.yaml").write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=r"x.yaml: is not a calibration as ROS' camera_calibration writes it"):
        sidefiles.read_camera_info(tmp_path / "x.yaml", "x.yaml")


def test_a_folder_of_videos_with_stamps_is_one_recording_and_a_video_without_them_is_none(tmp_path):
    (tmp_path / "drives").mkdir()
    folder(tmp_path / "drives" / "one", ".mp4")
    (tmp_path / "drives" / "loose.mp4").write_bytes(b"x")
    source = FolderSource(tmp_path / "drives", Hashes(tmp_path))
    recordings = discover(source.files(), source)
    assert list(recordings) == ["one"]
    found = describe(source, "one", recordings["one"], "tiny")
    assert locate(found, [source]) == tmp_path / "drives" / "one"
    assert [name for name, _, _ in found.members if "/" not in name] == [
        "front.camera_info.yaml", "front.mp4", "front.timestamps.csv"]


def test_a_real_dashcam_goes_from_ingest_to_samples(real_data, tmp_path):
    """H.264, 960x540, 25 Hz, 221 pictures, sound first; its stamps are made here."""
    recording = folder(tmp_path / "drive", ".mp4")
    (recording / "front.mp4").write_bytes((real_data / "video/dashcam_h264.mp4").read_bytes())
    stamps_us = [FIRST_US + 14_000 * number for number in range(221)]
    (recording / "front.timestamps.csv").write_text(stamps_text(stamps_us))
    tinyvideo.write_camera_info(recording / "front.camera_info.yaml", (960, 540))
    scene = Scene(recording, tmp_path, rig("front.mp4"), image_width_px=480)
    shown = scene.images()
    assert list(shown) == [at_us for at_us in stamps_us if at_us in shown]
    assert len(shown) == 221
    assert {pixels.shape for pixels in shown.values()} == {(270, 480, 3)}
    assert number_of(shown[FIRST_US]) == -1
