"""A few short drives of the simulator, made once per test run, for the tests that need a recording."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from stages.sim.sensors import Spec
from stages.sim.simulate import simulate

SPEC = Spec(width_px=160, height_px=90, num_beams=32, num_azimuths=360)


def tiny_world(tmp: Path, num_drives: int = 3) -> Path:
    """A fresh copy, in `tmp`/drives, of drives of 4 s with small images: drive_0000 (labels for its first half),
    drive_0001 (no labels), drive_0002 (labels throughout), … as the simulator makes them, on different streets."""
    return shutil.copytree(_made(num_drives), tmp / "drives")


@cache
def _made(num_drives: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="roadmill-tiny-world-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    simulate(folder, num_drives, 4.0, seed=0, workers=1, spec=SPEC)
    return folder
