"""OpenLABEL: what is written is read back, and what is malformed is said."""

import json
import math
from pathlib import Path

import polars as pl
import pytest

from stages.lib import openlabel
from stages.lib.errors import DataError

T0_US = 1_700_000_000_000_000


def boxes(*rows: tuple) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=openlabel.BOXES, orient="row")


CAR = (T0_US, "7", "vehicle.car", 10.0, -2.0, 0.75, 4.5, 1.9, 1.5, math.pi / 2, 0.0, 8.0)
LATER = (T0_US + 100_000, *CAR[1:])
WALKER = (T0_US, "12", "human.pedestrian.adult", 1.0, 2.0, 0.9, 0.5, 0.6, 1.8, -3.0, math.nan, math.nan)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    labels = openlabel.Labels(boxes(CAR, WALKER, LATER), ((T0_US, T0_US + 100_000), (T0_US + 500_000, T0_US + 900_000)))
    openlabel.write(labels, tmp_path / "drive.labels.json")
    return tmp_path / "drive.labels.json"


def test_a_box_is_written_with_w_last_and_length_first(file: Path) -> None:
    root = json.loads(file.read_text())["openlabel"]
    half = math.sqrt(0.5)
    cuboid = root["frames"]["0"]["objects"]["7"]["object_data"]["cuboid"][0]
    assert cuboid["val"] == pytest.approx([10, -2, 0.75, 0, 0, half, half, 4.5, 1.9, 1.5])
    assert cuboid["attributes"] == {"vec": [{"name": "velocity_mps", "val": [0.0, 8.0]}]}
    assert root["objects"]["7"] == {"name": "7", "type": "vehicle.car",
                                    "frame_intervals": [{"frame_start": 0, "frame_end": 1}]}
    assert root["frames"]["1"]["frame_properties"]["timestamp"] == T0_US + 100_000
    assert "attributes" not in root["frames"]["0"]["objects"]["12"]["object_data"]["cuboid"][0]


def test_what_is_written_is_read_back_and_written_to_the_same_bytes(file: Path, tmp_path: Path) -> None:
    labels = openlabel.read(file)
    assert labels.reviewed_us == ((T0_US, T0_US + 100_000), (T0_US + 500_000, T0_US + 900_000))
    assert labels.boxes["object_id"].to_list() == ["12", "7", "7"]
    for got, wanted in zip(labels.boxes.iter_rows(), (WALKER, CAR, LATER)):
        assert got[:3] == wanted[:3]
        assert got[3:] == pytest.approx(wanted[3:], nan_ok=True)
    openlabel.write(labels, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_a_reviewed_interval_without_boxes_is_kept(tmp_path: Path) -> None:
    openlabel.write(openlabel.Labels(boxes(), ((T0_US, T0_US + 1),)), tmp_path / "empty.json")
    labels = openlabel.read(tmp_path / "empty.json")
    assert labels.boxes.height == 0
    assert labels.reviewed_us == ((T0_US, T0_US + 1),)


def test_an_object_id_that_openlabel_does_not_allow_is_refused(tmp_path: Path) -> None:
    labels = openlabel.Labels(boxes((T0_US, "car 1", *CAR[2:])), ())
    with pytest.raises(ValueError, match="object id 'car 1', expected digits or a UUID"):
        openlabel.write(labels, tmp_path / "x.json")


CUBOID = ("frames", "0", "objects", "7", "object_data", "cuboid", 0)
MALFORMED = [
    (("metadata", "schema_version"), "0.3.0", "openlabel.metadata.schema_version is '0.3.0', expected '1.0.0'"),
    (("metadata",), None, "openlabel.metadata is missing, expected a JSON object"),
    (("frames",), [], "openlabel.frames is [], expected a JSON object"),
    (("frames", "0", "frame_properties", "timestamp"), 1.7e9, "frame_properties.timestamp is 1700000000.0"),
    (("frames", "1", "frame_properties", "timestamp"), T0_US, f"has object 7 twice at {T0_US} us"),
    (("objects", "7"), {}, "openlabel.frames.0.objects.7 has no type in openlabel.objects.7"),
    ((*CUBOID[:-1],), [], "object_data.cuboid is not a list of one cuboid"),
    ((*CUBOID, "coordinate_system"), "lidar", "coordinate_system is 'lidar', expected 'map'"),
    ((*CUBOID, "val"), [0.0] * 9, "(9 values), expected 10 numbers"),
    ((*CUBOID, "val"), [0, 0, 0, 0, 0, 0, 2, 1, 1, 1], "has the quaternion [0, 0, 0, 2]"),
    ((*CUBOID, "val"), [0, 0, 0, 0, 0, 0, 1, 1, 0, 1], "has the size [1, 0, 1]"),
    ((*CUBOID, "val"), [0, 0, 0, 0, 0, 0, 1, 1, "2", 1], "expected 10 numbers"),
    ((*CUBOID, "attributes"), {"vec": ["fast"]}, "attributes.vec is ['fast'], expected a list of objects"),
    ((*CUBOID, "attributes"), {"vec": [{"name": "velocity_mps", "val": [1]}]}, "(1 values), expected 2 or 3 numbers"),
    (("contexts", "0", "context_data", "vec", 0, "val"), [T0_US, T0_US - 5], f"'interval_us' is [{T0_US}, {T0_US - 5}"),
    (("contexts", "0", "context_data", "vec", 0, "val"), [T0_US + 0.5, T0_US + 5], "integers in µs, start before end"),
    (("contexts", "0", "context_data"), {}, "contexts.0 'interval_us' is missing, expected 2 numbers"),
    (("contexts", "0", "context_data", "vec", 0, "val", 1), T0_US + 500_001, "reviewed intervals that overlap at"),
]


@pytest.mark.parametrize(("keys", "value", "message"), MALFORMED)
def test_a_malformed_label_file_is_named_with_its_place(file: Path, keys: tuple, value: object, message: str) -> None:
    document = json.loads(file.read_text())
    parent = document["openlabel"]
    for key in keys[:-1]:
        parent = parent[key]
    if value is None:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        openlabel.read(file)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(file))
    assert text.endswith("then `roadmill scan` again")
    assert len(text.splitlines()) <= 3


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_not_json_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.labels.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.labels\.json: is not JSON .*\n  export it again"):
        openlabel.read(path)


def test_json_of_another_kind_is_said_to_lack_openlabel(tmp_path: Path) -> None:
    path = tmp_path / "x.labels.json"
    path.write_text('{"annotations": []}')
    with pytest.raises(DataError, match="openlabel is missing, expected a JSON object"):
        openlabel.read(path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"the file is \[\], expected a JSON object"):
        openlabel.read(path)
    with pytest.raises(DataError, match="not readable: No such file"):
        openlabel.read(tmp_path / "none.json")
