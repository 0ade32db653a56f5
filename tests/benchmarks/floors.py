"""What sampling a reference recording costs at least: bare loops over the same bytes, which know what they will find.

Each reads the wanted messages through the bag library without decoding them, and writes and hashes what is kept, the
clouds as rows of five float32. They check nothing.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import Reader

from stages.lib import calibration
from tests.benchmarks import reference

cv2.setNumThreads(1)
Run = Callable[[Path], None]
Change = Callable[[str, memoryview], bytes | memoryview | None]


def without_images(folder: Path, quality: int) -> Run:
    """Only the clouds are kept; the images are read and left."""
    return lambda out: _pass(folder, out, lambda name, content: None)


def copied(folder: Path, quality: int) -> Run:
    """JPEG files stay as they are."""
    return lambda out: _pass(folder, out, lambda name, content: content)


def undistorted(folder: Path, quality: int) -> Run:
    """Decode, remap, encode."""
    return _remapped(folder, quality, cv2.IMREAD_COLOR, 1.0)


def undistorted_small(folder: Path, quality: int) -> Run:
    """Decode to half the size, remap there, encode."""
    return _remapped(folder, quality, cv2.IMREAD_REDUCED_COLOR_2, 0.5)


def _remapped(folder: Path, quality: int, how: int, scale: float) -> Run:
    maps = _maps(folder, scale)
    saved = np.empty((round(reference.SIZE_PX[1] * scale), round(reference.SIZE_PX[0] * scale), 3), np.uint8)

    def change(name: str, content: memoryview) -> memoryview:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), how | cv2.IMREAD_IGNORE_ORIENTATION)
        return _jpeg(cv2.remap(pixels, *maps[name], cv2.INTER_LINEAR, saved), quality)
    return lambda out: _pass(folder, out, change)


def video(folder: Path, quality: int) -> Run:
    """The `ffmpeg` program decodes each stream with one thread; as many pictures as are kept are encoded."""
    pictures = list(reference.panned(0, num=10))
    num_kept = reference.SCENE_US // 100_000

    def run(out: Path) -> None:
        streams: dict[str, list[bytes]] = {}
        _pass(folder, out, lambda name, content: streams.setdefault(name, []).append(bytes(content)))
        with (out / "jpeg").open("wb", buffering=0) as file:
            for name, packets in streams.items():
                (out / name).write_bytes(b"".join(packets))
                subprocess.run(["ffmpeg", "-nostdin", "-loglevel", "error", "-threads", "1", "-f", "h264",
                                "-i", out / name, "-f", "null", "-"], check=True)
                for number in range(num_kept):
                    file.write(_jpeg(pictures[number % len(pictures)], quality))
    return run


FLOORS = {"copied": copied, "undistorted": undistorted, "undistorted_small": undistorted_small, "video": video}


def plain_read(folder: Path) -> int:
    """Reads the recording's bytes as they lie in its files; how many they are."""
    num_bytes, buffer = 0, bytearray(1 << 20)
    for path in sorted((folder / "bag").iterdir()):
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                num_bytes += got
    return num_bytes


def _pass(folder: Path, out: Path, change: Change) -> None:
    """One pass over the images and clouds; what `change` gives of an image is written, None is not."""
    sha256, topics = hashlib.sha256(), {f"/{name.lower()}/image": name for name in reference.CAMERAS}
    with Reader(folder / "bag") as reader, (out / "kept").open("wb", buffering=0) as file:
        wanted = [c for c in reader.connections if c.topic in topics or c.topic == "/points"]
        for connection, _, data in reader.messages(wanted):
            name = topics.get(connection.topic)
            kept = change(name, _array(data, connection.msgtype)) if name else _rows(data)
            if kept is not None:
                file.write(kept)
                sha256.update(kept)


def _array(data: bytes, msgtype: str) -> memoryview:
    """The byte array of a CDR payload: after stamp, frame_id and format; of video before format."""
    at = _after_text(data, 12)
    at = at if msgtype == reference.VIDEO else _after_text(data, at)
    return memoryview(data)[at + 4:at + 4 + struct.unpack_from("<I", data, at)[0]]


def _rows(data: bytes) -> memoryview:
    """A PointCloud2 payload of the reference layout as rows of five; height and width follow frame_id."""
    height, width = struct.unpack_from("<II", data, _after_text(data, 12))
    rows = np.frombuffer(data, reference.POINT, height * width,
                         len(data) - 1 - height * width * reference.POINT.itemsize)
    points = np.empty((len(rows), 5), np.float32)
    points[:, :3], points[:, 3], points[:, 4] = rows["xyz"], rows["intensity"], rows["ring"]
    return points.data.cast("B")


def _after_text(data: bytes, at: int) -> int:
    end = at + 4 + struct.unpack_from("<I", data, at)[0]
    return end + -end % 4


def _maps(folder: Path, scale: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    maps = {}
    for name, sensor in calibration.read(folder / "ingest/calibration.json").items():
        if sensor.camera:
            K = np.diag([scale, scale, 1]) @ sensor.camera.K
            size_px = round(sensor.camera.width_px * scale), round(sensor.camera.height_px * scale)
            maps[name] = cv2.initUndistortRectifyMap(K, sensor.camera.D, np.eye(3), K, size_px, cv2.CV_16SC2)
    return maps


def _jpeg(pixels: np.ndarray, quality: int) -> memoryview:
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].data.cast("B")
