"""Clouds of Velodyne's data packets: whole scans of them, or one packet a message. The one door to `velodyne_decoder`.

A packet is stamped twice: by the host that received it, on the clock of all other stamps but with the network's jitter,
and by the sensor, to the microsecond but often on a clock that nobody set. Points are timed by the sensor's clock, laid
onto the host's by the median distance of the two. Layout and firing times: VLP-16 User Manual 63-9243 Rev. E, ch. 9.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.lib.bag import Bag, Message, stamp_us
from stages.lib.errors import DataError
from stages.lib.pointcloud import Cloud

SCAN = "velodyne_msgs/msg/VelodyneScan"
SINGLE = ("velodyne_msgs/msg/VelodynePacket", "udp_msgs/msg/UdpPacket")
MODELS = "VLP-16, Puck Hi-Res, HDL-32E, VLP-32C and VLS-128 (Alpha Prime)"
PACKET_BYTES = 1206
HOUR_US = 3_600_000_000
MAX_JITTER_US = 5_000  # stamps that stray further from the sensor's clock say nothing about a packet
CUT_CDEG, TURN_CDEG = 18_000, 36_000  # turns are cut behind the sensor, at 180.00 deg of its azimuth
MAX_HOLE_US = 25_000  # packets lost for longer: half a turn at the fastest, an eighth at the slowest
MAX_TURN_US = 250_000  # the slowest turn takes 200 ms


@dataclass(frozen=True)
class Header:
    """Of a turn whose packets have none: the stamp of its last packet, in no frame."""

    stamp: Any
    frame_id: str


@dataclass(frozen=True)
class Packet:
    """stamp: the host's; data (1206,) uint8."""

    stamp: Any
    data: np.ndarray


@dataclass(frozen=True)
class Turn:
    """The packets of one turn, in the form of a VelodyneScan; its header is that of its last packet.

    from_ns  who reads the topic from this receive time on gets this turn again
    """

    header: Any
    packets: list[Packet]
    from_ns: int


class Turns:
    """Cuts a stream of single packets into turns: a turn ends with the first packet that begins past 180 deg."""

    def __init__(self) -> None:
        self._before: tuple[int, int, int] | None = None
        self._packets: list[Packet] | None = None
        self._cut_us = self._from_ns = 0

    def add(self, message: Any, receive_ns: int) -> Turn | None:
        """The turn that this packet ends; None where it ends none, or one of which packets are missing.

        A payload of another size than a data packet's (the sensor's position packet) is passed over.
        """
        if len(message.data) != PACKET_BYTES:
            return None
        header = getattr(message, "header", None) or Header(message.stamp, "")
        past_cdeg = (int(message.data[2]) + 256 * int(message.data[3]) - CUT_CDEG) % TURN_CDEG
        now_us = int(_sensor_us(message.data[None])[0])
        before, self._before = self._before, (past_cdeg, now_us, receive_ns)
        if before is None:
            return None
        last_cdeg, last_us, last_ns = before
        hole = (now_us - last_us) % HOUR_US > MAX_HOLE_US
        if hole or (now_us - self._cut_us) % HOUR_US > MAX_TURN_US:
            self._packets = None
        elif self._packets is not None:
            self._packets.append(Packet(header.stamp, message.data))
        if last_cdeg - past_cdeg < TURN_CDEG // 2:
            return None
        turn = Turn(header, self._packets, self._from_ns) if self._packets else None
        self._packets, self._cut_us, self._from_ns = None if hole else [], now_us, last_ns
        return turn


def joined(bag: Bag, messages: Iterable[Message]) -> Iterator[tuple[Message, Turn | None]]:
    """The messages, each with None; of topics of single packets only those that end a turn, each with it.

    Raises DataError for a packet that can't be read.
    """
    turns: defaultdict[str, Turns] = defaultdict(Turns)
    for message in messages:
        if message.msgtype not in SINGLE:
            yield message, None
        elif turn := turns[message.topic].add(bag.decode(message), message.receive_ns):
            yield message, turn


def decode(scan: Any, header_us: int) -> Cloud:
    """The cloud of a decoded VelodyneScan or of a Turn, whose header.stamp is header_us [µs].

    x forward, y left, z up; ring 0 is the lowest; intensity 0 to 255, as the sensor calibrated it. Angles and offsets
    of the beams are the model's, which the packets name. Both returns of a firing that gave two.
    Raises DataError for packets of a model that is not known, or none of Velodyne's.
    """
    if not scan.packets:
        return Cloud(np.zeros((0, 5), np.float32), None, ("time",), 0)
    sizes = {packet.data.size for packet in scan.packets} - {PACKET_BYTES}
    if sizes:
        raise DataError(f"a packet of {min(sizes)} bytes, Velodyne's have {PACKET_BYTES}")
    sensor_us = _sensor_us(np.stack([packet.data for packet in scan.packets]))
    since_first_us = (sensor_us - sensor_us[0] + HOUR_US // 2) % HOUR_US - HOUR_US // 2
    rows = _decoded(scan.packets, since_first_us)
    stamps_us = np.array([stamp_us(packet) for packet in scan.packets])
    first_us = stamps_us - header_us - since_first_us
    middle_us = np.median(first_us)
    timed = len(rows) and stamps_us.all() and np.median(np.abs(first_us - middle_us)) <= MAX_JITTER_US
    after_us = rows[:, 4] * 1e6 + middle_us if timed else None
    return Cloud(rows[:, [0, 1, 2, 3, 6]], after_us, () if timed else ("time",), 0)


def _sensor_us(data: np.ndarray) -> np.ndarray:
    """Microseconds since the top of the sensor's hour (N,) int64 of packets (N, 1206) uint8."""
    return data[:, 1200:1204].copy().view("<u4")[:, 0].astype(np.int64)


def _decoded(packets: list[Any], since_first_us: np.ndarray) -> np.ndarray:
    """(N, 8) float32: x, y, z [m], intensity, time [s] after the first packet's, column, ring, kind of return.

    A decoder for each scan: it remembers packets, and a scan's points must not depend on what was decoded before it.
    """
    import velodyne_decoder  # 40 ms, for those who have packets

    pylib = velodyne_decoder.velodyne_decoder_pylib
    decoder = velodyne_decoder.ScanDecoder(velodyne_decoder.Config(
        min_range=0, max_range=1000, timestamp_first_packet=True))
    try:
        scan = velodyne_decoder.PacketVector([
            velodyne_decoder.VelodynePacket(pylib.TimePair(0.0, at_us * 1e-6), bytearray(packet.data))
            for packet, at_us in zip(packets, since_first_us.tolist())])
        return decoder.decode(scan)[1]
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"its packets can't be decoded: {error}; those of {MODELS} can") from None
