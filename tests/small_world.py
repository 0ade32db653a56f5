"""One small world, simulated and made once a test run: ten recordings, four of them long enough for a scene."""

import shutil
from pathlib import Path

import pytest

from stages.sim.sensors import Spec
from stages.sim.simulate import simulate
from tests import clones
from tests.clones import run

NUM_DRIVES, NUM_SCENES = 10, 4
NEW = f"drive_{NUM_SCENES:04}"
KNOBS = """
curate: {scene_s: 2.0, min_scene_s: 2.0, rules: {moving: null}}
split: {quotas: {train: 0.5, val: 0.5, test: 0.0}}
sample: {keyframe_hz: 2.0, num_pictures: 4, jpeg_quality: 95}
autolabel: {min_score: 0.1, num_pictures: 3}
train: {steps: 1, batch_size: 1, bn_batches: 1, num_sweeps: 1, pillar_m: 2.5, pillar_channels: 4, stages: [4, 4, 4],
        neck_channels: 4}
"""


@pytest.fixture(scope="session")
def drives(tmp_path_factory) -> Path:
    """Recordings of coarse sensors: long/drive_0000 to 0003, and NEW; six shorter ones without a scene."""
    folder = tmp_path_factory.mktemp("drives")
    coarse = Spec(width_px=96, height_px=54, num_beams=16, num_azimuths=360)
    simulate(folder / "long", NUM_SCENES + 1, 3.0, 0, workers=2, spec=coarse)
    simulate(folder / "short", NUM_DRIVES - NUM_SCENES, 1.0, 1, workers=2, spec=coarse)
    return folder


@pytest.fixture(scope="session")
def world(drives, tmp_path_factory) -> Path:
    """A clone whose every stage has run on the first ten recordings."""
    folder = clones.new_clone(tmp_path_factory.mktemp("world") / "clone", KNOBS)
    shutil.copytree(drives, folder / "data/raw/bags", ignore=lambda place, names: [
        name for name in names if place.endswith("long") and name.startswith(NEW)])
    run(folder, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    run(folder, "dvc", "repro")
    clones.commit(folder, "made")
    return folder
