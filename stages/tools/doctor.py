"""`roadmill doctor`: is this checkout, this machine and this store fit to run?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from stages.harness import STAGES, Harness
from stages.lib import knobs, recordings
from stages.lib.errors import ConfigError
from stages.runners.run import told
from stages.store import code
from stages.store.sources import locate
from stages.tools import config
from stages.tools.programs import has_identity, say

LOW_DISK_BYTES = 5 * 2**30


def examine(root: Path) -> list[tuple[str, str]]:
    """(what was looked at, what is wrong and the command that helps, or '' where it is right)."""
    checks = {"pinned packages": _packages, "params.yaml": _params, "dvc.yaml": _graph, "dvc": _dvc,
              "recordings": _recordings, "store": _store, "git": _git}
    return [(name, _text(check, root)) for name, check in checks.items()]


def _text(check: Callable[[Path], None], root: Path) -> str:
    try:
        check(root)
    except Exception as error:
        if not told(error):
            raise
        return told(error)
    return ""


def _packages(root: Path) -> None:
    code.check_installed(code.read_pins(root / "constraints.txt"))


def _params(root: Path) -> None:
    path = root / "params.yaml"
    if not path.exists() or path.read_text() != config.compose(root):
        raise ConfigError("it is not the composition of conf/: an applied experiment, or conf/ was edited\n"
                          "  `roadmill compose` takes conf/, `roadmill record NAME` keeps the experiment")


def _graph(root: Path) -> None:
    graph = knobs.read(root / "dvc.yaml", "`git checkout dvc.yaml` restores it")
    for stage in STAGES:
        listed = {dep for dep in graph.get("stages", {}).get(stage, {}).get("deps", []) if dep.startswith("stages/")}
        if listed != set(code.source_files(root, f"stages.{stage}")):
            raise ConfigError(f"{stage} does not depend on exactly the code it imports\n  `roadmill compose` mends it")


def _dvc(root: Path) -> None:
    try:
        say(root, "dvc", "status", "--json")
    except ConfigError as error:
        if "dvc.lock" in str(error):
            raise ConfigError("dvc.lock: it is torn, as after a kill while DVC wrote it\n  `git checkout dvc.lock`, or "
                              "delete it; then `dvc repro`: the store has what was done") from None
        if "RWLock" in str(error):
            raise ConfigError(".dvc/tmp/rwlock is torn, as after a kill while DVC wrote it\n"
                              "  `rm .dvc/tmp/rwlock`, where no other DVC runs here") from None
        raise


def _recordings(root: Path) -> None:
    harness = Harness(root)
    for recording in recordings.read(root / "data" / "recordings"):
        locate(recording, harness.sources)


def _store(root: Path) -> None:
    harness = Harness(root)
    next(iter(harness.store.shared.list("clones/")), None)  # of a bucket: it is there, and answers us
    place = harness.site.store_folder
    place.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{place} cannot be written\n  `chmod u+w {place}`, or name another in conf/store/")
    if free_bytes < LOW_DISK_BYTES:
        raise ConfigError(f"{place} has {free_bytes / 2**30:.1f} GiB left\n  free some, or name another in conf/store/")


def _git(root: Path) -> None:
    say(root, "git", "rev-parse", "--git-dir")
    if not has_identity(root):
        raise ConfigError("it does not know who commits, so experiments cannot be recorded\n"
                          "  `git config user.email YOU@HOST` and `git config user.name NAME`")
