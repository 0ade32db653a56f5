"""A VLP-16 in a square room, after the sensor's User Manual (63-9243 Rev. E, chapter 9), independent of any decoder.

A packet holds 12 blocks of two firings of 16 lasers, 55.296 µs from firing to firing and 2.304 µs from laser to laser;
a turn of 100 ms takes 75.35 packets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rosbags.typesys import get_types_from_msg

from stages.lib import geometry
from stages.lib.msgdefs import KNOWN
from tests import tinybags

ELEVATION_DEG = np.array([-15, 1, -13, 3, -11, 5, -9, 7, -7, 9, -5, 11, -3, 13, -1, 15])
OFFSET_M = np.array([11.2, -0.7, 9.7, -2.2, 8.1, -3.7, 6.6, -5.1, 5.1, -6.6, 3.7, -8.1, 2.2, -9.7, 0.7, -11.2]) / 1e3
RING = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])
FIRING_US, LASER_US, PACKET_US, TURN_US = 55.296, 2.304, 24 * 55.296, 100_000.0
STRONGEST, DUAL, VLP16 = 0x37, 0x39, 0x22
IN_PACKET_US = FIRING_US * np.arange(24)[:, None] + LASER_US * np.arange(16)
HALF_ROOM_M, MIDDLE_M = 30.0, np.array([0.0, 20.0])

for name, text in KNOWN.items():
    tinybags.STORE.register(get_types_from_msg(text, name))
TYPES = {name.rsplit("/", 1)[1]: tinybags.STORE.types[name] for name in KNOWN}


def packet(azimuths_deg: np.ndarray, distances_m: np.ndarray, intensities: np.ndarray, sensor_us: int, *,
           mode: int = STRONGEST, model: int = VLP16) -> np.ndarray:
    """The 1206 bytes: azimuths (12,) of the blocks, distances and intensities (12, 32); 0 m is no return."""
    blocks = np.zeros(12, [("flag", "<u2"), ("azimuth", "<u2"), ("data", [("distance", "<u2"), ("i", "u1")], 32)])
    blocks["flag"], blocks["azimuth"] = 0xEEFF, np.rint(np.asarray(azimuths_deg) * 100) % 36_000
    blocks["data"]["distance"], blocks["data"]["i"] = np.rint(np.asarray(distances_m) / 0.002), intensities
    return np.frombuffer(blocks.tobytes() + struct.pack("<IBB", sensor_us % 3_600_000_000, mode, model), np.uint8)


@dataclass(frozen=True)
class Fired:
    """One packet: stamp_us when its first laser fired, data (1206,), points (384, 5) x, y, z, intensity, ring in the
    sensor frame, times_us (384,) after stamp_us, azimuth_deg of its first block."""

    stamp_us: int
    data: np.ndarray
    points: np.ndarray
    times_us: np.ndarray
    azimuth_deg: float


def fire(start_us: int, num_packets: int, T_map_sensor: Callable[[np.ndarray], np.ndarray], *, sensor_us: int = 0
         ) -> list[Fired]:
    """What the sensor says from start_us on, when it looks ahead and its own clock shows sensor_us; T_map_sensor: poses
    (N, 4, 4) at times (N,) after start_us [µs]."""
    fired = []
    for number in range(num_packets):
        begin_us = round(number * PACKET_US)
        times_us = (begin_us + IN_PACKET_US).ravel()
        azimuth_deg = times_us / TURN_US * 360
        azimuth, elevation = np.deg2rad(azimuth_deg), np.deg2rad(np.tile(ELEVATION_DEG, 24))
        flat = np.cos(elevation)
        ray = np.stack([np.cos(azimuth) * flat, -np.sin(azimuth) * flat, np.sin(elevation)], -1)
        T = T_map_sensor(times_us)
        ray_map = np.einsum("nij,nj->ni", T[:, :3, :3], ray)[:, :2]
        away = np.copysign(HALF_ROOM_M, ray_map) + MIDDLE_M - T[:, :2, 3]
        with np.errstate(divide="ignore"):
            distance = np.rint((away / ray_map).min(1) / 0.002) * 0.002
        intensity = np.tile(np.arange(16) * 10, 24)
        points = np.column_stack([ray * distance[:, None] + np.outer(np.tile(OFFSET_M, 24), [0, 0, 1]), intensity,
                                  np.tile(RING, 24)])
        data = packet(azimuth_deg.reshape(12, 32)[:, 0] % 360, distance.reshape(12, 32), intensity.reshape(12, 32),
                      sensor_us + begin_us)
        fired.append(Fired(start_us + begin_us, data, points, times_us - begin_us, azimuth_deg[0] % 360))
    return fired


def turns(fired: list[Fired]) -> list[list[Fired]]:
    """The whole turns among them: each ends with the first packet that begins past 180 deg."""
    past = np.array([(one.azimuth_deg - 180) % 360 for one in fired])
    ends = np.flatnonzero(np.diff(past) < 0) + 1
    return [fired[first + 1:last + 1] for first, last in pairwise(ends)]


def off_walls_m(xyz_map: np.ndarray) -> np.ndarray:
    """How far (N,) points lie from the nearest wall."""
    return np.abs(np.abs(xyz_map[:, :2] - MIDDLE_M).max(1) - HALF_ROOM_M)


def time(at_us: int) -> Any:
    return tinybags.header(at_us).stamp


def single(at_us: int, data: np.ndarray) -> Any:
    return TYPES["VelodynePacket"](time(at_us), data)


def udp(at_us: int, data: np.ndarray, frame: str = "lidar") -> Any:
    return TYPES["UdpPacket"](tinybags.header(at_us, frame), "192.168.1.201", 2368, data)


def scan(header_us: int, packets: list[tuple[int, np.ndarray]], frame: str = "lidar") -> Any:
    return TYPES["VelodyneScan"](tinybags.header(header_us, frame), [single(*one) for one in packets])


def cloud(header_us: int, turn: list[Fired], frame: str = "lidar") -> Any:
    """The turn as the driver's PointCloud2, with the points' times after the header [s]."""
    points = np.concatenate([one.points for one in turn])
    times_s = np.concatenate([(one.stamp_us - header_us + one.times_us) * 1e-6 for one in turn])
    rows = np.zeros(len(points), [("xyzi", "<f4", 4), ("ring", "<u2"), ("time", "<f4")])
    rows["xyzi"], rows["ring"], rows["time"] = points[:, :4], points[:, 4], times_s
    field = tinybags.TYPES["PointField"]
    fields = [field(name, offset, kind, 1) for name, offset, kind in (
        ("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("intensity", 12, 7), ("ring", 16, 4), ("time", 18, 7))]
    return tinybags.TYPES["PointCloud2"](tinybags.header(header_us, frame), 1, len(rows), fields, False, 22,
                                         22 * len(rows), rows.view(np.uint8).ravel(), True)


def standing(times_us: np.ndarray) -> np.ndarray:
    """A sensor in the middle of the room that looks along x."""
    return np.tile(geometry.transform([*MIDDLE_M, 1.0], geometry.yaw_wxyz(0.0)), (len(times_us), 1, 1))
