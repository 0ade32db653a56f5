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
