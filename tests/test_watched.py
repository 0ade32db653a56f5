"""No stage uses what it did not declare: files, programs, the network, the environment, the clock, chance."""

import ast
import re
import shutil
import struct
from pathlib import Path

import polars as pl
import pytest

from stages.harness import STAGES
from stages.sim.sensors import Spec
from stages.sim.simulate import simulate
from stages.store import code
from tests import clones, watched

ROOT = Path(__file__).parents[1]
KNOBS = """
curate: {scene_s: 2.0, min_scene_s: 2.0, rules: {moving: max_speed_mps >= 0}}
split: {quotas: {train: 0.5, val: 0.5, test: 0.0}}
sample: {keyframe_hz: 2.0, num_pictures: 1}
autolabel: {min_score: 0.1, num_pictures: 1}
train: {steps: 1, batch_size: 1, bn_batches: 1, num_sweeps: 1, pillar_m: 2.5, pillar_channels: 4, stages: [4, 4, 4],
        neck_channels: 4}
"""
COARSE = Spec(width_px=96, height_px=54, num_beams=16, num_azimuths=360)
PPM = b"P6 1 1 255\n" + struct.pack("3B", 1, 2, 3)
# what -> stage, a use of what was not declared, and how it is then found
PLANTED = {
    "by Python": ("split", "Path('params.yaml').read_text()", "openat", r"/params\.yaml$"),
    "by Python, a listing": ("curate", "list(Path('conf/rig').glob('*.yaml'))", "openat", r"/conf/rig$"),
    "by OpenCV": ("sample", "cv2.imread('planted.ppm')", "openat", r"/planted\.ppm$"),
    "by NumPy, mapped": ("split", "np.memmap('planted.ppm', mode='r')", "openat", r"/planted\.ppm$"),
    "by polars, of another stage": ("sample", "pl.read_parquet('data/curate/scenes.parquet')", "openat",
                                    r"/data/curate/scenes\.parquet$"),
    "by duckdb": ("curate", "__import__('duckdb').sql(\"FROM 'planted.csv'\").fetchall()", "openat",
                  r"/planted\.csv$"),
    "a file that is not there": ("split", "Path('planted.yaml').exists()", "newfstatat", r"/planted\.yaml$"),
    "a program": ("split", "__import__('subprocess').run(['true'])", "execve", r"/true$"),
    "the network": ("split", "__import__('socket').socket().connect_ex(('127.0.0.1', 9))", "connect", r"htons\(9\)"),
    "written beside": ("split", "Path('planted.txt').write_text('')", "openat", r"/planted\.txt$"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[watched.Finding]]:
    """A checkout in which all stages ran on two drives, and what was found."""
    watched.strace()
    folder = clones.new_clone(tmp_path_factory.mktemp("watched"), KNOBS)
    simulate(folder / "data/raw/bags", 2, 3.0, 0, workers=2, spec=COARSE)
    clones.run(folder, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    (folder / "planted.ppm").write_bytes(PPM)
    (folder / "planted.csv").write_text("a\n1\n")
    return folder, watched.watch(folder, *STAGES)


@pytest.fixture(scope="module")
def planted(world, tmp_path_factory) -> list[watched.Finding]:
    """What is found where stages have undeclared uses planted."""
    folder = shutil.copytree(world[0], tmp_path_factory.mktemp("planted") / "clone", symlinks=True)
    stages = {stage for stage, *_ in PLANTED.values()}
    for stage in stages:
        plant(folder / f"stages/{stage}.py", [use for other, use, *_ in PLANTED.values() if other == stage])
    return watched.watch(folder, *sorted(stages, key=STAGES.index))


def plant(path: Path, uses: list[str]) -> None:
    """Makes the stage's `run` begin with the expressions."""
    tree = ast.parse(path.read_text())
    (run,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    run.body[:0] = ast.parse("\n".join(uses)).body
    tree.body[2:2] = ast.parse("import cv2\nimport numpy as np\nimport polars as pl\nfrom pathlib import Path").body
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))


def test_stages_use_only_what_they_declare(world):
    assert world[1] == []


def test_the_watched_stages_did_their_work(world):
    assert pl.read_parquet(world[0] / "data/merge/tables/scene.parquet").height == 2
    assert (world[0] / "data/evaluate").is_dir()


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_use_is_found(planted, what):
    stage, _, call, pattern = PLANTED[what]
    assert any(one.call == call and re.search(pattern, one.what) and one.during.startswith(f"{stage} run")
               for one in planted), planted


# what no system call shows --------------------------------------------------------------------------------------------
UNDECLARED = re.compile(
    r"os\.(environ|getenv|urandom|getpid|uname|cpu_count|getlogin)|(os|Path)\.(getcwd|cwd|home)|getpass\.|locale\.|"
    r"time\.(?!strptime|strftime|gmtime)|(datetime\.)?(datetime|date)\.(now|utcnow|today)|random\.(?!default_rng|Generator)|"
    r"(np|numpy)\.random\.(?!default_rng|Generator)|uuid\.|secrets\.|socket\.|platform\.|tempfile\.gettempdir|"
    r"urllib\.|requests\.|torch\.(rand|randn|randint|randperm|seed|initial_seed)$")


# When a state is kept, and where the processes of one training meet: never what is learned, as test_checkpoints holds.
MAY_ASK = {"stages/lib/checkpoints.py", "stages/lib/ranks.py"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_asks_neither_environment_nor_clock_nor_chance(stage):
    for path in sorted({*code.source_files(ROOT, f"stages.{stage}")} - MAY_ASK):
        assert not list(undeclared(ROOT / path)), path


@pytest.mark.parametrize("line", ["os.environ['HOME']", "os.getenv('HOME')", "from os import environ", "time.time()",
                                  "datetime.now()", "datetime.datetime.now()", "np.random.rand(3)", "Path.cwd()",
                                  "import random\nrandom.random()", "from time import time", "torch.rand(3)"])
def test_each_of_these_would_be_found(line, tmp_path):
    (tmp_path / "stage.py").write_text(line)
    assert list(undeclared(tmp_path / "stage.py"))


def undeclared(path: Path) -> list[str]:
    """Dotted names of a module that say something about this machine, this moment or chance."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return [name for name in names if UNDECLARED.match(name)]
