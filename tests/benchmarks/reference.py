"""The recordings that sampling is measured on, made in code: 20 s of four cameras, a lidar, /tf and odometry as MCAP.

`photographs`  JPEG quality 90, 1280x720 at 10 Hz; some 360 MB
`video`        the same, the cameras as H.264 at 30 Hz (a key frame a second, no reordered frames)
`half_hour`    30 min with small pictures and clouds: for what depends on a scene's place in the recording
Payloads repeat with new stamps where that is cheaper; every picture of `photographs` is one of its own.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import get_types_from_msg

from stages import ingest
from stages.lib import knobs
from stages.lib.stage import Item
from tests import tinybags
from tests.tinybags import STORE, T0_US, TYPES

SCENE_US = 20_000_000
HALF_HOUR_US = 1_800_000_000
MARGIN_US = 300_000  # odometry before and after the sensors
CAMERAS = {"CAM_FRONT": 0.0, "CAM_LEFT": 1.57, "CAM_BACK": 3.14, "CAM_RIGHT": -1.57}  # yaw [rad]
LENS = (-0.28, 0.09, 0.0004, -0.0003, -0.012)
SIZE_PX = (1280, 720)
NUM_BEAMS, NUM_AZIMUTHS = 32, 900
POINT = np.dtype([("xyz", "<f4", 3), ("intensity", "<f4"), ("ring", "<u2"), ("t", "<u4")])
FIELDS = (("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("intensity", 12, 7), ("ring", 16, 4), ("t", 18, 6))
VIDEO = "foxglove_msgs/msg/CompressedVideo"
VIDEO_HZ = 30
STORE.register(get_types_from_msg("builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
                                  VIDEO))


@dataclass(frozen=True)
class Filmed:
    """What the cameras say: camera -> (message type, CDR payloads that take turns)."""

    payloads: dict[str, tuple[str, list[bytes]]]
    period_us: float
    size_px: tuple[int, int]


def photographs(path: Path) -> Path:
    """20 s, 800 JPEG files of about 290 kB."""
    payloads = {name: images(name, [jpeg(frame, 90) for frame in panned(number)])
                for number, name in enumerate(CAMERAS)}
    return write(path, SCENE_US, Filmed(payloads, 100_000, SIZE_PX), NUM_AZIMUTHS)


def video(path: Path) -> Path:
    """20 s, four times the same H.264 stream: 2400 frames."""
    make = STORE.types[VIDEO]
    packets = [np.frombuffer(packet, np.uint8) for packet in h264(panned(0, num=600, step=2))]
    payloads = {name: (VIDEO, [cdr(make(TYPES["Time"](0, 0), name, packet, "h264")) for packet in packets])
                for name in CAMERAS}
    return write(path, SCENE_US, Filmed(payloads, 1_000_000 / VIDEO_HZ, SIZE_PX), NUM_AZIMUTHS)


def half_hour(path: Path) -> Path:
    """30 min of small pictures and clouds."""
    size_px = (320, 180)
    pictures = [jpeg(cv2.resize(frame, size_px, interpolation=cv2.INTER_AREA), 60) for frame in panned(0, num=10)]
    return write(path, HALF_HOUR_US, Filmed({name: images(name, pictures) for name in CAMERAS}, 100_000, size_px), 45)


def panned(seed: int, num: int = 200, step: int = 3) -> Iterator[np.ndarray]:
    """Pictures (720, 1280, 3) uint8 that move to the side: blobs of all sizes and fine grain, as streets have."""
    dice, width = np.random.default_rng(seed), SIZE_PX[0] + num * step
    wide = np.full((SIZE_PX[1], width, 3), 118, np.float32)
    for cell, strength in ((240, 45), (60, 28), (16, 16), (4, 9), (1, 7.2)):
        small = dice.normal(0, strength, (SIZE_PX[1] // cell + 1, width // cell + 1, 3)).astype(np.float32)
        wide += cv2.resize(small, (width, SIZE_PX[1]), interpolation=cv2.INTER_CUBIC)
    wide = wide.clip(0, 255).astype(np.uint8)
    for number in range(num):
        yield np.ascontiguousarray(wide[:, number * step:number * step + SIZE_PX[0]])


def images(name: str, pictures: list[bytes]) -> tuple[str, list[bytes]]:
    """The message type, and CompressedImage payloads."""
    return "sensor_msgs/msg/CompressedImage", [
        cdr(TYPES["CompressedImage"](tinybags.header(0, name), "jpeg", np.frombuffer(content, np.uint8)))
        for content in pictures]


def jpeg(frame: np.ndarray, quality: int) -> bytes:
    return cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def h264(frames: Iterator[np.ndarray]) -> list[bytes]:
    """One packet per frame, Annex B, parameter sets before every key frame."""
    import av  # only the video rows need it
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt, codec.framerate = *SIZE_PX, "yuv420p", VIDEO_HZ
    codec.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "26", "g": str(VIDEO_HZ), "bf": "0",
                     "x264-params": "repeat-headers=1:annexb=1"}
    packets = []
    for frame in frames:
        packets += codec.encode(av.VideoFrame.from_ndarray(frame, "bgr24"))
    return [bytes(packet) for packet in packets + codec.encode(None)]


def cloud(num_azimuths: int, seed: int) -> bytes:
    """A PointCloud2 of 32 beams, 22 bytes a point, with ring and the time within the turn."""
    dice, rows = np.random.default_rng(seed), np.zeros(NUM_BEAMS * num_azimuths, POINT)
    azimuth = np.repeat(np.linspace(0, 2 * np.pi, num_azimuths, endpoint=False), NUM_BEAMS)
    range_m = dice.uniform(3, 60, len(rows))
    rows["xyz"] = np.c_[range_m * np.cos(azimuth), -range_m * np.sin(azimuth), dice.uniform(-2, 3, len(rows))]
    rows["intensity"] = dice.uniform(0, 255, len(rows))
    rows["ring"] = np.tile(np.arange(NUM_BEAMS), num_azimuths)
    rows["t"] = np.repeat(np.arange(num_azimuths) * (100_000_000 // num_azimuths), NUM_BEAMS)
    fields = [TYPES["PointField"](name, offset, kind, 1) for name, offset, kind in FIELDS]
    return cdr(TYPES["PointCloud2"](tinybags.header(0, "LIDAR_TOP"), 1, len(rows), fields, False, POINT.itemsize,
                                    rows.nbytes, np.frombuffer(rows.tobytes(), np.uint8), True))


def cdr(message: Any) -> bytes:
    return bytes(STORE.serialize_cdr(message, message.__msgtype__))


def write(path: Path, span_us: int, cameras: Filmed, num_azimuths: int) -> Path:
    """A rosbag2 folder, MCAP without compression. The car drives 10 m/s along +x."""
    def stamps(first_us: int, period_us: float) -> list[int]:
        return [first_us + round(number * period_us) for number in range(int(span_us // period_us))]

    messages: list[tuple[int, str, int, Callable[[int], bytes]]] = []  # receive time [us], topic, stamp [us], payload
    kinds = {"/odom": "nav_msgs/msg/Odometry", "/points": "sensor_msgs/msg/PointCloud2",
             "/tf": "tf2_msgs/msg/TFMessage", "/tf_static": "tf2_msgs/msg/TFMessage"}

    def add(topic: str, at_us: int, late_us: int, content: Callable[[int], bytes]) -> None:
        messages.append((at_us + late_us, topic, at_us, content))

    add("/tf_static", T0_US - MARGIN_US, 0, lambda _: cdr(tinybags.tf(mounts())))
    for at_us in range(T0_US - MARGIN_US, T0_US + span_us + MARGIN_US, 10_000):
        add("/odom", at_us, 1_000, odometry)
        add("/tf", at_us, 1_000, moved)
    clouds = [cloud(num_azimuths, seed) for seed in range(10)]
    for number, at_us in enumerate(stamps(T0_US, 100_000)):
        add("/points", at_us, 105_000, stamped(clouds[number % len(clouds)]))
    for place, (name, (kind, payloads)) in enumerate(cameras.payloads.items()):
        topic, info = f"/{name.lower()}/image", f"/{name.lower()}/camera_info"
        kinds |= {topic: kind, info: "sensor_msgs/msg/CameraInfo"}
        known = cdr(camera_info(name, cameras.size_px))
        for number, at_us in enumerate(stamps(T0_US + 20_000 * place, cameras.period_us)):
            add(topic, at_us, 30_000, stamped(payloads[number % len(payloads)]))
            add(info, at_us, 30_000, stamped(known))
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        topics = {topic: bag.add_connection(topic, kind, typestore=STORE) for topic, kind in kinds.items()}
        for receive_us, topic, at_us, content in sorted(messages, key=lambda row: row[:2]):
            bag.write(topics[topic], receive_us * 1000, content(at_us))
    return path


def stamped(payload: bytes) -> Callable[[int], bytes]:
    """The CDR payload with another leading stamp."""
    def content(at_us: int) -> bytes:
        return payload[:4] + struct.pack("<iI", at_us // 1_000_000, at_us % 1_000_000 * 1000) + payload[12:]
    return content


def odometry(at_us: int) -> bytes:
    return cdr(tinybags.odometry(at_us, (10e-6 * (at_us - T0_US), 0, 0), 0.0, speed_mps=10.0))


def moved(at_us: int) -> bytes:
    return cdr(tinybags.tf([("map", "base_link", (10e-6 * (at_us - T0_US), 0, 0), (1, 0, 0, 0))]))


def camera_info(name: str, size_px: tuple[int, int]) -> Any:
    width, height = size_px
    f_px = 0.72 * width
    message = tinybags.camera_info(0, name)
    message.width, message.height, message.d = width, height, np.array(LENS)
    message.k = np.array([f_px, 0, width / 2 + 7.5, 0, f_px, height / 2 - 3.5, 0, 0, 1])
    return message


def mounts() -> list[tuple[str, str, tuple[float, float, float], tuple[float, float, float, float]]]:
    """Cameras around the roof, looking out; the lidar in their middle."""
    rows = [("base_link", "LIDAR_TOP", (1.0, 0.0, 1.8), (1.0, 0.0, 0.0, 0.0))]
    for name, yaw in CAMERAS.items():
        c, s = np.cos(yaw / 2) / 2, np.sin(yaw / 2) / 2
        rows.append(("base_link", name, (1 + np.cos(yaw), np.sin(yaw), 1.6), (c + s, -c - s, c - s, s - c)))
    return rows


def rig() -> dict[str, Any]:
    """The vehicle, as conf/rig describes one."""
    channel = {"clock_offset_us": 0, "stamp": "middle", "duration_us": 0, "max_gap_us": 350_000, "required": True,
               "rate_hz": 10.0}
    return {
        "vehicle": "car", "location": "town", "ego_frame": "base_link", "signals": {
            "speed_mps": {"topic": "/odom", "field": "twist.twist.linear.x", "scale": 1.0, "clock_offset_us": 0}},
        "channels": {"LIDAR_TOP": {**channel, "modality": "lidar", "topic": "/points", "info_topic": None,
                                   "stamp": "begin", "duration_us": 100_000},
                     **{name: {**channel, "modality": "camera", "topic": f"/{name.lower()}/image",
                               "info_topic": f"/{name.lower()}/camera_info"} for name in CAMERAS}},
        "ego_pose": {"source": "odometry", "topic": "/odom", "gnss_topic": None, "imu_topic": None, "origin_deg": None,
                     "clock_offset_us": 0, "georeferenced": False, "max_gap_us": 200_000}, "mounts": {}}


def ready(make: Callable[[Path], Path], folder: Path) -> Path:
    """`folder` with the recording, kept from run to run, and what ingest makes of it now."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bag/metadata.yaml").exists():
        shutil.rmtree(folder / "bag", ignore_errors=True)
        make(folder / "bag")
    shutil.rmtree(folder / "ingest", ignore_errors=True)
    (folder / "ingest").mkdir()
    item = Item("drive", {"drive_name": "drive", "drive_token": "d" * 32, "recording_digest": "0" * 64,
                          "rig_name": "reference", "rig": rig()}, {})
    ingest.run(knobs.load(ingest.Knobs, {"rig": {}, "max_failed_ratio": 0.0}, "ingest"), item,
               {"recording": folder / "bag"}, folder / "ingest")
    return folder


def scene(folder: Path, start_us: int = T0_US) -> tuple[Item, dict[str, Path]]:
    """A scene of 20 s, as the sample stage plans it, and the files it reads."""
    item = Item("drive-1", {"scene_token": "5" * 32, "scene_name": "drive-1", "drive_token": "d" * 32,
                            "drive_name": "drive", "start_us": start_us, "end_us": start_us + SCENE_US,
                            "pose_gaps_us": []}, {})
    tables = {name: folder / f"ingest/{name}.parquet" for name in ("index", "trajectory", "signals")}
    return item, {"recording": folder / "bag", "calibration": folder / "ingest/calibration.json", **tables}
