"""A drive's sensors: which of the rig's channels it has, where they sit, how its cameras see."""

from __future__ import annotations

from typing import Any

import numpy as np

from stages.lib import geometry, images, lidar, packets, video
from stages.lib.bag import Bag, stamp_us
from stages.lib.calibration import CameraModel, Sensor
from stages.lib.cameras import NUM_COEFFICIENTS
from stages.lib.drivelog import DriveLog
from stages.lib.egopose import TYPES, topics
from stages.lib.errors import ConfigError, DataError
from stages.lib.faults import Faults
from stages.lib.frames import Frames
from stages.lib.knobs import near_miss
from stages.lib.rig import Channel, Rig

MSGTYPES = {"camera": ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image", *video.CAMERA_MSGTYPES),
            "lidar": lidar.MSGTYPES}
CAMERA_INFO = ("sensor_msgs/msg/CameraInfo",)
SAME_MODEL = {"fisheye": "equidistant", "": "plumb_bob"}  # what some drivers say instead


def present(bag: Bag, rig: Rig, rig_name: str, faults: Faults) -> dict[str, Channel]:
    """The rig's channels that the recording has; what it lacks and need not have goes to faults.

    Raises DataError where a required channel or the ego pose is missing, empty or of another type.
    """
    channels, conf = {}, f"conf/rig/{rig_name}.yaml"
    for name, channel in sorted(rig.channels.items()):
        wanted = [("topic", channel.topic, MSGTYPES[channel.modality])]
        if channel.info_topic:
            wanted.append(("info_topic", channel.info_topic, CAMERA_INFO))
        for knob, topic, msgtypes in wanted:
            fault, wrong = _lacking(bag, topic, msgtypes)
            if fault and (channel.required or fault == "wrong_type"):
                raise _error(bag, f"{topic} of {name} {wrong}",
                             f"name another in {conf}: channels.{name}.{knob}, or say required: false")
            if fault:
                faults.add(fault, 1, channel=name, topic=topic)
                break
        else:
            channels[name] = channel
    for role, topic in topics(rig.ego_pose).items():
        fault, wrong = _lacking(bag, topic, (TYPES[role],))
        if fault and (role != "imu" or fault == "wrong_type"):
            knob = "topic" if role == "odometry" else f"{role}_topic"
            raise _error(bag, f"{topic} of the ego pose {wrong}", f"name another in {conf}: ego_pose.{knob}")
        if fault:
            faults.add(fault, 1, channel="ego_pose", topic=topic)
    for topic in sorted({signal.topic for signal in rig.signals.values()}):
        fault, _ = _lacking(bag, topic, ())
        if fault:
            faults.add(fault, 1, channel="signals", topic=topic)
    if rig.channels and not channels:
        raise DataError(f"{bag.name}: has none of the channels of rig {rig_name}\n  name its topics in "
                        f"conf/rig/{rig_name}.yaml, or `roadmill scan` it with another --rig")
    return channels


def frames(rig: Rig, log: DriveLog, faults: Faults) -> Frames:
    """The recording's frames, and those that the rig mounts (names that are no channel), which go before."""
    faults.add("transform_replaced", log.transforms.num_replaced, topic="/tf_static")
    for name, mount in sorted(rig.mounts.items()):
        if name not in rig.channels:
            log.transforms.add(rig.ego_frame, name, geometry.transform(
                np.array(mount.translation_m), np.array(mount.rotation_wxyz)))
    return log.transforms


