"""Video whose pictures carry their number: a bar code of ten bits in the upper rows, a pattern that moves below.

Messages are those of the three kinds that bring video, around the packets of libx264 and libx265.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import yaml
from rosbags.typesys import get_types_from_msg

from tests import tinybags
from tests.tinybags import STORE

SIZE_PX = (160, 96)
BITS = 10
KINDS = ("video", "ffmpeg", "image")
STORE.register(get_types_from_msg(
    "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
    "foxglove_msgs/msg/CompressedVideo"))
STORE.register(get_types_from_msg(
    "std_msgs/Header header\nint32 width\nint32 height\nstring encoding\nuint64 pts\nuint8 flags\nbool is_bigendian\n"
    "uint8[] data\n", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket"))
VIDEO, FFMPEG = (STORE.types[name] for name in (
    "foxglove_msgs/msg/CompressedVideo", "ffmpeg_image_transport_msgs/msg/FFMPEGPacket"))


@dataclass(frozen=True)
class Packet:
    """One packet in decoding order. number: of its picture, in order of display."""

    data: bytes
    number: int
    is_key: bool


def picture(number: int, size_px: tuple[int, int] = SIZE_PX) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the bar code of `number` above, blocks that move 3 px a picture below."""
    width, height = size_px
    tiles = np.random.default_rng(7).integers(40, 216, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    pixels = np.roll(tiles.repeat(8, 0).repeat(8, 1)[:height, :width], 3 * number, 1)
    for bit in range(BITS):
        left, right = width * bit // BITS, width * (bit + 1) // BITS
        pixels[:height // 3, left:right] = 235 * (number >> bit & 1) + 10
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number in a picture (H, W, 3), whatever became of it in between; -1 where the bars are no bars."""
    height, width = pixels.shape[:2]
    levels = [pixels[height // 12:height // 4, width * (4 * bit + 1) // (4 * BITS):width * (4 * bit + 3) // (4 * BITS)]
              .mean() for bit in range(BITS)]
    if any(60 < level < 190 for level in levels):
        return -1
    return sum(int(level > 128) << bit for bit, level in enumerate(levels))


def encode(codec: str, pictures: Iterable[np.ndarray], *, gop: int = 10, num_b: int = 0, options: str = "",
           matrix: int = 0, is_full: bool | None = None) -> list[Packet]:
    """Packets of pictures with a key frame every `gop`, Annex B.

    matrix   1: BT.709, 6: BT.601 (ITU-T H.273); 0: BT.601, not stated
    is_full  range 0 to 255 or 16 to 235; None: that, not stated
    """
    pictures = list(pictures)
    context = av.CodecContext.create({"h264": "libx264", "hevc": "libx265"}[codec], "w")
    context.pix_fmt, context.thread_count = "yuv420p", 1
    context.time_base, context.framerate = Fraction(1, 30), Fraction(30, 1)
    context.gop_size, context.max_b_frames = gop, num_b
    rules = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={num_b}{options}"
    context.options = {"preset": "veryfast", "crf": "18"} | (
        {"x264-params": rules} if codec == "h264" else
        {"x265-params": f"{rules}:log-level=none:pools=none:frame-threads=1:repeat-headers=1"})
    context.colorspace, context.color_range = matrix or 2, 0 if is_full is None else 1 + is_full
    context.height, context.width = pictures[0].shape[:2]
    packets = []
    for number, pixels in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(_yuv(pixels, matrix, bool(is_full)), "yuv420p")
        frame.colorspace, frame.color_range = context.colorspace, context.color_range
        frame.pts = number
        packets += context.encode(frame)
    packets += context.encode(None)
    return [Packet(bytes(packet), packet.pts, packet.is_keyframe) for packet in packets]


def _yuv(pixels: np.ndarray, matrix: int, is_full: bool) -> np.ndarray:
    """(H * 3 / 2, W) uint8 of planes Y, U, V one after another; ITU-T H.273, 8.3."""
    red, green, blue = np.moveaxis(pixels / 255, 2, 0)
    kr, kb = (0.2126, 0.0722) if matrix == 1 else (0.299, 0.114)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    height, width = luma.shape
    halves = [plane.reshape(height // 2, 2, width // 2, 2).mean((1, 3)) for plane in chroma]
    scale, offset, span = (255, 0, 255) if is_full else (219, 16, 224)
    planes = [scale * luma + offset, *(span * half + 128 for half in halves)]
    return np.concatenate([plane.ravel() for plane in planes]).round().astype(np.uint8).reshape(-1, width)


def numbered(codec: str, count: int, size_px: tuple[int, int] = SIZE_PX, **how: Any) -> list[Packet]:
    """Packets of pictures 0, 1, 2, … that carry their number."""
    return encode(codec, (picture(number, size_px) for number in range(count)), **how)


def message(kind: str, codec: str, data: bytes, stamp_us: int, frame: str = "cam") -> Any:
    """One of the KINDS of messages around a packet."""
    header, content = tinybags.header(stamp_us, frame), np.frombuffer(data, np.uint8)
    if kind == "video":
        return VIDEO(timestamp=header.stamp, frame_id=frame, data=content,
                     format={"hevc": "h265"}.get(codec, codec))
    if kind == "ffmpeg":
        return FFMPEG(header=header, width=0, height=0, encoding=f"{codec};yuv420p;bgr8;bgr8", pts=0, flags=0,
                      is_bigendian=False, data=content)
    return tinybags.TYPES["CompressedImage"](header=header, format=codec, data=content)


def camera_info(stamp_us: int, size_px: tuple[int, int] = SIZE_PX, D: tuple[float, ...] = (0.0,) * 5) -> Any:
    """CameraInfo of a camera of that size, 80 px focal length."""
    info = tinybags.camera_info(stamp_us)
    info.width, info.height = size_px
    info.k = np.array([80, 0, size_px[0] / 2 - 0.5, 0, 80, size_px[1] / 2 - 0.5, 0, 0, 1], float)
    info.d = np.array(D, float)
    return info


def jpeg(number: int, stamp_us: int) -> Any:
    """A CompressedImage of the picture."""
    content = cv2.imencode(".jpg", picture(number)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].ravel()
    return tinybags.TYPES["CompressedImage"](header=tinybags.header(stamp_us, "cam"), format="jpeg", data=content)


def write_file(path: Path, codec: str, packets: Sequence[Packet], audio_first: bool = False) -> Path:
    """A video file of the packets at 30 Hz: a container by its suffix, or the raw stream."""
    if path.suffix not in (".mp4", ".mkv"):
        path.write_bytes(b"".join(packet.data for packet in packets))
        return path
    raw = io.BytesIO(b"".join(packet.data for packet in packets))
    with av.open(str(path), "w") as file, av.open(raw, format=codec) as template:
        if audio_first:
            sound = file.add_stream("aac", rate=48_000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 48_000, 0
        stream = file.add_stream_from_template(template.streams.video[0])
        if audio_first:
            file.mux(sound.encode(silence))
        for turn, packet in enumerate(packets):
            made = av.Packet(packet.data)
            made.stream, made.time_base = stream, Fraction(1, 30)
            made.pts, made.dts, made.is_keyframe = packet.number + 4, turn, packet.is_key
            file.mux(made)
        if audio_first:
            file.mux(sound.encode(None))
    return path


def write_camera_info(path: Path, size_px: tuple[int, int] = SIZE_PX, D: tuple[float, ...] = (0.0,) * 5) -> Path:
    """A calibration as ROS' camera_calibration writes it."""
    info = camera_info(0, size_px, D)
    path.write_text(yaml.safe_dump({
        "camera_name": "cam", "image_width": size_px[0], "image_height": size_px[1], "distortion_model": "plumb_bob",
        "camera_matrix": {"rows": 3, "cols": 3, "data": info.k.tolist()},
        "distortion_coefficients": {"rows": 1, "cols": 5, "data": list(D)}}))
    return path
