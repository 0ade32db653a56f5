"""A rig: what a vehicle's sensors are called, where they are and what their stamps mean. `conf/rig/<name>.yaml`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.lib import knobs
from stages.lib.errors import ConfigError
from stages.lib.knobs import knob


@dataclass(frozen=True)
class Channel:
    """One sensor of the rig, by its nuScenes channel name."""

    modality: str = knob("what it is", choices=("camera", "lidar"))
    topic: str = knob("topic of its data")
    info_topic: str | None = knob("topic of its CameraInfo; null for other sensors")
    rate_hz: float = knob("nominal rate", above=0)
    clock_offset_us: int = knob("added to its stamps to reach the rig's common clock")
    stamp: str = knob("what a stamp means: begin, middle or end of exposure or turn",
                      choices=("begin", "middle", "end"))
    duration_us: int = knob("exposure or turn time, moves `begin` and `end` stamps to the middle", low=0)
    max_gap_us: int = knob("a longer silence is a fault", above=0)
    required: bool = knob("scenes are cut only where this channel is alive")


@dataclass(frozen=True)
class EgoPose:
    """Where the ego pose comes from."""

    source: str = knob("odometry: nav_msgs/Odometry; gnss_imu: fused from NavSatFix and Imu",
                       choices=("odometry", "gnss_imu"))
    topic: str | None = knob("odometry topic")
    gnss_topic: str | None = knob("NavSatFix topic")
    imu_topic: str | None = knob("Imu topic")
    clock_offset_us: int = knob("added to the stamps of these topics to reach the rig's common clock")
    origin_deg: tuple[float, float] | None = knob(
        "latitude and longitude of the map frame's (0, 0), the same for all drives of a location; null for odometry")
    georeferenced: bool = knob("equal coordinates of two drives are one place")
    max_gap_us: int = knob("no pose is interpolated over a longer silence", above=0)


@dataclass(frozen=True)
class Signal:
    """A number of the vehicle's state, read from a field of a topic."""

    topic: str = knob("topic")
    field: str = knob("dotted path to a number in the message")
    scale: float = knob("the field is multiplied by this to reach the unit in the signal's name")
    clock_offset_us: int = knob("added to its stamps to reach the rig's common clock")


@dataclass(frozen=True)
class Mount:
    """T_ego_sensor of a channel, or T_ego_frame of a tf frame that sensors hang on, said by the rig where the
    recording does not say it or says it wrong."""

    translation_m: tuple[float, float, float] = knob("position of the sensor in the ego frame")
    rotation_wxyz: tuple[float, float, float, float] = knob("rotation from the sensor's to the ego frame")


@dataclass(frozen=True)
class Rig:
    """A vehicle's sensors. Channel and signal names are the keys."""

    vehicle: str = knob("name of the vehicle")
    location: str = knob("name of the place, becomes nuScenes' log.location")
    ego_frame: str = knob("tf frame of the vehicle, e.g. base_link")
    channels: dict[str, Channel] = knob("channel name -> sensor")
    ego_pose: EgoPose = knob("source of the ego pose")
    signals: dict[str, Signal] = knob("signal name, with its unit -> where it is")
    mounts: dict[str, Mount] = knob("channel or tf frame -> where it is, instead of the recording's /tf_static")


def load(values: Mapping[str, Any], name: str) -> Rig:
    """The rig from its plain YAML values. Raises ConfigError, also for what is needed together and not there."""
    rig = knobs.load(Rig, values, f"rig.{name}")
    where = f"conf/rig/{name}.yaml"
    for channel, sensor in rig.channels.items():
        if sensor.modality == "camera" and not sensor.info_topic:
            raise ConfigError(f"{where}: channels.{channel}.info_topic is null, but images need their CameraInfo; "
                              "name its topic")
    wanted = ("topic",) if rig.ego_pose.source == "odometry" else ("gnss_topic", "origin_deg")
    for knob_ in wanted:
        if not getattr(rig.ego_pose, knob_):
            raise ConfigError(f"{where}: ego_pose.{knob_} is null, but ego_pose.source {rig.ego_pose.source} needs it")
    for frame, mount in rig.mounts.items():
        norm = math.hypot(*mount.rotation_wxyz)
        if abs(norm - 1) > 1e-3:
            raise ConfigError(f"{where}: mounts.{frame}.rotation_wxyz has the length {norm:.4g}, expected a unit "
                              "quaternion in the order w, x, y, z")
    return rig
