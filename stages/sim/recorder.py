"""A drive as a rosbag2 folder with MCAP storage: the one place that writes ROS messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from stages.lib import geometry
from stages.sim.lidar import Sweep

POINT = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4"), ("ring", "<u2"), ("t", "<u4")])
FIELD_TYPES = {"<f4": 7, "<u2": 4, "<u4": 6}    # sensor_msgs/PointField
VEHICLE_TYPES = {
    "autoware_vehicle_msgs/msg/VelocityReport":
        "std_msgs/Header header\nfloat32 longitudinal_velocity\nfloat32 lateral_velocity\nfloat32 heading_rate\n",
    "autoware_vehicle_msgs/msg/SteeringReport": "builtin_interfaces/Time stamp\nfloat32 steering_tire_angle\n",
}


def _typestore() -> Typestore:
    store = get_typestore(Stores.ROS2_HUMBLE)
    for name, text in VEHICLE_TYPES.items():
        store.register(get_types_from_msg(text, name))
    return store


STORE = _typestore()
_PACKAGES = ("std_msgs", "builtin_interfaces", "geometry_msgs", "sensor_msgs", "nav_msgs", "tf2_msgs",
             "autoware_vehicle_msgs")
_T = {name.rsplit("/", 1)[1]: cls for name, cls in STORE.types.items() if name.split("/")[0] in _PACKAGES}


@dataclass(frozen=True)
class Event:
    """A message to be: when the recorder receives it, its topic, and how to make it when its turn has come."""

    receive_ns: int
    topic: str
    make: Callable[[], Any]


def write(folder: Path, events: Iterable[Event], note: str) -> None:
    """The bag `folder` with all events by receive time, message definitions embedded; equal bytes for equal events.

    note: kept as custom data `simulation` in metadata.yaml.
    """
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        bag.set_custom_data("simulation", note)
        connections = {}
        for event in sorted(events, key=lambda event: (event.receive_ns, event.topic)):
            message = event.make()
            if event.topic not in connections:
                connections[event.topic] = bag.add_connection(event.topic, message.__msgtype__, typestore=STORE)
            bag.write(connections[event.topic], event.receive_ns, STORE.serialize_cdr(message, message.__msgtype__))


def _stamp(stamp_us: int) -> Any:
    return _T["Time"](sec=stamp_us // 1_000_000, nanosec=stamp_us % 1_000_000 * 1000)


def _header(stamp_us: int, frame: str) -> Any:
    return _T["Header"](stamp=_stamp(stamp_us), frame_id=frame)


def _vector(x: float, y: float, z: float) -> Any:
    return _T["Vector3"](x=float(x), y=float(y), z=float(z))


def _quaternion(wxyz: np.ndarray) -> Any:
    w, x, y, z = map(float, wxyz)
    return _T["Quaternion"](x=x, y=y, z=z, w=w)


def tf(stamp_us: int, transforms: dict[tuple[str, str], np.ndarray]) -> Any:
    """tf2_msgs/TFMessage of (parent, child) -> T_parent_child (4, 4)."""
    rows = []
    for (parent, child), T in transforms.items():
        xyz, wxyz = geometry.split(T)
        rows.append(_T["TransformStamped"](
            header=_header(stamp_us, parent), child_frame_id=child,
            transform=_T["Transform"](translation=_vector(*xyz), rotation=_quaternion(wxyz))))
    return _T["TFMessage"](transforms=rows)


def image(stamp_us: int, frame: str, jpeg: bytes) -> Any:
    """sensor_msgs/CompressedImage."""
    return _T["CompressedImage"](header=_header(stamp_us, frame), format="jpeg", data=np.frombuffer(jpeg, np.uint8))


def camera_info(stamp_us: int, frame: str, size_px: tuple[int, int], K: np.ndarray, D: tuple[float, ...]) -> Any:
    """sensor_msgs/CameraInfo with the plumb_bob lens."""
    roi = _T["RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return _T["CameraInfo"](header=_header(stamp_us, frame), width=size_px[0], height=size_px[1],
                            distortion_model="plumb_bob", d=np.array(D, float), k=K.ravel(), r=np.eye(3).ravel(),
                            p=np.column_stack([K, np.zeros(3)]).ravel(), binning_x=0, binning_y=0, roi=roi)


def cloud(stamp_us: int, frame: str, turn: Sweep) -> Any:
    """sensor_msgs/PointCloud2 with the fields of POINT; t is the time after the stamp [ns]."""
    points = np.empty(len(turn.xyz_m), POINT)
    points["x"], points["y"], points["z"] = turn.xyz_m.T
    points["intensity"], points["ring"], points["t"] = turn.intensity, turn.ring, turn.offset_ns
    fields = [_T["PointField"](name=name, offset=offset, datatype=FIELD_TYPES[kind.str], count=1)
              for name, (kind, offset) in POINT.fields.items()]
    return _T["PointCloud2"](header=_header(stamp_us, frame), height=1, width=len(points), fields=fields,
                             is_bigendian=False, point_step=POINT.itemsize, row_step=points.nbytes,
                             data=points.view(np.uint8), is_dense=True)


def odometry(stamp_us: int, pose: np.ndarray, speed_mps: float, yaw_rate_radps: float) -> Any:
    """nav_msgs/Odometry of base_link in the map frame, pose (3,) being x, y, yaw; the twist is in base_link."""
    point = _T["Point"](x=float(pose[0]), y=float(pose[1]), z=0.0)
    placed = _T["Pose"](position=point, orientation=_quaternion(geometry.yaw_wxyz(pose[2])))
    twist = _T["Twist"](linear=_vector(speed_mps, 0, 0), angular=_vector(0, 0, yaw_rate_radps))
    spread = np.diag([1e-4] * 6).ravel()
    return _T["Odometry"](header=_header(stamp_us, "map"), child_frame_id="base_link",
                          pose=_T["PoseWithCovariance"](pose=placed, covariance=spread),
                          twist=_T["TwistWithCovariance"](twist=twist, covariance=spread))


def velocity(stamp_us: int, speed_mps: float, yaw_rate_radps: float) -> Any:
    """autoware_vehicle_msgs/VelocityReport."""
    return _T["VelocityReport"](header=_header(stamp_us, "base_link"), longitudinal_velocity=float(speed_mps),
                                lateral_velocity=0.0, heading_rate=float(yaw_rate_radps))


def steering(stamp_us: int, tire_angle_rad: float) -> Any:
    """autoware_vehicle_msgs/SteeringReport."""
    return _T["SteeringReport"](stamp=_stamp(stamp_us), steering_tire_angle=float(tire_angle_rad))
