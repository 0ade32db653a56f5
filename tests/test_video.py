"""Video cameras from packets to nuScenes images: every picture carries its number, so a wrong stamp can't hide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from stages import sample
from stages.lib import bag, images, knobs, nal, pack, tables
from stages.lib.calibration import Video
from stages.lib.errors import DataError
from stages.lib.stage import Item
from stages.lib.video_files import VideoPictures
from tests import tinyvideo
from tests.tinybags import T0_US
from tests.tinydrive import Ingested, record, stream, with_rig
from tests.tinyvideo import Packet, number_of, numbered

CONF = yaml.safe_load((Path(__file__).parents[1] / "conf/sample/default.yaml").read_text())
PERIOD_US = 33_333
FIRST_US = T0_US + 300_000
NUM = 96
RIG = with_rig(channels__CAM_FRONT__rate_hz=30.0, channels__CAM_FRONT__max_gap_us=350_000)
NOT_REQUIRED = with_rig(channels__CAM_FRONT__rate_hz=30.0, channels__CAM_FRONT__required=False)
STREAMS = {codec: {num_b: numbered(codec, NUM, num_b=num_b) for num_b in (0, 3)} for codec in ("h264", "hevc")}

Sent = list[tuple[int, int, bytes]]
"""(stamp [us], receive time after T0 [us], packet)."""


def stamp_us(number: int) -> int:
    return FIRST_US + PERIOD_US * number


def sent(packets: Iterable[Packet]) -> Sent:
    """Each packet with its own picture's stamp, in decoding order, one period after another."""
    return [(stamp_us(packet.number), FIRST_US + PERIOD_US * turn, packet.data) for turn, packet in enumerate(packets)]


def drive(path: Path, what: Sent, kind: str = "video", codec: str = "h264") -> Path:
    """The tiny drive with these packets as its camera."""
    topics = stream()
    topics["/cam_info"] = [(FIRST_US, tinyvideo.camera_info(FIRST_US))]
    topics["/cam"] = [(at_us, tinyvideo.message(kind, codec, data, own_us)) for own_us, at_us, data in what]
    return record(path, topics)


