"""A drive of video files with their stamps, and the bag of its other sensors, read as one recording.

A video file is a topic of its own name, and its packets are the messages. Their receive time is not recorded: it is
reckoned from their place in the file, between the first stamp and the last, and serves to find them again; which stamp
a picture has is told by the order of display alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stages.lib import sidefiles
from stages.lib.bag import Bag, Message, Topic, open_bag
from stages.lib.bagfiles import MAGIC
from stages.lib.errors import DataError
from stages.lib.video import VIDEO_FILE, Film


@dataclass(frozen=True, slots=True)
class Packet(Message):
    """A packet of a video file. shown_ns: when its picture is displayed, reckoned as receive_ns is."""

    pts: int
    shown_ns: int


@dataclass(frozen=True)
class VideoPacket:
    """A decoded Packet, as a CompressedVideo message would be."""

    frame_id: str
    format: str
    data: np.ndarray


class _Reel:
    """One video file with its stamps."""

    def __init__(self, path: Path, drive: str) -> None:
        self.name = f"{drive}/{path.name}"
        self.film = Film(path, self.name)
        self._stamps_name = f"{drive}/{sidefiles.stamps_path(path).name}"
        self.stamps_us = sidefiles.read_stamps(sidefiles.stamps_path(path), self._stamps_name)
        self._begin_ns = 1000 * min(self.stamps_us)
        self._span_ns = 1000 * (max(self.stamps_us) - min(self.stamps_us)) or 1
        self._span = self.film.span or max(len(self.stamps_us) - 1, 1)

    @cached_property
    def stamp_of(self) -> dict[int, int]:
        """pts -> stamp [us]. Raises DataError where there are not as many stamps as pictures."""
        shown = sorted(pts for pts, _ in self.film.packets())
        if len(shown) != len(self.stamps_us):
            raise DataError(f"{self.name}: {len(shown)} pictures, but {len(self.stamps_us)} stamps in "
                            f"{self._stamps_name}: which picture has none is not known; write one row a picture")
        return dict(zip(shown, self.stamps_us))

    def packets(self, topic: str, start_ns: int, stop_ns: int | None) -> Iterator[Packet]:
        """Those with start_ns <= receive_ns < stop_ns. In decoding order receive_ns never falls, and a key picture is
        displayed after all that was decoded before it: so it does not matter from which one the file is read."""
        last_ns, seq = None, 0
        for pts, data in self.film.packets(self._pts(start_ns)):
            shown_ns = self._begin_ns + (pts - self.film.begin) * self._span_ns // self._span
            receive_ns = shown_ns if last_ns is None else max(shown_ns, last_ns)
            seq = seq + 1 if receive_ns == last_ns else 0
            last_ns = receive_ns
            if stop_ns is not None and receive_ns >= stop_ns:
                return
            if receive_ns >= start_ns:
                yield Packet(topic, VIDEO_FILE, receive_ns, seq, data, pts, shown_ns)

    def _pts(self, at_ns: int) -> int:
        return self.film.begin + -(-(at_ns - self._begin_ns) * self._span // self._span_ns)


class VideoDrive:
    """An open drive of video files; reads like `bag.Bag`. Made by `open_drive`."""

    def __init__(self, reels: dict[str, _Reel], infos: dict[str, Path], inner: Bag | None, name: str) -> None:
        self.name = name
        self._reels, self._infos, self._inner = reels, infos, inner
        self._read: dict[str, sidefiles.CameraInfo] = {}
        self.topics: dict[str, Topic] = {
            **(inner.topics if inner else {}),
            **{topic: Topic(topic, VIDEO_FILE, len(reel.stamps_us)) for topic, reel in reels.items()},
            **{topic: Topic(topic, "sensor_msgs/msg/CameraInfo", 1) for topic in infos}}

    def messages(self, topics: Iterable[str], start_ns: int | None = None, stop_ns: int | None = None
                 ) -> Iterator[Message]:
        """As `Bag.messages`. Of a raw stream, which has no index, all packets before start_ns are passed over."""
        wanted = set(topics)
        parts: list[Iterator[Message]] = []
        for topic in sorted(wanted & self._infos.keys()):
            at_ns = min((1000 * min(reel.stamps_us) for reel in self._reels.values()), default=0)
            if (start_ns is None or start_ns <= at_ns) and (stop_ns is None or at_ns < stop_ns):
                content = self._infos[topic].read_bytes()
                parts.append(iter([Message(topic, "sensor_msgs/msg/CameraInfo", at_ns, 0, content)]))
        parts += [self._reels[topic].packets(topic, 0 if start_ns is None else start_ns, stop_ns)
                  for topic in sorted(wanted & self._reels.keys())]
        others = wanted - self._reels.keys() - self._infos.keys()
        if others and self._inner:
            parts.append(self._inner.messages(others, start_ns, stop_ns))
        elif others:
            raise DataError(f"{self.name}: has no bag, and so no topic {min(others)}; put the bag into the folder")
        return heapq.merge(*parts, key=lambda message: message.receive_ns)

    def decode(self, message: Message) -> Any:
        """As `Bag.decode`; a packet as VideoPacket, a calibration as CameraInfo."""
        if message.topic in self._reels:
            info = self._info(Path(message.topic).stem + sidefiles.CAMERA_INFO)
            frame_id = info.frame_id if info else Path(message.topic).stem
            return VideoPacket(frame_id, self._reels[message.topic].film.codec, np.frombuffer(message.data, np.uint8))
        if message.topic in self._infos:
            return self._info(message.topic)
        return self._inner.decode(message)

    def sensor_us(self, message: Message) -> int | None:
        """As `Bag.sensor_us`; of a packet, the stamp of its picture by the order of display."""
        if isinstance(message, Packet):
            return self._reels[message.topic].stamp_of[message.pts]
        return None if message.topic in self._infos else self._inner.sensor_us(message)

    def shown_us(self, message: Message) -> int:
        """As `Bag.shown_us`."""
        return message.shown_ns // 1000 if isinstance(message, Packet) else self._inner.shown_us(message)

    def _info(self, topic: str) -> sidefiles.CameraInfo | None:
        if topic in self._infos and topic not in self._read:
            self._read[topic] = sidefiles.read_camera_info(self._infos[topic], f"{self.name}/{topic}")
        return self._read.get(topic)


@contextmanager
def open_drive(path: Path, name: str | None = None) -> Iterator[Bag | VideoDrive]:
    """An open recording: a bag, or a folder of video files with their stamps (see `sidefiles`). Raises DataError."""
    name = name or path.name
    films = sidefiles.videos(path) if isinstance(path, Path) and path.is_dir() else []
    with ExitStack() as stack:
        if not films:
            yield stack.enter_context(open_bag(path, name))
            return
        bags = [path] if (path / "metadata.yaml").exists() else [
            one for one in sorted(path.iterdir()) if (one / "metadata.yaml").exists() or one.suffix in MAGIC]
        if len(bags) > 1:
            raise DataError(f"{name}: has {len(bags)} bags ({', '.join(one.name for one in bags)}), a drive of video "
                            "files has one: merge them with `ros2 bag convert`")
        inner = stack.enter_context(open_bag(bags[0], f"{name}/{bags[0].name}")) if bags else None
        reels = {film.name: _Reel(film, name) for film in films}
        infos = {info.name: info for info in sorted(path.glob(f"*{sidefiles.CAMERA_INFO}"))}
        yield VideoDrive(reels, infos, inner, name)
