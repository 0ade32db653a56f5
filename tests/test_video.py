"""Video cameras from packets to nuScenes images: every picture carries its number, so a wrong stamp can't hide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from stages import sample
from stages.lib import images, knobs, nal, pack, tables
from stages.lib.errors import DataError
from stages.lib.stage import Item
from tests import tinydrive, tinyvideo
from tests.tinybags import T0_US
from tests.tinydrive import Ingested, record, stream, with_rig
from tests.tinyvideo import Packet, number_of, numbered

CONF = yaml.safe_load((Path(__file__).parents[1] / "conf/sample/default.yaml").read_text())
PERIOD_US = 33_333
FIRST_US = T0_US + 300_000
NUM = 96
RIG = with_rig(channels__CAM_FRONT__rate_hz=30.0, channels__CAM_FRONT__max_gap_us=350_000)
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


def test_pictures_that_nothing_wanted_builds_on_are_not_decoded(go):
    """Key frames at 2 Hz alone: up to 2 of 10 in a group of pictures is wanted, and B-frames between are not."""
    every = go(sent(STREAMS["h264"][3])).facts["num_decoded_pictures"]
    assert every == NUM


@pytest.mark.parametrize(("codec", "num_b"), [("h264", 0), ("h264", 3), ("hevc", 3)])
def test_only_what_leads_to_a_wanted_picture_is_decoded(tmp_path, codec, num_b):
    scene = Scene(drive(tmp_path / "drive", sent(STREAMS[codec][num_b]), codec=codec), tmp_path, camera_sweep_hz=0)
    numbers = scene.numbers()
    assert len(numbers) == len(scene.table("sample"))
    assert len(numbers) <= scene.facts["num_decoded_pictures"] < NUM * 2 / 3


@pytest.mark.parametrize("options", ["", ":open-gop=1"], ids=["closed", "open"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_decoding_begins_at_the_key_frame_before_the_scene(tmp_path, codec, options):
    """The scene begins at picture 47, 7 after a key frame; its messages before the scene are read, and no others."""
    packets = numbered(codec, NUM, num_b=3, options=options)
    scene = Scene(drive(tmp_path / "drive", sent(packets), codec=codec), tmp_path,
                  span_us=(stamp_us(47), stamp_us(90)))
    assert scene.numbers() == list(range(47, 90))
    assert scene.facts["num_decoded_pictures"] <= 90 - 30 + 3
    row = scene.ingested.table("index").filter(pl.col("stamp_us") == stamp_us(47)).row(0, named=True)
    assert FIRST_US + 37 * PERIOD_US <= row["decode_from_ns"] // 1000 - 10_000 <= FIRST_US + 40 * PERIOD_US


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
                                        r"parameter sets\) in 9 messages, so that decoding can begin nowhere"):
        go(what)


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_pictures_before_the_first_key_frame_are_left_out(go, codec):
    scene = go(sent(STREAMS[codec][0])[4:], codec=codec)
    assert scene.numbers() == list(range(10, NUM))
    assert scene.ingested.faults()["undecodable", "CAM_FRONT"] == 6


@pytest.mark.parametrize("num_b", [0, 3])
def test_after_a_lost_packet_nothing_is_kept_until_the_next_key_frame(go, num_b):
    """What is left builds on a picture that is not there. Lost is the reference picture two after the fourth key."""
    packets = STREAMS["h264"][num_b]
    key = [number for number, packet in enumerate(packets) if packet.is_key][3]
    lost = key + 1
    scene = go(sent(packets[:lost] + packets[lost + 1:]))
    gone = {packet.number for packet in packets[lost:] if packet.number < 40}
    assert scene.numbers() == sorted(set(range(NUM)) - gone)
    faults = scene.ingested.faults()
    assert faults["lost_packet", "CAM_FRONT"] >= 1
    assert faults["undecodable", "CAM_FRONT"] == len(gone) - 1


def test_a_lost_packet_that_nothing_builds_on_costs_itself(go):
    packets = STREAMS["h264"][3]
    lost = next(number for number, packet in enumerate(packets) if number > 33 and not packet.data[4] & 0x60)
    scene = go(sent(packets[:lost] + packets[lost + 1:]))
    assert scene.numbers() == sorted(set(range(NUM)) - {packets[lost].number})
