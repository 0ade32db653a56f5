"""A lidar's messages: which types there are, and the cloud of each."""

from __future__ import annotations

from typing import Any

from stages.lib import packets, pointcloud
from stages.lib.pointcloud import Cloud

MSGTYPES = ("sensor_msgs/msg/PointCloud2", packets.SCAN, *packets.SINGLE)


def decode(message: Any, header_us: int) -> Cloud:
    """The cloud of a decoded PointCloud2 or VelodyneScan, or of a Turn of packets. Raises DataError."""
    return (packets if hasattr(message, "packets") else pointcloud).decode(message, header_us)
