"""What a sensor's message becomes in a pack: a JPEG file or a `.pcd.bin`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from stages.lib import images, lidar, pack, pointcloud
from stages.lib.bag import stamp_us
from stages.lib.calibration import Sensor
from stages.lib.cameras import Rectifier
from stages.lib.errors import DataError
from stages.lib.poses import Poses

TURN_SLACK = 1.1  # a turn may take that much longer than the median one
MIN_TURN_RATIO = 0.02  # points of a PointCloud2 span at least that much of it, or their times have another unit


class CameraFiles:
    """JPEG files of a camera's CompressedImage or Image messages."""

    msgtypes = ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image")

    def __init__(self, rectifier: Rectifier, jpeg_quality: int) -> None:
        self._rectifier = rectifier
        self._jpeg_quality = jpeg_quality

    def content(self, message: Any, at_us: int) -> bytes | memoryview:
        """The image as it is to be saved; the message's own bytes where they are a JPEG and nothing changes the image.

        Raises DataError for an image that can't be decoded or has not the size that its calibration is for. Of a JPEG
        that is copied only the frame header and the end mark are looked at; one that lacks them is decoded to be sure.
        """
        rectifier, jpeg = self._rectifier, images.jpeg_file(message)
        size_px = images.jpeg_size_px(jpeg) if jpeg else None
        if size_px is None:
            saved = rectifier.apply(images.from_message(message))
            return jpeg if jpeg and not rectifier.changes else images.encode_jpeg(saved, self._jpeg_quality)
        rectifier.check(size_px)
        if not rectifier.changes:
            return jpeg
        pixels = images.decode(jpeg, halved=rectifier.halves)
        return images.encode_jpeg(rectifier.apply(pixels, rectifier.halves), self._jpeg_quality)


class LidarFiles:
    """Files of float32 rows x, y, z, intensity, ring of a lidar's clouds and scans of packets, in the sensor frame.

    poses      where points are moved to the message's stamp by the ego motion; None: they stay as measured
    period_us  a turn's usual time
    counts     num_invalid_points and num_clouds_without_{intensity,ring,time} are counted here
    """

    msgtypes = lidar.MSGTYPES

    def __init__(self, sensor: Sensor, poses: Poses | None, period_us: float, counts: Counter[str]) -> None:
        self._sensor = sensor
        self._poses = poses
        self._turn_us = TURN_SLACK * period_us
        self._counts = counts

    def content(self, message: Any, at_us: int) -> bytes:
        """The points as they are to be saved; at_us is the message's stamp in the index, on the common clock.

        Raises DataError for a cloud that can't be decoded, or whose points were measured at times that no turn has.
        """
        header_us = stamp_us(message.header)
        cloud = lidar.decode(message, header_us)
        self._counts["num_invalid_points"] += cloud.num_dropped
        self._counts.update(f"num_clouds_without_{what}" for what in cloud.missing)
        points = cloud.points
        if self._poses is not None and cloud.after_us is not None:
            since_us = cloud.after_us + (header_us + self._sensor.clock_offset_us - at_us)
            self._check(since_us, 0 if hasattr(message, "packets") else MIN_TURN_RATIO)
            points[:, :3] = pointcloud.compensate(points[:, :3], since_us, at_us, self._poses,
                                                  T_ego_sensor=self._sensor.T_ego_sensor)
        return pack.points_bytes(points)

    def _check(self, since_us: np.ndarray, min_ratio: float) -> None:
        first, last = since_us.min(), since_us.max()
        if max(-first, last) > self._turn_us or last - first < min_ratio * self._turn_us:
            raise DataError(f"its points say they were measured {first / 1e3:.3f} to {last / 1e3:.3f} ms after the "
                            f"stamp, a turn takes {self._turn_us / TURN_SLACK / 1e3:.1f} ms\n"
                            "  correct stamp and clock_offset_us in the rig, or set sample.motion_compensate=false")
