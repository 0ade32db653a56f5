"""The laws of this repository: who may import whom, one door per library, configuration and graph in step."""

import ast
import re
from pathlib import Path

import pytest
import typer
import yaml
from scmrepo.git import Git

from stages.harness import DATA_FOLDERS, ITEM_STAGES, STAGES, module_of
from stages.lib import knobs, rig
from stages.store import code
from stages.tools import cli, config

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "stages").rglob("*.py"))

# who -> whom of this repository they may import
MAY_IMPORT = {
    "stage": {"lib"},
    "lib": {"lib"},
    "sim": {"lib", "sim"},
    "store": {"lib", "store"},
    "runners": {"lib", "runners"},
    "harness": {"lib", "store", "runners", "stage"},
    "tools": {"lib", "store", "runners", "stage", "harness", "tools", "sim"},
}
# library -> the files that may import it
DOORS = {
    "rosbags": {"stages/lib/bag.py", "stages/sim/recorder.py"},
    "av": {"stages/lib/video.py"},
    "velodyne_decoder": {"stages/lib/packets.py"},
    "pebble": {"stages/runners/local.py"},
    "hydra": {"stages/tools/config.py"},
    "dvc": {"stages/tools/history.py"},
    "typer": {"stages/tools/cli.py", "stages/tools/store_words.py"},
    "jinja2": {"stages/lib/report.py"},
    "obstore": {"stages/store/bucket.py"},
    "boto3": {"stages/store/bucket.py"},
    "botocore": {"stages/store/bucket.py", "stages/store/resumable.py"},
}


def part_of(module: str) -> str:
    """Which part of the house a dotted module belongs to."""
    names = module.split(".")
    if len(names) == 1:
        return "harness"
    if names[1] in MAY_IMPORT:
        return names[1]
    return "harness" if names[1] in ("harness", "__main__") else "stage"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_module_imports_only_what_its_part_of_the_house_may(path):
    own = part_of(".".join(path.with_suffix("").parts))
    for name in imports_of(path):
        if name.startswith("stages."):
            assert part_of(name) in MAY_IMPORT[own] or (own == "harness" and part_of(name) == "harness"), name


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library):
    users = {str(path) for path in SOURCES if any(name.split(".")[0] == library for name in imports_of(path))}
    assert users <= DOORS[library]


def test_sample_workers_load_no_torch():
    for stage in ("ingest", "sample", "autolabel"):
        for path in code.source_files(ROOT, f"stages.{stage}"):
            heavy = {"torch", "nuscenes", "onnx"} & {name.split(".")[0] for name in imports_of(Path(path))}
            assert not heavy, f"{stage} loads {heavy} through {path}"


def test_params_are_the_composition_of_conf():
    assert (ROOT / "params.yaml").read_text() == config.compose(ROOT), "run `roadmill compose`"


@pytest.mark.parametrize("stage", STAGES)
def test_every_knob_is_set_and_in_range(stage):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert knobs.load(module_of(stage).Knobs, params[stage], stage)


CHOICES = sorted(path.relative_to(ROOT / "conf") for group in (*STAGES, "experiment")
                 for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_of_conf_composes_and_loads(choice):
    params = yaml.safe_load(config.compose(ROOT, [f"{choice.parent}={choice.stem}"]))
    for stage in STAGES:
        assert knobs.load(module_of(stage).Knobs, params[stage], stage)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "rig").glob("*.yaml")))
def test_every_rig_loads_under_its_own_name(name):
    values = yaml.safe_load((ROOT / "conf" / "rig" / f"{name}.yaml").read_text())
    assert list(values) == [name]
    assert rig.load(values[name], name)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_exactly_the_code_and_the_data_that_a_stage_reads(stage):
    entry = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    data = [DATA_FOLDERS[name] for name in module_of(stage).INPUTS]
    assert sorted(entry["deps"]) == sorted([*code.source_files(ROOT, f"stages.{stage}"), "constraints.txt", *data])
    assert entry["cmd"] == f"python -m stages {stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_of_many_items_are_known_as_such(stage):
    assert (stage in ITEM_STAGES) == hasattr(module_of(stage), "plan")
    entry = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    assert entry["params"] == ([stage, "cache"] if stage in ITEM_STAGES else [stage])


def test_packages_have_no_code_that_the_code_digest_would_not_see():
    for path in SOURCES:
        if path.name == "__init__.py":
            body = ast.parse((ROOT / path).read_text()).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


def test_every_package_that_stages_import_is_pinned():
    pins = code.read_pins(ROOT / "constraints.txt")
    for stage in STAGES:
        assert code.code_digest(ROOT, f"stages.{stage}", "run", pins)


def names_of(app: typer.Typer) -> set[str]:
    return {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_readme_names_only_words_that_roadmill_has():
    words = names_of(cli.app)
    for group in cli.app.registered_groups:
        words |= {f"{group.typer_instance.info.name} {word}" for word in names_of(group.typer_instance)}
    groups = "|".join(group.typer_instance.info.name for group in cli.app.registered_groups)
    named = set(re.findall(rf"roadmill ((?:(?:{groups}) )?[a-z]+)", (ROOT / "README.md").read_text()))
    assert named <= words
    assert words <= named, "a word that the README does not mention"


def test_dvc_sees_its_files_beside_the_ignored_folders():
    git = Git(str(ROOT))
    assert not git.is_ignored(f"{ROOT / 'data'}/")
    assert not git.is_ignored(str(ROOT / "data/recordings.dvc"))
    assert git.is_ignored(f"{ROOT / 'data/recordings'}/")


def test_nothing_is_committed_that_a_stage_makes():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"/{folder}/" for folder in (*DATA_FOLDERS.values(), "data/store", "data/raw")} <= set(ignored)
