"""`roadmill doctor`: is this checkout, this machine and this store fit to run?"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

from stages.harness import Harness
from stages.lib import recordings, sources
from stages.lib.errors import ConfigError, RoadmillError
from stages.store import code
from stages.tools import config

LOW_DISK_BYTES = 5 * 2**30


def examine(root: Path) -> list[tuple[str, str]]:
    """(what was looked at, what is wrong and the command that helps, or '' where it is right)."""
    checks = {"pinned packages": _packages, "params.yaml": _params, "dvc.yaml": _graph, "dvc.lock": _lock,
              "recordings": _recordings, "store": _store, "git": _git}
    return [(name, _text(check, root)) for name, check in checks.items()]


def _text(check: Callable[[Path], None], root: Path) -> str:
    try:
        check(root)
    except RoadmillError as error:
        return str(error)
    return ""


def _packages(root: Path) -> None:
    code.check_installed(code.read_pins(root / "constraints.txt"))


def _params(root: Path) -> None:
    path = root / "params.yaml"
    if not path.exists() or path.read_text() != config.compose(root):
        raise ConfigError("it is not the composition of conf/: an applied experiment, or conf/ was edited\n"
                          "  `roadmill compose` takes conf/, `roadmill record NAME` keeps the experiment")


def _graph(root: Path) -> None:
    graph = yaml.safe_load((root / "dvc.yaml").read_text())
    for stage, entry in graph["stages"].items():
        listed = {dep for dep in entry["deps"] if dep.startswith("stages/")}
        if listed != set(code.source_files(root, f"stages.{stage}")):
            raise ConfigError(f"{stage} does not depend on exactly the code it imports\n  `roadmill compose` mends it")


def _lock(root: Path) -> None:
    path = root / "dvc.lock"
    if not path.exists():
        return
    try:
        whole = isinstance(yaml.safe_load(path.read_text()).get("stages"), dict)
    except (yaml.YAMLError, AttributeError):
        whole = False
    if not whole:
        raise ConfigError("it is torn, as after a kill while it was written\n"
                          "  `git checkout dvc.lock`, or delete it; then `dvc repro`: the store has what was done")


def _recordings(root: Path) -> None:
    harness = Harness(root)
    hashes = sources.Hashes(root)
    for recording in recordings.read(root / "data" / "recordings"):
        sources.locate(recording, harness.site.sources.values(), hashes)
    hashes.save()


def _store(root: Path) -> None:
    place = Harness(root).site.store
    place.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < LOW_DISK_BYTES:
        raise ConfigError(f"{place} has {free_bytes / 2**30:.1f} GiB left\n  free some, or name another in conf/store/")


def _git(root: Path) -> None:
    for key in ("user.name", "user.email"):
        if not subprocess.run(["git", "config", key], cwd=root, capture_output=True, text=True).stdout.strip():
            raise ConfigError(f"{key} is not set, so experiments cannot be recorded\n  `git config {key} …`")