def sensor(bag: Bag, rig: Rig, name: str, log: DriveLog, where: Frames) -> Sensor:
    """A channel's place and camera model; its first message is decoded to see that it can be.

    Raises DataError for a mount or calibration that is not known, and a message that can't be decoded; ConfigError for
    a stamp that single packets can't have.
    """
    channel = rig.channels[name]
    first = log.first.get(channel.topic)
    if first is None:
        held = "no picture" if channel.modality == "camera" else (
            f"no whole turn of a Velodyne lidar, cut behind it, of {packets.PACKET_BYTES} bytes each")
        raise DataError(f"{bag.name}: {name}: the {bag.topics[channel.topic].count} packets of {channel.topic} hold "
                        f"{held}\n  correct the recording, or leave the channel out of the rig")
    if isinstance(first, packets.Turn) and channel.stamp != "end":
        raise ConfigError(f"{bag.name}: channels.{name}.stamp is {channel.stamp}, but {channel.topic} has a packet a "
                          "message, and a turn of them the stamp of its last\n  say `stamp: end` in the rig")
    frame_id = video.frame_id(first)
    stream = log.videos.get(channel.topic)
    if name in rig.mounts:
        mount = rig.mounts[name]
        T = geometry.transform(np.array(mount.translation_m), np.array(mount.rotation_wxyz))
    elif not frame_id:
        raise DataError(f"{bag.name}: {name}: the messages of {channel.topic} name no frame\n"
                        f"  state where it is in the rig: mounts.{name}")
    else:
        T = where.T_ego(rig.ego_frame, frame_id, channel.topic, bag.name)
    try:
        camera = None
        if channel.modality == "lidar":
            lidar.decode(first, stamp_us(first.header))
        else:
            camera = camera_model(log.first[channel.info_topic])
            pixels = stream.first_picture() if stream else images.from_message(first)
            height, width = pixels.shape[:2]
            if (width, height) != (camera.width_px, camera.height_px):
                raise DataError(f"its images are {width}x{height}, its CameraInfo is for "
                                f"{camera.width_px}x{camera.height_px}")
    except DataError as error:
        raise DataError(f"{bag.name}: {name} ({channel.topic}, first message): {error}\n"
                        "  correct the recording, or leave the channel out of the rig") from None
    return Sensor(name, channel.modality, channel.topic, frame_id, T, camera, channel.clock_offset_us, channel.required,
                  stream and stream.video())


def camera_model(message: Any) -> CameraModel:
    """Intrinsics and distortion of a decoded CameraInfo of ROS 2 (k, d) or ROS 1 (K, D).

    Raises DataError where the camera was never calibrated or the distortion model is not known.
    """
    K = np.array(message.k if hasattr(message, "k") else message.K, float).reshape(3, 3)
    D = np.array(message.d if hasattr(message, "d") else message.D, float)
    model = SAME_MODEL.get(message.distortion_model, message.distortion_model)
    if K[0, 0] <= 0 or K[1, 1] <= 0 or not np.isfinite(K).all() or K[2].tolist() != [0, 0, 1]:
        raise DataError(f"CameraInfo holds no calibration: fx {K[0, 0]:g}, fy {K[1, 1]:g}, third row of K "
                        f"{' '.join(f'{value:g}' for value in K[2])}")
    if not np.isfinite(D).all():
        raise DataError(f"CameraInfo holds no calibration: distortion {' '.join(f'{value:g}' for value in D)}")
    if model not in NUM_COEFFICIENTS or len(D) not in NUM_COEFFICIENTS[model]:
        raise DataError(f"CameraInfo has {len(D)} coefficients of the distortion model {message.distortion_model!r}, "
                        f"known are {', '.join(NUM_COEFFICIENTS)}")
    return CameraModel(model, message.width, message.height, K, D)


def _lacking(bag: Bag, topic: str, msgtypes: tuple[str, ...]) -> tuple[str, str]:
    """(fault, what is wrong) of a topic that should be there with one of the types; empty where it is."""
    known = bag.topics.get(topic)
    if known is None:
        return "missing_topic", f"is not in the recording{near_miss(topic, bag.topics)}"
    if not known.count:
        return "empty_topic", "is declared, but has no messages"
    if msgtypes and known.msgtype not in msgtypes:
        return "wrong_type", f"is {known.msgtype}, expected {' or '.join(msgtypes)}"
    return "", ""


def _error(bag: Bag, wrong: str, advice: str) -> DataError:
    alive = [name for name, known in bag.topics.items() if known.count]
    shown = ", ".join(alive[:12]) + (f" and {len(alive) - 12} more" if len(alive) > 12 else "")
    return DataError(f"{bag.name}: {wrong}; topics with messages: {shown or 'none'}\n  {advice}")
