"""Video: H.264 and H.265 packets to pictures. The one door to PyAV.

A picture that comes out is known by the number of the packet that went in, so that no reordering, loss or delay can
give it another's stamp. One thread a decoder: the same bytes whatever the number of workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from stages.lib.errors import DataError

MSGTYPES = ("foxglove_msgs/msg/CompressedVideo", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket")
NAMES = {**dict.fromkeys(("h264", "h.264", "avc", "avc1", "x264", "libx264"), "h264"),
         **dict.fromkeys(("h265", "h.265", "hevc", "hvc1", "hev1", "x265", "libx265"), "hevc")}
"""What the field calls a codec -> what we do."""

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
        if codec == "hevc":  # libav makes up what is missing: for H.264 it says so, for H.265 only by this error
            self._context.options = {"err_detect": "explode"}

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
