"""Labelled boxes and the intervals in which somebody looked, as ASAM OpenLABEL 1.0 JSON.

The subset that Roadmill writes and reads, all within the published schema 1.0.0:

    openlabel.metadata.schema_version        "1.0.0"
    openlabel.coordinate_systems.map         the one frame: every cuboid says coordinate_system "map"
    openlabel.contexts.<n>                   a reviewed interval: type "reviewed", context_data.vec "interval_us" with
                                             val [start, end): all objects in it are labelled, also where there are none
    openlabel.objects.<uid>                  uid is the object's id (digits or a UUID), type its category
    openlabel.frames.<n>.frame_properties    timestamp: an integer, µs since the Unix epoch
    openlabel.frames.<n>.objects.<uid>       object_data.cuboid, one: val = x, y, z, qx, qy, qz, qw, sx, sy, sz with the
                                             centre [m], w last, and sx the length; its attributes.vec "velocity_mps" is
                                             optional, val [vx, vy]

Source: ASAM OpenLABEL 1.0.0, openlabel_json_schema-v1.0.0.json.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from stages.lib import documents
from stages.lib.errors import DataError

VERSION = "1.0.0"
BOXES = {"stamp_us": pl.Int64, "object_id": pl.String, "category": pl.String,
         "x_m": pl.Float64, "y_m": pl.Float64, "z_m": pl.Float64,
         "length_m": pl.Float64, "width_m": pl.Float64, "height_m": pl.Float64, "yaw_rad": pl.Float64,
         "vx_mps": pl.Float64, "vy_mps": pl.Float64}
UID = re.compile(r"-?[0-9]+|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True)
class Labels:
    """Boxes in the map frame, and what was reviewed.

    boxes        BOXES, sorted by stamp and object: centre, size, yaw about +z; velocity is NaN where unknown
    reviewed_us  [start, end) intervals, in order, apart: in them a missing box means that nothing is there
    """

    boxes: pl.DataFrame
    reviewed_us: tuple[tuple[int, int], ...]


def write(labels: Labels, path: Path) -> None:
    """The file, the same bytes for the same labels. Raises ValueError for an object id that is no OpenLABEL uid."""
    objects, frames = {}, {}
    ordered = labels.boxes.sort("stamp_us", "object_id")
    numbers = {stamp: n for n, stamp in enumerate(ordered["stamp_us"].unique(maintain_order=True))}
    for row in ordered.iter_rows(named=True):
        uid, number = row["object_id"], numbers[row["stamp_us"]]
        if not UID.fullmatch(uid):
            raise ValueError(f"object id {uid!r}, expected digits or a UUID")
        entry = objects.setdefault(uid, {"name": uid, "type": row["category"], "frame_intervals": []})
        if entry["frame_intervals"] and entry["frame_intervals"][-1]["frame_end"] == number - 1:
            entry["frame_intervals"][-1]["frame_end"] = number
        else:
            entry["frame_intervals"].append({"frame_start": number, "frame_end": number})
        frame = frames.setdefault(str(number), {"frame_properties": {"timestamp": row["stamp_us"]}, "objects": {}})
        frame["objects"][uid] = {"object_data": {"cuboid": [_cuboid(row)]}}
    contexts = {str(n): {"name": f"reviewed {n}", "type": "reviewed",
                         "context_data": {"vec": [{"name": "interval_us", "val": [start, end]}]}}
                for n, (start, end) in enumerate(labels.reviewed_us)}
    root = {"metadata": {"schema_version": VERSION},
            "coordinate_systems": {"map": {"type": "scene_cs", "parent": "", "children": []}},
            "contexts": contexts, "objects": objects, "frames": frames}
    path.write_text(json.dumps({"openlabel": root}, sort_keys=True, separators=(",", ":")) + "\n")


def _cuboid(row: dict[str, Any]) -> dict[str, Any]:
    half = row["yaw_rad"] / 2
    cuboid = {"name": "box", "coordinate_system": "map",
              "val": [row["x_m"], row["y_m"], row["z_m"], 0.0, 0.0, round(math.sin(half), 9), round(math.cos(half), 9),
                      row["length_m"], row["width_m"], row["height_m"]]}
    if math.isfinite(row["vx_mps"]) and math.isfinite(row["vy_mps"]):
        cuboid["attributes"] = {"vec": [{"name": "velocity_mps", "val": [row["vx_mps"], row["vy_mps"]]}]}
    return cuboid


def read(path: Path) -> Labels:
    """The labels of a file. Raises DataError with file, place and what is expected there, for anything else."""
    try:
        root = documents.read(path, "export it again, then `roadmill scan` again")
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror}; check the path and its permissions") from None
    root = _section(path, _section(path, root, "the file").get("openlabel"), "openlabel")
    version = _section(path, root, "openlabel", "metadata").get("schema_version")
    if version != VERSION:
        raise _fault(path, "openlabel.metadata.schema_version", f"is {version!r}, expected {VERSION!r}",
                     "export as OpenLABEL 1.0")
    objects = _section(path, root, "openlabel", "objects")
    rows = []
    for number, frame in _section(path, root, "openlabel", "frames").items():
        rows.extend(_frame_rows(path, f"openlabel.frames.{number}", frame, objects))
    boxes = pl.DataFrame(rows, schema=BOXES, orient="row").sort("stamp_us", "object_id")
    twins = boxes.filter(pl.struct("stamp_us", "object_id").is_duplicated())
    if twins.height:
        stamp, uid = twins.row(0)[:2]
        raise _fault(path, "openlabel.frames", f"has object {uid} twice at {stamp} us",
                     "give each frame its own timestamp")
    return Labels(boxes, _reviewed(path, root))


def _frame_rows(path: Path, where: str, frame: Any, objects: dict) -> list[tuple]:
    stamp = _section(path, _section(path, frame, where), where, "frame_properties").get("timestamp")
    if not isinstance(stamp, int) or isinstance(stamp, bool) or not 10**15 <= stamp < 10**16:
        raise _fault(path, f"{where}.frame_properties.timestamp", f"is {stamp!r}",
                     "write it as an integer, in µs since the Unix epoch")
    rows = []
    for uid, entry in _section(path, frame, where, "objects", empty=True).items():
        place = f"{where}.objects.{uid}"
        if not isinstance(objects.get(uid), dict) or not isinstance(objects[uid].get("type"), str):
            raise _fault(path, place, f"has no type in openlabel.objects.{uid}", "list every object with its type")
        cuboids = _section(path, _section(path, entry, place), place, "object_data").get("cuboid")
        if not isinstance(cuboids, list) or len(cuboids) != 1 or not isinstance(cuboids[0], dict):
            raise _fault(path, f"{place}.object_data.cuboid", "is not a list of one cuboid",
                         "export one 3D box per object")
        rows.append((stamp, uid, objects[uid]["type"], *_box(path, f"{place}.object_data.cuboid[0]", cuboids[0])))
    return rows


def _box(path: Path, where: str, cuboid: dict) -> tuple[float, ...]:
    frame = cuboid.get("coordinate_system")
    if frame != "map":
        raise _fault(path, f"{where}.coordinate_system", f"is {frame!r}, expected 'map'",
                     "export boxes in the map frame")
    val = _numbers(path, f"{where}.val", cuboid.get("val"), (10,),
                   "write x, y, z, qx, qy, qz, qw, sx, sy, sz: centre, quaternion with w last, size, length first")
    x, y, z, qx, qy, qz, qw, *size = val
    if abs(math.hypot(qx, qy, qz, qw) - 1) > 1e-3:
        raise _fault(path, f"{where}.val", f"has the quaternion {val[3:7]}", "write a unit quaternion, w last")
    if min(size) <= 0:
        raise _fault(path, f"{where}.val", f"has the size {size}", "sizes are positive: fix or remove the box")
    yaw = math.atan2(2 * (qw * qz + qx * qy), 1 - 2 * (qy * qy + qz * qz))
    attributes = _section(path, cuboid, where, "attributes", empty=True)
    velocity = _vec(path, f"{where}.attributes", attributes, "velocity_mps")
    if velocity is None:
        velocity = [math.nan, math.nan]
    else:
        _numbers(path, f"{where}.attributes.vec 'velocity_mps'", velocity, (2, 3), "write vx, vy in m/s")
    return (x, y, z, *size, -math.pi if yaw == math.pi else yaw, *velocity[:2])


def _reviewed(path: Path, root: dict) -> tuple[tuple[int, int], ...]:
    intervals = []
    for number, context in _section(path, root, "openlabel", "contexts", empty=True).items():
        where = f"openlabel.contexts.{number}"
        if _section(path, context, where).get("type") != "reviewed":
            continue
        facts = _section(path, context, where, "context_data", empty=True)
        val = _vec(path, f"{where}.context_data", facts, "interval_us")
        way_out = "write context_data.vec 'interval_us' with val [start, end], integers in µs, start before end"
        start, end = _numbers(path, f"{where} 'interval_us'", val, (2,), way_out)
        if not isinstance(start, int) or not isinstance(end, int) or start >= end:
            raise _fault(path, f"{where} 'interval_us'", f"is {val}", way_out)
        intervals.append((start, end))
    intervals.sort()
    for (_, end), (start, _) in itertools.pairwise(intervals):
        if start < end:
            raise _fault(path, "openlabel.contexts", f"has reviewed intervals that overlap at {start} us", "join them")
    return tuple(intervals)


def _section(path: Path, parent: Any, where: str, name: str | None = None, *, empty: bool = False) -> dict:
    """The JSON object `name` of `parent`, or `parent` itself; `empty`: {} where it is absent."""
    found, place = parent, where
    if name is not None:
        found, place = parent.get(name, {} if empty else None), f"{where}.{name}"
    if not isinstance(found, dict):
        raise _fault(path, place, f"is {_short(found)}, expected a JSON object", "export as OpenLABEL 1.0")
    return found


def _vec(path: Path, where: str, holder: dict, name: str) -> Any:
    """The value of the vector called `name`; None where there is none."""
    vecs = holder.get("vec", [])
    if not isinstance(vecs, list) or not all(isinstance(vec, dict) for vec in vecs):
        raise _fault(path, f"{where}.vec", f"is {_short(vecs)}, expected a list of objects", "export as OpenLABEL 1.0")
    return next((vec.get("val") for vec in vecs if vec.get("name") == name), None)


def _numbers(path: Path, where: str, val: Any, lengths: tuple[int, ...], way_out: str) -> list[float]:
    if not isinstance(val, list) or len(val) not in lengths or not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e16 for v in val):
        count = f" ({len(val)} values)" if isinstance(val, list) else ""
        wanted = " or ".join(map(str, lengths))
        raise _fault(path, where, f"is {_short(val)}{count}, expected {wanted} numbers", way_out)
    return val


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fault(path: Path, where: str, what: str, way_out: str) -> DataError:
    return DataError(f"{path}: {where} {what};\n  {way_out}, then `roadmill scan` again")
