"""Video: H.264 and H.265 packets to pictures. The one door to PyAV.

A picture that comes out is known by the number of the packet that went in, so that no reordering, loss or delay can
give it another's stamp. One thread a decoder: the same bytes whatever the number of workers.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.video.stream import VideoStream

from stages.lib.bag import MACHINE_ERRORS
from stages.lib.errors import DataError
from stages.lib.images import MAX_PIXELS
from stages.lib.sidefiles import RAW

MSGTYPES = ("foxglove_msgs/msg/CompressedVideo", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket")
VIDEO_FILE = "video file"  # what stands for the message type of a topic that is one
CAMERA_MSGTYPES = (*MSGTYPES, VIDEO_FILE)
NAMES = {**dict.fromkeys(("h264", "h.264", "avc", "avc1", "x264", "libx264"), "h264"),
         **dict.fromkeys(("h265", "h.265", "hevc", "hvc1", "hev1", "x265", "libx265"), "hevc")}
"""What the field calls a codec -> what we do."""
DECODERS = ("h264", "hevc")
READ_BYTES = 2**20

av.logging.set_level(None)  # what libav would print is raised here, or counted


@dataclass(frozen=True)
class Decoded:
    """A picture as it left the decoder. number: of its packet."""

    number: int
    _frame: av.VideoFrame

    @property
    def is_corrupt(self) -> bool:
        """Parts of it could not be decoded and are made up."""
        return self._frame.is_corrupt

    @property
    def size_px(self) -> tuple[int, int]:
        return self._frame.width, self._frame.height

    def rgb(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, by the matrix and range that the stream states; BT.601 and limited where it does not."""
        return self._frame.to_ndarray(format="rgb24", threads=1)


class Decoder:
    """Pictures of one stream. codec: "h264" or "hevc"."""

    def __init__(self, codec: str) -> None:
        self._context = av.CodecContext.create(codec, "r")
        self._context.thread_count = 1
        strict = {"err_detect": "explode"} if codec == "hevc" else {}  # it makes up what is missing; H.264's says so
        self._context.options = {"max_pixels": str(MAX_PIXELS), **strict}

    def send(self, data: bytes, number: int) -> list[Decoded]:
        """The pictures that come out as packet `number` (Annex B, one picture) goes in. Raises DataError."""
        packet = av.Packet(data)
        packet.pts = number
        return self._receive(packet)

    def rest(self) -> list[Decoded]:
        """The pictures still inside; the decoder may then begin anew."""
        pictures = self._receive(None)
        self._context.flush_buffers()
        return pictures

    def _receive(self, packet: av.Packet | None) -> list[Decoded]:
        try:
            frames = self._context.decode(packet)
        except av.error.FFmpegError as error:
            if error.errno == errno.ENOMEM:
                raise
            raise DataError(f"a video packet that can't be decoded: {error.strerror}") from None
        return [Decoded(frame.pts, frame) for frame in frames]


def codec_of(message: Any) -> str | None:
    """"h264" or "hevc" of a decoded CompressedVideo, FFMPEGPacket or CompressedImage; None for a still image.

    Raises DataError for video of another codec.
    """
    is_packet, is_video = hasattr(message, "pts"), hasattr(message, "timestamp")
    declared = message.encoding if is_packet else getattr(message, "format", "")
    for word in re.split(r"[^a-z0-9.]+", declared.lower()):
        if word in NAMES:
            return NAMES[word]
    if is_packet or is_video:
        raise DataError(f"video of the codec {declared!r}, known are h264 and h265 (hevc)")
    return None


def frame_id(message: Any) -> str:
    """The tf frame of a decoded sensor message."""
    return message.frame_id if hasattr(message, "frame_id") else message.header.frame_id


def first_picture(codec: str, packets: Iterable[bytes]) -> np.ndarray:
    """(H, W, 3) uint8 RGB of the first picture that comes out of packets. Raises DataError where none does."""
    decoder = Decoder(codec)
    for number, data in enumerate(packets):
        for picture in decoder.send(data, number):
            return picture.rgb()
    for picture in decoder.rest():
        return picture.rgb()
    raise DataError("no picture comes out of its first key frame")


class Film:
    """The first H.264 or H.265 stream of a video file.

    codec  "h264" or "hevc"
    begin  first time of display, in the file's ticks
    span   its length in them, as the file states it; None for a raw stream, whose ticks are packets
    Raises DataError for a file that can't be read or has no such stream.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._raw = RAW.get(path.suffix.lower())
        with self._opened() as (container, stream):
            self.codec = stream.codec_context.name
            self.begin = 0 if self._raw else stream.start_time or 0
            stated = stream.duration or int((container.duration or 1) / (1_000_000 * stream.time_base)) or 1
            self.span = None if self._raw else stated

    def packets(self, from_pts: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(time of display, packet as Annex B) in decoding order, from a key frame not after from_pts on; of a raw
        stream, which has no index, from its beginning, and by the number of the packet. Raises DataError."""
        with self._opened() as (container, stream):
            if self._raw:
                for number, packet in enumerate(_whole(container, stream)):
                    yield number, bytes(packet)
                return
            filtered = BitStreamFilterContext(f"{self.codec}_mp4toannexb", stream)
            for packet in self._sought(container, stream, from_pts):
                for whole in filtered.filter(packet):
                    yield whole.pts, bytes(whole)

    def _sought(self, container: InputContainer, stream: VideoStream, from_pts: int | None) -> Iterator[av.Packet]:
        """Packets from there on. Containers seek by decoding time, which may lead too far: then from the beginning."""
        for pts in (from_pts, self.begin):
            if pts is not None:
                container.seek(max(pts, self.begin), stream=stream, backward=True)
                packets = _whole(container, stream)
                first = next(packets, None)
                if first is not None and (first.pts <= pts or pts == self.begin):
                    yield first
                    yield from packets
                    return

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        try:
            options = {} if self._raw else {"ignore_editlist": "1"}
            with av.open(str(self._path), format=self._raw, options=options,
                         metadata_errors="replace") as container:
                videos = container.streams.video
                codecs = [one.codec_context.name if one.codec_context else "an unknown codec" for one in videos]
                stream = next((one for one, codec in zip(videos, codecs) if codec in DECODERS), None)
                if stream is None:
                    found = ", ".join(codecs) or "no video at all"
                    raise DataError(f"{self._name}: has no stream of H.264 or H.265 video, but {found}\n"
                                    "  write it anew: `ffmpeg -i IN -c:v libx264 OUT.mp4`")
                yield container, stream
        except av.error.FFmpegError as error:
            if error.errno in MACHINE_ERRORS:  # libav says so of many damaged files too
                _read(self._path)
            raise DataError(f"{self._name}: is no video that can be read: {error.strerror}\n  copy it again, or write "
                            "it anew: `ffmpeg -i IN -c copy OUT.mkv`") from None


def _read(path: Path) -> None:
    """Reads the file to its end. Raises OSError where the machine can't."""
    with path.open("rb") as file:
        while file.read(READ_BYTES):
            pass


def _whole(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    return (packet for packet in container.demux(stream) if packet.size)
