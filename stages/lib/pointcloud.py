"""Lidar clouds: PointCloud2 of any layout to rows x, y, z, intensity, ring, and the turn's motion taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.lib import geometry
from stages.lib.errors import DataError
from stages.lib.poses import Poses

DATATYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}  # sensor_msgs/PointField
COLUMNS = (("x",), ("y",), ("z",), ("intensity", "i"), ("ring", "channel"))
TIMES = ("t", "time", "timestamp", "time_stamp", "offset_time")
KNOT_US = 100
FLOAT = np.dtype("<f4")


@dataclass(frozen=True)
class Cloud:
    """A decoded cloud.

    points    (N, 5) float32: x, y, z [m] in the sensor frame, intensity, ring; rows in the message's order
    after_us  (N,) time of each point after header.stamp [µs]; None where the cloud does not say it
    missing   which of intensity, ring and time the message lacks (the columns are then 0)
    num_dropped  rows left out: a value is not finite, or x, y and z are all 0 (no return)
    """

    points: np.ndarray
    after_us: np.ndarray | None
    missing: tuple[str, ...]
    num_dropped: int


def decode(message: Any, header_us: int) -> Cloud:
    """The cloud of a decoded PointCloud2 whose header.stamp is header_us [µs].

    Raises DataError where the declared layout does not fit the data, or x, y or z is missing.
    """
    rows = _rows(message)
    names = set(rows.dtype.names)
    columns = [next((s for s in spellings if s in names), None) for spellings in COLUMNS]
    missing = [spellings[0] for spellings, name in zip(COLUMNS, columns) if name is None]
    for lacking in missing:
        if lacking in ("x", "y", "z"):
            raise DataError(f"the cloud has no field {lacking}, only {', '.join(rows.dtype.names)}")
    points = _points(rows, columns)
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    keep = (x != 0) | (y != 0) | (z != 0)
    finite = np.isfinite(points)
    if not finite.all():
        keep &= finite.all(1)
    name = next((s for s in TIMES if s in names), None)
    after_us = None if name is None else _after_us(rows[name], header_us)
    if after_us is not None:
        keep &= np.isfinite(after_us)
        after_us = after_us[keep]
        after_us = after_us if after_us.size and np.ptp(after_us) > 0 else None
    if after_us is None:
        missing.append("time")
    num_dropped = int(rows.size - keep.sum())
    return Cloud(points[keep] if num_dropped else points, after_us, tuple(missing), num_dropped)


def compensate(xyz_sensor: np.ndarray, since_us: np.ndarray, reference_us: int, poses: Poses, *,
               T_ego_sensor: np.ndarray) -> np.ndarray:
    """The points (N, 3) [m] as a sensor that stood still where it was at reference_us would see them.

    xyz_sensor  (N, 3) [m] in the sensor frame at each point's own time
    since_us    (N,) a point's time after reference_us [µs]; poses are interpolated at knots of 100 µs
    Raises ValueError where the poses do not cover the points' times.
    """
    knot = np.floor(since_us / KNOT_US).astype(np.int64)
    first = knot.min(initial=0)
    knots_us = reference_us + KNOT_US * np.arange(first, knot.max(initial=0) + 1) + KNOT_US // 2
    T_map_sensor = poses.T_map_ego(np.append(knots_us, reference_us)) @ T_ego_sensor
    knot -= first
    T_ref_knot = geometry.invert(T_map_sensor[-1]) @ T_map_sensor[:-1]
    x, y, z = np.ascontiguousarray(xyz_sensor.T, float)
    moved = np.empty_like(xyz_sensor)
    for axis, of_knots in enumerate(T_ref_knot[:, :3].transpose(1, 2, 0)):  # a matrix per point costs five times more
        to_x, to_y, to_z, ahead = (np.ascontiguousarray(part).take(knot) for part in of_knots)
        moved[:, axis] = to_x * x + to_y * y + to_z * z + ahead
    return moved


def _points(rows: np.ndarray, columns: list[str | None]) -> np.ndarray:
    """The named fields of rows as (N, 5) float32, 0 where there is none."""
    points = np.zeros((rows.size, len(columns)), np.float32)
    fields = [rows.dtype.fields[name] if name else None for name in columns]
    first = fields[0][1]
    if fields[:4] == [(FLOAT, first + 4 * number) for number in range(4)]:
        # Most clouds begin with these four: copied as one, as unaligned floats cost numpy three times more.
        together = np.dtype({"names": ["xyzi"], "formats": ["V16"], "offsets": [0], "itemsize": 4 * len(columns)})
        points.view(together)["xyzi"][:, 0] = rows.getfield("V16", first)
        columns = [None, None, None, None, *columns[4:]]
    for column, name in enumerate(columns):
        if name:
            points[:, column] = rows[name]
    return points


def _rows(message: Any) -> np.ndarray:
    """The points as a structured array (height * width,), a view where rows are not padded."""
    height, width, step, num_bytes = message.height, message.width, message.point_step, message.data.size
    layout = _layout(message)
    single = height == 1 and num_bytes == width * step  # a single row's row_step is often wrong
    row_step = num_bytes if single else message.row_step
    if row_step < width * step or num_bytes != height * row_step:
        raise DataError(f"the cloud has {num_bytes} bytes, but declares {height} x {width} points of {step} bytes "
                        f"(row_step {message.row_step})")
    if not height * width * step:
        return np.zeros(0, layout)
    return np.ndarray((height, width), layout, message.data, strides=(row_step, step)).reshape(-1)


def _layout(message: Any) -> np.dtype:
    order = ">" if message.is_bigendian else "<"
    fields = {}
    for field in message.fields:
        if field.datatype not in DATATYPES:
            raise DataError(f"field {field.name} of the cloud has datatype {field.datatype}, expected 1 to 8")
        kind = np.dtype(order + DATATYPES[field.datatype])
        if field.offset + kind.itemsize * max(1, field.count) > message.point_step:
            raise DataError(f"field {field.name} of the cloud ends behind point_step, {message.point_step} bytes")
        if field.count <= 1:
            fields[field.name] = (kind, field.offset)
    return np.dtype({"names": list(fields), "formats": [kind for kind, _ in fields.values()],
                     "offsets": [offset for _, offset in fields.values()], "itemsize": message.point_step})


def _after_us(times: np.ndarray, header_us: int) -> np.ndarray:
    """Microseconds after the header's stamp (N,). Integers are ns after it; floats are s after it, or absolute in
    s, µs or ns, told apart by size (a Unix time of this century is 1e9 s, 1e15 µs, 1e18 ns)."""
    if times.dtype.kind in "iu":
        return times.astype(float) / 1e3
    seconds = times.astype(float)
    largest = np.nanmax(np.abs(seconds), initial=0)
    if largest < 1e8:
        return seconds * 1e6
    unit_us = 1e6 if largest < 1e11 else 1.0 if largest < 1e17 else 1e-3
    header_units = header_us / unit_us
    return (seconds - header_units) * unit_us
