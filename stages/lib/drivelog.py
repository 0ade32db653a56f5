"""One pass over a recording: when every message came, and the few values of poses, mounts, cameras and signals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.lib import frames, packets, video
from stages.lib.bag import Bag, ns_to_us
from stages.lib.errors import ConfigError
from stages.lib.frames import Frames
from stages.lib.knobs import near_miss
from stages.lib.rig import Signal
from stages.lib.videolog import VideoLog

Read = Callable[[Any], tuple[float, ...]]


@dataclass(frozen=True)
class Arrivals:
    """A topic's messages in the order received, all (N,) int64.

    sensor_us  header.stamp, without the rig's offset; the receive time of the num_unstamped that have none
    from_ns    receive_ns, or that of the earliest message it takes to make it: a turn of single packets is one message
               here, its last
    """

    sensor_us: np.ndarray
    receive_ns: np.ndarray
    seq: np.ndarray
    bytes: np.ndarray
    from_ns: np.ndarray
    num_unstamped: int

    def at(self, rows: np.ndarray) -> Arrivals:
        """Those of some messages, by their numbers."""
        return Arrivals(self.sensor_us[rows], self.receive_ns[rows], self.seq[rows], self.bytes[rows],
                        self.from_ns[rows], self.num_unstamped)

    @property
    def lag_us(self) -> float:
        """The median of receive time minus stamp [µs]."""
        return float(np.median(self.receive_ns // 1000 - self.sensor_us))


@dataclass(frozen=True)
class DriveLog:
    """What one pass found. arrivals: topic -> Arrivals; values: name -> (N, k) rows beside its topic's arrivals;
    first: topic -> first message, decoded; num_changed: topic -> later messages that differ from the first one beyond
    their stamp; transforms: of all /tf_static messages; videos: topic -> what its packets say, of video topics."""

    arrivals: Mapping[str, Arrivals]
    values: Mapping[str, np.ndarray]
    first: Mapping[str, Any]
    num_changed: Mapping[str, int]
    transforms: Frames
    videos: Mapping[str, VideoLog]


@dataclass
class _Lists:
    sensor_us: list[int] = field(default_factory=list)
    receive_ns: list[int] = field(default_factory=list)
    seq: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    from_ns: list[int] = field(default_factory=list)
    num_unstamped: int = 0


def read(bag: Bag, sensor_topics: Iterable[str], info_topics: Iterable[str],
         readers: Mapping[str, tuple[str, Read]]) -> DriveLog:
    """One pass over the topics of sensors (timed, the first one decoded), CameraInfos (compared with the first one) and
    readers (name -> topic and what is read from each message); topics that the recording lacks are left out.

    Raises DataError for damage, ConfigError for a field that a message has not.
    """
    sensor_topics, info_topics = set(sensor_topics), set(info_topics)
    wanted = {topic for topic in sensor_topics | info_topics | {topic for topic, _ in readers.values()} | {frames.TOPIC}
              if topic in bag.topics}
    by_topic: dict[str, list[tuple[list, Read]]] = {}
    rows: dict[str, list] = {}
    for name, (topic, read_) in readers.items():
        if topic in wanted:
            rows[name] = []
            by_topic.setdefault(topic, []).append((rows[name], read_))
    lists = {topic: _Lists() for topic in sorted(wanted)}
    first: dict[str, Any] = {}
    first_bytes: dict[str, bytes] = {}
    num_changed = dict.fromkeys(sorted(info_topics & wanted), 0)
    transforms = Frames()
    videos: dict[str, VideoLog] = {}
    for message, turn in packets.joined(bag, bag.messages(wanted)):
        topic, own = message.topic, lists[message.topic]
        stamp_us = bag.sensor_us(message)
        own.num_unstamped += stamp_us is None
        own.sensor_us.append(ns_to_us(message.receive_ns) if stamp_us is None else stamp_us)
        own.receive_ns.append(message.receive_ns)
        own.seq.append(message.seq)
        own.bytes.append(len(message.data) * (len(turn.packets) if turn else 1))
        own.from_ns.append(turn.from_ns if turn else message.receive_ns)
        if topic in num_changed:
            num_changed[topic] += bytes(message.data[12:]) != first_bytes.setdefault(topic, bytes(message.data[12:]))
        if topic == frames.TOPIC:
            transforms.add_message(bag.decode(message))
        elif topic in by_topic:
            decoded = bag.decode(message)
            first.setdefault(topic, decoded)
            for values, read_ in by_topic[topic]:
                values.append(read_(decoded))
        elif topic not in first or topic in videos:
            decoded = turn or bag.decode(message)
            codec = None if topic in first or topic not in sensor_topics else video.codec_of(decoded)
            if codec:
                videos[topic] = VideoLog(codec)
            first.setdefault(topic, decoded)
            if topic in videos:
                videos[topic].add(decoded.data.tobytes(), message.receive_ns, own.sensor_us[-1])
    arrivals = {topic: Arrivals(*(np.array(column, np.int64) for column in (
        own.sensor_us, own.receive_ns, own.seq, own.bytes, own.from_ns)), own.num_unstamped)
        for topic, own in lists.items()}
    values = {name: np.array(found, float).reshape(len(found), -1) for name, found in rows.items()}
    return DriveLog(arrivals, values, first, num_changed, transforms, videos)


def odometry(message: Any) -> tuple[float, ...]:
    """x y z, qw qx qy qz, vx vy vz, wx wy wz of a nav_msgs/Odometry."""
    p, q, twist = message.pose.pose.position, message.pose.pose.orientation, message.twist.twist
    v, w = twist.linear, twist.angular
    return p.x, p.y, p.z, q.w, q.x, q.y, q.z, v.x, v.y, v.z, w.x, w.y, w.z


def fix(message: Any) -> tuple[float, ...]:
    """Status (below 0: no fix), latitude and longitude [deg], altitude [m], horizontal and vertical variance [m2] of a
    sensor_msgs/NavSatFix; the variances are NaN where it does not know them."""
    covariance = message.position_covariance
    known = message.position_covariance_type != 0 and covariance[0] > 0 and covariance[4] > 0 and covariance[8] > 0
    variances = ((covariance[0] + covariance[4]) / 2, covariance[8]) if known else (np.nan, np.nan)
    return message.status.status, message.latitude, message.longitude, message.altitude, *variances


def gyro(message: Any) -> tuple[float, ...]:
    """wx wy wz [rad/s] of a sensor_msgs/Imu."""
    w = message.angular_velocity
    return w.x, w.y, w.z


def signal(name: str, wanted: Signal) -> Read:
    """What reads the signal's field, a dotted path whose parts may be numbers for places in an array."""
    parts = wanted.field.split(".")

    def read_(message: Any) -> tuple[float, ...]:
        value = message
        for part in parts:
            try:
                value = value[int(part)] if part.isdigit() else getattr(value, part)
            except (AttributeError, IndexError, TypeError):
                known = [known for known in getattr(value, "__dataclass_fields__", ()) if not known.startswith("__")]
                raise ConfigError(f"signals.{name}.field is {wanted.field!r}, but {wanted.topic} has no {part!r} there"
                                  f"{near_miss(part, known)}; it has {', '.join(known) or 'a number'}; "
                                  "correct it in conf/rig") from None
        try:
            return (float(value) * wanted.scale,)
        except (TypeError, ValueError):
            raise ConfigError(f"signals.{name}.field is {wanted.field!r}, which is no number in {wanted.topic}; "
                              "correct it in conf/rig") from None

    return read_