class Scene:
    """A drive that went through ingest and sample."""

    def __init__(self, recording: Path, out: Path, rig: dict[str, Any] = RIG, span_us: tuple[int, int] | None = None,
                 **changed: Any) -> None:
        self.ingested = Ingested(recording, out / "ingest", rig)
        start_us, end_us = span_us or self.ingested.interval_us
        params = {"scene_token": "5" * 32, "scene_name": "drive-1", "drive_token": "d" * 32, "drive_name": "drive",
                  "start_us": start_us, "end_us": end_us, "pose_gaps_us": []}
        inputs = {"recording": recording, "calibration": self.ingested.out / "calibration.json",
                  **{name: self.ingested.out / f"{name}.parquet" for name in ("trajectory", "index", "signals")}}
        self.out = out / "sample"
        self.out.mkdir()
        self.facts = sample.run(knobs.load(sample.Knobs, CONF | {"motion_compensate": False} | changed, "sample"),
                                Item("drive-1", params, {}), inputs, self.out)

    def table(self, name: str) -> pl.DataFrame:
        return tables.read(self.out / f"{name}.parquet")

    def images(self, channel: str = "CAM_FRONT") -> dict[int, np.ndarray]:
        """Stamp -> pixels of each image in the pack."""
        rows = self.table("sample_data").filter(pl.col("channel") == channel).iter_rows(named=True)
        return {row["stamp_us"]: images.decode(pack.read_member(self.out / "pack.tar", row["offset"], row["bytes"]))
                for row in rows}

    def numbers(self) -> list[int]:
        """The numbers in the pictures; each must be that of its stamp."""
        found = {at_us: number_of(pixels) for at_us, pixels in self.images().items()}
        assert found == {at_us: (at_us - FIRST_US) // PERIOD_US for at_us in found}
        return sorted(found.values())


@pytest.fixture
def go(tmp_path) -> Callable[..., Scene]:
    def go_(what: Sent, kind: str = "video", codec: str = "h264", **options: Any) -> Scene:
        return Scene(drive(tmp_path / "drive", what, kind, codec), tmp_path, **options)
    return go_


# pairing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_b", [0, 3])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("kind", tinyvideo.KINDS)
def test_every_picture_has_the_stamp_of_its_own_packet(go, kind, codec, num_b):
    scene = go(sent(STREAMS[codec][num_b]), kind, codec)
    assert scene.numbers() == list(range(NUM))
    faults = scene.ingested.faults()
    assert faults.pop(("reordered", "CAM_FRONT"), 0) == (NUM if num_b else 0)
    assert faults == {("unstamped", "signals"): 5}
    assert scene.facts["num_lost_pictures"] == 0


def test_several_rates_come_from_one_decode_and_nothing_else_is_kept(go):
    """Key frames at 2 Hz and sweeps at 10 Hz of a 30 Hz stream: a third of the pictures; each is decoded once."""
    scene = go(sent(STREAMS["h264"][0]), camera_sweep_hz=10.0)
    rows = scene.table("sample_data").filter(pl.col("channel") == "CAM_FRONT")
    assert 30 <= len(scene.numbers()) <= 36
    assert len(rows.filter("is_key_frame")) == len(scene.table("sample"))
    assert scene.facts["num_decoded_pictures"] <= NUM


@pytest.mark.parametrize(("codec", "num_b"), [("h264", 0), ("h264", 3), ("hevc", 3)])
def test_only_what_leads_to_a_wanted_picture_is_decoded(tmp_path, codec, num_b):
    scene = Scene(drive(tmp_path / "drive", sent(STREAMS[codec][num_b]), codec=codec), tmp_path, camera_sweep_hz=0)
    numbers = scene.numbers()
    assert len(numbers) == len(scene.table("sample"))
    packets, needed = STREAMS[codec][num_b], set()
    for turn, packet in enumerate(packets):
        if packet.number in numbers:
            key = max(at for at, one in enumerate(packets) if one.is_key and one.number <= packet.number)
            needed |= {at for at in range(key, turn) if not disposable(codec, packets[at].data)} | {turn}
    assert scene.facts["num_decoded_pictures"] == len(needed) < NUM * 2 / 3


@pytest.mark.parametrize("options", ["", ":open-gop=1"], ids=["closed", "open"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_decoding_begins_at_the_key_frame_before_the_scene(tmp_path, codec, options):
    """The scene begins at picture 47, 7 after a key frame. Open: four B-frames that lead the key frame come after it,
    others build on one of them, and none of them can be decoded from there."""
    packets = numbered(codec, NUM, num_b=4, options=options + ":b-adapt=0")
    scene = Scene(drive(tmp_path / "drive", sent(packets), codec=codec), tmp_path,
                  span_us=(stamp_us(47), stamp_us(90)))
    assert scene.numbers() == list(range(47, 90))
    assert scene.facts["num_decoded_pictures"] <= 90 - 30 + 3
    row = scene.ingested.table("index").filter(pl.col("stamp_us") == stamp_us(47)).row(0, named=True)
    assert FIRST_US + 35 * PERIOD_US <= row["decode_from_ns"] // 1000 - 10_000 <= FIRST_US + 40 * PERIOD_US


def test_parameter_sets_may_come_once_or_in_a_message_of_their_own(tmp_path):
    packets = STREAMS["h264"][0]
    for number, (where, how) in enumerate([("first", False), ("first", True), ("each", True)]):
        what: Sent = []
        for at, packet in enumerate(packets):
            units = nal.units(packet.data)
            sets = b"".join(nal.START + unit for unit in units if unit[0] & 31 in (7, 8))
            rest = b"".join(nal.START + unit for unit in units if unit[0] & 31 not in (7, 8))
            own = (stamp_us(packet.number), FIRST_US + PERIOD_US * at)
            kept = sets if where == "each" or at == 0 else b""
            what += [(own[0] - 1, own[1] - 1, kept), (*own, rest)] if how and kept else [(*own, kept + rest)]
        folder = tmp_path / str(number)
        folder.mkdir()
        scene = Scene(drive(folder / "drive", what), folder, span_us=(stamp_us(47), stamp_us(90)))
        assert scene.numbers() == list(range(47, 90))
        assert scene.ingested.faults() == {("unstamped", "signals"): 5}


# what can be wrong ------------------------------------------------------------------------------------------------
NO_KEYS = {"p-frames": sent(STREAMS["h264"][0])[1:10], "not Annex B": [
    (at, at, b"\0\0\0\x0cnot annex b") for at in range(FIRST_US, FIRST_US + 9)]}


@pytest.mark.parametrize("what", NO_KEYS.values(), ids=NO_KEYS)
def test_a_stream_without_a_key_frame_is_named(go, what):
    with pytest.raises(DataError, match=r"CAM_FRONT \(/cam, first message\): video without a key frame \(with its "
                                        r"parameter sets\) in 9 messages(, 9 of them not Annex B)?: decoding can begin "
                                        r"nowhere; set the encoder to send one every second"):
        go(what)


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_pictures_before_the_first_key_frame_are_left_out(go, codec):
    scene = go(sent(STREAMS[codec][0])[4:], codec=codec)
    assert scene.numbers() == list(range(10, NUM))
    assert scene.ingested.faults()["undecodable", "CAM_FRONT"] == 6


@pytest.mark.parametrize("num_b", [0, 3])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_after_a_lost_packet_nothing_is_kept_until_the_next_key_frame(go, codec, num_b):
    """What is left builds on a picture that is not there: the one after the fourth key picture, in decoding order."""
    packets = STREAMS[codec][num_b]
    key = [number for number, packet in enumerate(packets) if packet.is_key][3]
    following = next(number for number, packet in enumerate(packets) if packet.is_key and number > key)
    lost = next(number for number in range(key + 1, following) if not disposable(codec, packets[number].data))
    scene = go(sent(packets[:lost] + packets[lost + 1:]), codec=codec)
    gone = {packet.number for packet in packets[lost:] if packet.number < packets[following].number}
    assert scene.numbers() == sorted(set(range(NUM)) - gone)
    faults = scene.ingested.faults()
    assert faults["lost_packet", "CAM_FRONT"] == 1
    assert faults["undecodable", "CAM_FRONT"] == len(gone) - 1


def disposable(codec: str, data: bytes) -> bool:
    """By the header of its slice: nal_ref_idc is 0, or a sub-layer non-reference picture."""
    first = next(unit for unit in nal.units(data) if (unit[0] & 31 in (1, 5) if codec == "h264" else unit[0] >> 1 < 32))
    return not first[0] & 0x60 if codec == "h264" else first[0] >> 1 < 16 and first[0] >> 1 & 1 == 0


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_a_lost_packet_that_nothing_builds_on_costs_itself(go, codec):
    packets = STREAMS[codec][3]
    lost = next(number for number, packet in enumerate(packets) if number > 33 and disposable(codec, packet.data))
    scene = go(sent(packets[:lost] + packets[lost + 1:]), codec=codec)
    assert scene.numbers() == sorted(set(range(NUM)) - {packets[lost].number})


def cut_off(packets: list[Packet], damaged: Iterable[int]) -> Sent:
    """Half of these pictures is gone: their headers are sound, so only decoding shows it."""
    what = sent(packets)
    for number in damaged:
        own_us, at_us, data = what[number]
        what[number] = own_us, at_us, data[:len(data) // 2]
    return what


def test_what_builds_on_a_damaged_packet_is_lost_and_counted_and_the_rest_is_right(go):
    """33 is damaged, 40 is the next key frame."""
    scene = go(cut_off(STREAMS["h264"][0], [33]), rig=NOT_REQUIRED)
    assert scene.numbers() == [number for number in range(NUM) if not 33 <= number < 40]
    assert scene.facts["num_lost_pictures"] == 7


def test_pictures_that_come_out_before_the_damaged_one_they_build_on_are_not_kept(go):
    """A damaged P picture is displayed after the B pictures that build on it: they come out first, and seem sound."""
    packets = STREAMS["h264"][3]
    damaged = next(turn for turn, packet in enumerate(packets) if turn > 33 and not packet.is_key
                   and not disposable("h264", packet.data) and packets[turn + 1].number < packet.number)
    following = next(turn for turn, packet in enumerate(packets) if packet.is_key and turn > damaged)
    gone = {packet.number for packet in packets[damaged:following]}
    scene = go(cut_off(packets, [damaged]), rig=NOT_REQUIRED)
    assert scene.numbers() == sorted(set(range(NUM)) - gone)
    assert scene.facts["num_lost_pictures"] == len(gone)


class Fed:
    """Stands in for a bag: the messages are the packets."""

    @staticmethod
    def decode(message: bag.Message) -> Any:
        return SimpleNamespace(data=np.frombuffer(message.data, np.uint8))

    @staticmethod
    def shown_us(message: bag.Message) -> int:
        return message.receive_ns // 1000


def test_what_h265_lacks_only_in_decoding_is_lost_too_until_the_next_key_frame():
    """An index that knows nothing of the loss of 33: decoding says so of 34 to 39."""
    packets = STREAMS["hevc"][0]
    headers = nal.Pictures("hevc")
    headers.push(packets[0].data)
    rows = [{"receive_ns": 1000 * number, "seq": 0, "decode_from_ns": 10_000 * (number // 10)} for number in range(NUM)]
    counts = Counter()
    pictures = VideoPictures(Video("hevc", headers.headers), rows[:33] + rows[34:], counts)
    found = []
    for number in [*range(33), *range(34, NUM)]:
        found += pictures.push(Fed, bag.Message("/cam", "", 1000 * number, 0, packets[number].data))
    found += pictures.rest()
    assert [row["receive_ns"] // 1000 for row, _ in found] == [number for number in range(NUM) if not 33 <= number < 40]
    assert all(number_of(picture.rgb()) == row["receive_ns"] // 1000 for row, picture in found)
    assert counts["num_lost_pictures"] == 6


@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("options", ["", ":open-gop=1", ":ref=4", ":b-adapt=0"])
@pytest.mark.parametrize("num_b", [0, 2, 4])
def test_a_missing_picture_is_seen_in_the_headers_of_those_that_build_on_it_and_nowhere_else(codec, options, num_b):
    packets = numbered(codec, 60, gop=24, num_b=num_b, options=options)
    for lost in [None, *range(26, 40)]:
        stream = nal.Pictures(codec)
        pictures = [stream.push(packet.data)[0] for turn, packet in enumerate(packets) if turn != lost]
        seen = not all(picture.follows for picture in pictures)
        assert seen == (lost is not None and not disposable(codec, packets[lost].data)), lost


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_bytes_that_are_damaged_anywhere_are_read_without_an_exception(codec):
    dice, num_pictures, num_broken = np.random.default_rng(3), 0, 0
    for _ in range(40):
        stream = nal.Pictures(codec)
        for packet in STREAMS[codec][3][:24]:
            data = np.frombuffer(packet.data, np.uint8).copy()
            where = dice.integers(3, min(len(data), 120), 6)
            data[where] = dice.integers(0, 256, 6)
            found = stream.push(data[:dice.integers(4, len(data))].tobytes() if dice.random() < 0.2 else data.tobytes())
            num_pictures += len(found)
            num_broken += not found or not all(picture.follows for picture in found)
    assert num_pictures > 40 * 24 / 2, "most still begin as pictures do"
    assert num_broken > 0


def test_picture_numbers_go_round_within_a_long_group_of_pictures():
    """H.265 keeps 8 bits of a picture's number here, H.264 fewer."""
    for codec in ("h264", "hevc"):
        stream = nal.Pictures(codec)
        packets = numbered(codec, 300, size_px=(64, 64), gop=300, num_b=2)
        assert all(stream.push(packet.data)[0].follows for packet in packets)


def test_a_key_frame_that_needs_a_lost_picture_is_an_error_of_that_scene(go):
    what = cut_off(STREAMS["h264"][0], range(1, NUM, 10))
    with pytest.raises(DataError, match=r"drive: /cam at \d+ us: its video is damaged there, and a key frame needs "
                                        r"CAM_FRONT\n  say `required: false` of it in the rig, or go on without such "
                                        r"scenes: sample.max_failed_ratio"):
        go(what)


def test_pictures_of_another_size_are_left_out(go):
    packets = STREAMS["h264"][0]
    other = numbered("h264", NUM, size_px=(176, 112))
    scene = go(sent([*packets[:30], *other[30:50], *packets[50:]]))
    assert scene.numbers() == [number for number in range(NUM) if not 30 <= number < 50]
    assert scene.ingested.faults()["resized", "CAM_FRONT"] == 20


def test_a_first_picture_of_another_size_than_its_camera_info_is_an_error(go):
    with pytest.raises(DataError, match="its images are 176x112, its CameraInfo is for 160x96"):
        go(sent(numbered("h264", 12, size_px=(176, 112))))


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_the_second_picture_of_one_message_has_no_stamp_and_is_left_out(go, codec):
    what = sent(STREAMS[codec][0])
    own_us, at_us, data = what[20]
    what[20:22] = [(own_us, at_us, data + what[21][2])]
    scene = go(what, codec=codec)
    assert scene.numbers() == [number for number in range(NUM) if number != 21]
    assert scene.ingested.faults()["extra_picture", "CAM_FRONT"] == 1


def test_a_message_without_a_picture_is_broken_and_named(go):
    what = sent(STREAMS["h264"][0])
    what[25] = *what[25][:2], b"\0" * 40
    scene = go(what)
    assert scene.numbers() == [number for number in range(NUM) if not 25 <= number < 30]
    assert scene.ingested.faults()["broken_packet", "CAM_FRONT"] == 1


def test_reordered_pictures_with_stamps_in_the_order_of_packets_are_refused(go):
    what = [(stamp_us(turn), at_us, data) for turn, (_, at_us, data) in enumerate(sent(STREAMS["h264"][3]))]
    with pytest.raises(DataError, match=r"its pictures are reordered \(B-frames\), but its stamps increase from packet "
                                        r"to packet: which picture a stamp belongs to is not known"):
        go(what)


def test_video_of_another_codec_is_named(go):
    with pytest.raises(DataError, match=r"video of the codec 'av1', known are h264 and h265 \(hevc\)"):
        go(sent(STREAMS["h264"][0]), codec="av1")


def test_stamps_out_of_order_are_left_out_where_nothing_is_reordered(go):
    what = sent(STREAMS["h264"][0])
    what[44] = stamp_us(20) + 5, *what[44][1:]
    scene = go(what)
    assert scene.numbers() == [number for number in range(NUM) if number != 44]
    assert scene.ingested.faults()["backward", "CAM_FRONT"] == 1


# what comes out ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("matrix", "is_full"), [(0, None), (6, False), (6, True), (1, False), (1, True)])
def test_colours_are_those_of_the_matrix_and_range_that_the_stream_states(go, matrix, is_full):
    """Eight patches of known colours; a wrong matrix is off by 20 levels and more, a wrong range by 16."""
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200),
               (16, 16, 16), (240, 240, 240)]
    pixels = np.array(colours, np.uint8).reshape(2, 4, 3).repeat(48, 0).repeat(40, 1)
    what = sent(tinyvideo.encode("h264", [pixels] * 30, matrix=matrix, is_full=is_full))
    scene = go(what)
    for seen in scene.images().values():
        middles = seen[24::48, 20::40].reshape(8, 3).astype(int)
        assert np.abs(middles - colours).max() <= 5


def test_a_drive_with_video_equals_the_same_drive_with_jpegs_but_for_the_codec(tmp_path):
    """Poses, tokens, stamps, names and intrinsics are the same; pixels differ by what the codec lost."""
    both = []
    for name in ("jpeg", "video"):
        topics = stream()
        topics["/cam_info"] = [(FIRST_US, tinyvideo.camera_info(FIRST_US, D=(-0.2, 0.05, 0.0, 0.0, 0.0)))]
        topics["/cam"] = [(stamp_us(packet.number), tinyvideo.message("video", "hevc", packet.data,
                                                                       stamp_us(packet.number)))
                          for packet in STREAMS["hevc"][0]]
        if name == "jpeg":
            topics["/cam"] = [(stamp_us(number), tinyvideo.jpeg(number, stamp_us(number))) for number in range(NUM)]
        folder = tmp_path / name
        folder.mkdir()
        both.append(Scene(record(folder / "drive", topics), folder, camera_sweep_hz=10.0, image_width_px=80))
    for table in ("sample", "sample_data", "ego_pose", "calibrated_sensor", "trajectory", "signals"):
        first, second = (scene.table(table).drop("bytes", "offset", "pack_digest", strict=False) for scene in both)
        assert first.equals(second), table
    for (at_us, still), (same_us, shown) in zip(*(sorted(scene.images().items()) for scene in both)):
        assert at_us == same_us
        assert np.abs(still.astype(int) - shown).mean() < 4


def test_the_same_video_gives_the_same_bytes(tmp_path):
    recording = drive(tmp_path / "drive", sent(STREAMS["h264"][3]))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (Scene(recording, tmp_path / name) for name in ("one", "two"))
    assert one.facts == two.facts
    for path in [*one.out.iterdir(), *one.ingested.out.iterdir()]:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path.name


def test_ingest_shows_pictures_of_the_video(go):
    scene = go(sent(STREAMS["hevc"][3]), codec="hevc")
    assert "unreadable_picture" not in {fault for fault, _ in scene.ingested.faults()}
    assert images.decode((scene.ingested.out / "preview.jpg").read_bytes()).std() > 20
