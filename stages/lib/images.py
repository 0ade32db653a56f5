"""Images in and out: sensor_msgs messages and JPEG or PNG bytes to pixels (H, W, 3) uint8 RGB, and back to JPEG.

The door for image codecs. All failures are DataError with what is wrong; the caller knows topic and stamp.
"""

from __future__ import annotations

import re
from typing import Any

import cv2
import numpy as np

from stages.lib.errors import DataError

cv2.setNumThreads(1)  # workers are single-threaded: one worker per core

MAX_PIXELS = 2**27  # the largest cameras of cars have 2**24; decoded, this takes 400 MB
MARKER = re.compile(rb"\xff+([^\xff\0])", re.DOTALL)  # a JPEG's marker, after fill bytes
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
TO_RGB = {
    "rgb8": (3, None), "bgr8": (3, cv2.COLOR_BGR2RGB), "rgba8": (4, cv2.COLOR_RGBA2RGB), "8UC3": (3, cv2.COLOR_BGR2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB), "mono8": (1, cv2.COLOR_GRAY2RGB), "8UC1": (1, cv2.COLOR_GRAY2RGB),
    "uyvy": (2, cv2.COLOR_YUV2RGB_UYVY), "yuv422": (2, cv2.COLOR_YUV2RGB_UYVY),
    "yuyv": (2, cv2.COLOR_YUV2RGB_YUY2), "yuv422_yuy2": (2, cv2.COLOR_YUV2RGB_YUY2),
    # OpenCV names a Bayer pattern by its second row's second and third pixel, ROS by its first row.
    "bayer_rggb8": (1, cv2.COLOR_BayerBG2RGB), "bayer_bggr8": (1, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg8": (1, cv2.COLOR_BayerGR2RGB), "bayer_grbg8": (1, cv2.COLOR_BayerGB2RGB)}
"""ROS encoding -> (bytes a pixel, OpenCV's conversion). sensor_msgs/image_encodings.hpp."""
FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; between them DHT, JPG, DAC
ENDS_HEADER = {0xD9, 0xDA}  # the image's end, or its data
TURBO = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_TURBO)[:, 0, ::-1]  # blue to red, RGB


def from_message(message: Any) -> np.ndarray:
    """Pixels (H, W, 3) uint8 RGB of a decoded sensor_msgs CompressedImage or Image. Raises DataError."""
    if hasattr(message, "format"):
        return decode(message.data, message.format)
    return _from_raw(message)


def jpeg_file(message: Any) -> memoryview | None:
    """The message's own JPEG file; None where it carries another format."""
    if hasattr(message, "format") and bytes(message.data[:3]) == JPEG:
        return message.data.data
    return None


def jpeg_size_px(content: memoryview) -> tuple[int, int] | None:
    """(width, height) by the frame header of a JPEG file that ends with the end mark; None where either is lacking.

    Nothing is decoded: pictures whose coded data is damaged in between pass, as they do in libjpeg, which only warns.
    """
    if bytes(content[-2:]) != b"\xff\xd9":
        return None
    found = size_px(np.frombuffer(content, np.uint8))
    return found if all(found) else None


def decode(content: bytes | memoryview | np.ndarray, what: str = "", halved: bool = False) -> np.ndarray:
    """Pixels (H, W, 3) uint8 RGB of a JPEG or PNG file, as stored: EXIF orientation is not applied.

    halved  half as wide and as high; libjpeg leaves out the high frequencies, which is cheaper than scaling down
    Raises DataError for a cut-off or damaged file, or another format (`what` is the format's declared name).
    """
    data = np.frombuffer(content, np.uint8)
    if not (data[:3].tobytes() == JPEG or data[:8].tobytes() == PNG):
        begin = data[:4].tobytes().hex(" ")
        raise DataError(f"{data.size} bytes that begin with {begin!r} (format {what!r}) are neither JPEG nor PNG")
    width, height = size_px(data)
    if width * height > MAX_PIXELS:
        raise DataError(f"an image that declares {width}x{height} pixels, at most {MAX_PIXELS} are read")
    mode = cv2.IMREAD_REDUCED_COLOR_2 if halved else cv2.IMREAD_COLOR_RGB
    pixels = cv2.imdecode(data, mode | cv2.IMREAD_IGNORE_ORIENTATION) if width * height else None
    if pixels is None:
        raise DataError(f"a damaged or cut-off {'JPEG' if data[0] == JPEG[0] else 'PNG'} of {data.size} bytes")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, pixels) if halved else pixels  # there is no mode for both


def size_px(data: np.ndarray) -> tuple[int, int]:
    """Width and height that a JPEG or PNG file (N,) uint8 declares; 0, 0 where it declares none.

    PNG: ISO/IEC 15948, 11.2.2 (IHDR). JPEG: ITU-T T.81, B.1.1 and B.2.2 (a frame header, SOF0 to SOF15).
    """
    if data[0] == PNG[0]:
        return tuple(int.from_bytes(data[at:at + 4].tobytes(), "big") for at in (16, 20))
    at = 2
    while found := MARKER.search(data, at):
        at, kind = found.end(), found[1][0]
        if kind in FRAME_MARKERS:
            height, width = (int.from_bytes(data[n:n + 2].tobytes(), "big") for n in (at + 3, at + 5))
            return width, height
        if kind in ENDS_HEADER:
            break
        if kind != 1 and not 0xD0 <= kind <= 0xD8:
            at += int.from_bytes(data[at:at + 2].tobytes(), "big")
    return 0, 0


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """A JPEG file of pixels (H, W, 3) uint8 RGB."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def draw_points(pixels: np.ndarray, uv_px: np.ndarray, depth_m: np.ndarray, far_m: float) -> np.ndarray:
    """A copy of pixels (H, W, 3) with points uv_px (N, 2) as dots from red (near) to blue (far_m); near ones on top.

    depth_m (N,): points with depth <= 0 or outside the image are left out.
    """
    height, width = pixels.shape[:2]
    side = max(2, width // 320)
    corner = np.floor(uv_px - (side - 1) / 2)
    seen = (depth_m > 0) & np.all((corner >= 0) & (corner <= np.array([width, height]) - side), axis=1)
    order = np.flatnonzero(seen)[np.argsort(-depth_m[seen], kind="stable")]
    column, row = corner[order].astype(int).T
    level = (255 * (1 - np.clip(depth_m[order] / far_m, 0, 1))).astype(np.uint8)
    drawn = pixels.copy()
    for down in range(side):
        for right in range(side):
            drawn[row + down, column + right] = TURBO[level]
    return drawn


def _from_raw(message: Any) -> np.ndarray:
    if message.encoding not in TO_RGB:
        raise DataError(f"encoding {message.encoding!r} is not one of {', '.join(TO_RGB)}")
    pixel_bytes, conversion = TO_RGB[message.encoding]
    height, width, step = message.height, message.width, message.step
    if not height or not width or step < width * pixel_bytes or message.data.size != height * step:
        raise DataError(f"{message.data.size} bytes, but {width}x{height} {message.encoding} with rows of {step} bytes "
                        "was declared")
    rows = message.data.reshape(height, step)[:, :width * pixel_bytes]
    pixels = np.ascontiguousarray(rows.reshape(height, width, pixel_bytes))
    return pixels if conversion is None else cv2.cvtColor(pixels, conversion)
