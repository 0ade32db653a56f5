"""Recordings of a few messages, made in code, whose every number a person can check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag1 import Writer as Rosbag1Writer
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Rosbag2Writer
from rosbags.typesys import Stores, get_typestore

STORE = get_typestore(Stores.ROS2_HUMBLE)
ROS1_STORE = get_typestore(Stores.ROS1_NOETIC)
T0_US = 1_700_000_000_000_000
TYPES = {name.rsplit("/", 1)[1]: cls for name, cls in STORE.types.items()
         if name.split("/")[0] in ("std_msgs", "builtin_interfaces", "geometry_msgs", "sensor_msgs", "nav_msgs",
                                   "tf2_msgs")}

Event = tuple[str, int, Any]
"""Topic, receive time [ns], message."""


def write(path: Path, events: Iterable[Event], storage: str = "mcap", empty: Mapping[str, str] | None = None) -> Path:
    """A rosbag2 folder with the events in the order given; `empty`: topic -> type without messages."""
    with Rosbag2Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()]) as bag:
        connections = {topic: bag.add_connection(topic, kind, typestore=STORE)
                       for topic, kind in (empty or {}).items()}
        for topic, receive_ns, message in events:
            if topic not in connections:
                connections[topic] = bag.add_connection(topic, message.__msgtype__, typestore=STORE)
            bag.write(connections[topic], receive_ns, STORE.serialize_cdr(message, message.__msgtype__))
    return path


def write_ros1(path: Path, events: Iterable[tuple[str, int, Any]]) -> Path:
    """A ROS 1 bag of messages of ROS1_STORE."""
    with Rosbag1Writer(path) as bag:
        connections = {}
        for topic, receive_ns, message in events:
            if topic not in connections:
                connections[topic] = bag.add_connection(topic, message.__msgtype__, typestore=ROS1_STORE)
            bag.write(connections[topic], receive_ns, ROS1_STORE.serialize_ros1(message, message.__msgtype__))
    return path


def header(stamp_us: int, frame: str = "") -> Any:
    return TYPES["Header"](stamp=TYPES["Time"](sec=stamp_us // 1_000_000, nanosec=stamp_us % 1_000_000 * 1000),
                           frame_id=frame)


def vector(x: float, y: float, z: float) -> Any:
    return TYPES["Vector3"](x=float(x), y=float(y), z=float(z))


def quaternion(w: float, x: float, y: float, z: float) -> Any:
    return TYPES["Quaternion"](x=float(x), y=float(y), z=float(z), w=float(w))


def odometry(stamp_us: int, xyz_m: tuple[float, float, float], yaw_rad: float, *, speed_mps: float = 0.0,
             yaw_rate_radps: float = 0.0, child: str = "base_link") -> Any:
    pose = TYPES["Pose"](position=TYPES["Point"](*map(float, xyz_m)),
                         orientation=quaternion(np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2)))
    twist = TYPES["Twist"](linear=vector(speed_mps, 0, 0), angular=vector(0, 0, yaw_rate_radps))
    return TYPES["Odometry"](header=header(stamp_us, "map"), child_frame_id=child,
                             pose=TYPES["PoseWithCovariance"](pose=pose, covariance=np.zeros(36)),
                             twist=TYPES["TwistWithCovariance"](twist=twist, covariance=np.zeros(36)))


def tf(transforms: Iterable[tuple[str, str, tuple[float, float, float], tuple[float, float, float, float]]]) -> Any:
    """A TFMessage of (parent, child, translation, quaternion wxyz)."""
    return TYPES["TFMessage"](transforms=[
        TYPES["TransformStamped"](header=header(T0_US, parent), child_frame_id=child,
                                  transform=TYPES["Transform"](translation=vector(*xyz), rotation=quaternion(*wxyz)))
        for parent, child, xyz, wxyz in transforms])


def image(stamp_us: int, frame: str = "cam", level: int = 100, size_px: tuple[int, int] = (32, 20)) -> Any:
    pixels = np.full((size_px[1], size_px[0], 3), level, np.uint8)
    return TYPES["CompressedImage"](header=header(stamp_us, frame), format="jpeg",
                                    data=cv2.imencode(".jpg", pixels)[1].ravel())


def camera_info(stamp_us: int, frame: str = "cam", fx: float = 30.0, model: str = "plumb_bob") -> Any:
    roi = TYPES["RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    K = np.array([fx, 0, 16, 0, fx, 10, 0, 0, 1], float)
    return TYPES["CameraInfo"](header=header(stamp_us, frame), height=20, width=32, distortion_model=model,
                               d=np.zeros(5), k=K, r=np.eye(3).ravel(), p=np.zeros(12), binning_x=0, binning_y=0,
                               roi=roi)


def cloud(stamp_us: int, xyz_m: np.ndarray, frame: str = "lidar") -> Any:
    data = np.ascontiguousarray(xyz_m, np.float32)
    fields = [TYPES["PointField"](name=name, offset=4 * number, datatype=7, count=1)
              for number, name in enumerate("xyz")]
    return TYPES["PointCloud2"](header=header(stamp_us, frame), height=1, width=len(data), fields=fields,
                                is_bigendian=False, point_step=12, row_step=12 * len(data),
                                data=data.view(np.uint8).ravel(), is_dense=True)


def fix(stamp_us: int, latitude_deg: float, longitude_deg: float, altitude_m: float, *, sigma_m: float = 0.2,
        status: int = 0, frame: str = "gps") -> Any:
    return TYPES["NavSatFix"](header=header(stamp_us, frame), status=TYPES["NavSatStatus"](status=status, service=1),
                              latitude=float(latitude_deg), longitude=float(longitude_deg), altitude=float(altitude_m),
                              position_covariance=np.eye(3).ravel() * sigma_m**2, position_covariance_type=2)


def imu(stamp_us: int, gyro_radps: tuple[float, float, float]) -> Any:
    return TYPES["Imu"](header=header(stamp_us, "imu"), orientation=quaternion(1, 0, 0, 0),
                        orientation_covariance=np.zeros(9), angular_velocity=vector(*gyro_radps),
                        angular_velocity_covariance=np.zeros(9), linear_acceleration=vector(0, 0, 9.81),
                        linear_acceleration_covariance=np.zeros(9))


def number(value: float) -> Any:
    """A std_msgs/Float32: it has no header."""
    return TYPES["Float32"](data=float(value))
