"""A vehicle's disk of a few small recordings, checkouts whose store is on a test server, and what a bucket is asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import yaml

from stages.store.bucket import Bucket
from stages.tools import config
from tests import tinybags, tinydrive
from tests.servers import Server
from tests.tinybags import T0_US

ROOT = Path(__file__).parents[1]
IMAGE_BYTES = 50_000
RATE_HZ = 5


def checkout(folder: Path, server: Server, bucket: str, store: str = "store") -> Path:
    """A checkout of this code with a rig for tiny drives, whose store is s3://bucket/<store>; nothing is tracked."""
    for name in ("conf", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / "dvc.yaml").write_text("")
    (folder / "conf/rig/tiny.yaml").write_text(yaml.safe_dump({"tiny": tinydrive.RIG}))
    values = yaml.safe_load((folder / "conf/store/s3.yaml").read_text())
    values |= {"url": f"s3://{bucket}/{store}", "dvc_remote": f"s3://{bucket}/dvc", "endpoint": server.endpoint,
               "region": "us-east-1"}
    (folder / "conf/store/s3.yaml").write_text(yaml.safe_dump(values))
    config.write_params(folder)
    return folder


def disk(folder: Path) -> Path:
    """Two rosbag2 folders, one with human labels and a name to stumble over, a ROS 1 bag, and no recording."""
    (folder / "day 1").mkdir(parents=True)
    tinydrive.record(folder / "day 1/drive_ä", tinydrive.stream())
    (folder / "day 1/drive_ä.labels.json").write_text("{}")
    tinybags.write(folder / "drive_b", [("/n", T0_US * 1000, tinybags.number(2.0))])
    tinybags.write_ros1(folder / "old.bag", [("/n", T0_US * 1000, tinybags.number(1.0))])
    (folder / "notes.txt").write_text("sunny")
    return folder


def long_drive(path: Path, seconds: int) -> Path:
    """A rosbag2 folder of MCAP with RATE_HZ random images a second, in chunks of about 1 MiB."""
    dice = np.random.default_rng(0)
    events = []
    for at_us in range(T0_US, T0_US + seconds * 1_000_000, 1_000_000 // RATE_HZ):
        image = tinybags.image(at_us)
        image.data = dice.integers(0, 256, IMAGE_BYTES, np.uint8)
        events.append(("/cam", at_us * 1000, image))
    return tinybags.write(path, events)


class Counted:
    """A bucket that notes what it is asked: (method, name, …)."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        found = getattr(self.bucket, name)
        if not callable(found):
            return found

        def noted(*arguments):
            self.calls.append((name, *arguments))
            return found(*arguments)

        return noted

    def ranges(self, suffix: str) -> list[tuple[int, int]]:
        """What was read of objects whose names end so; forgotten then."""
        found = [(start, stop) for call, name, *rest in self.calls if call == "read_range" and name.endswith(suffix)
                 for start, stop, _ in [rest]]
        self.calls.clear()
        return found
