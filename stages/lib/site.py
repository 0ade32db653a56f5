"""The site: where this machine keeps its store and recordings, and how much it works at once.

It says where, never what: nothing of it is in params.yaml, in a manifest or in an action. ROADMILL_STORE and
ROADMILL_RUNNER name files of conf/store and conf/runner (default: local) or give the path of another YAML file;
ROADMILL_SOURCE names the folder that recordings are relative to. Relative paths are taken against the root of the
repository, so that an experiment in a temporary folder meets the same store and recordings.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from stages.lib import knobs
from stages.lib.errors import ConfigError
from stages.lib.knobs import knob

SOURCES = "data/sources.yaml"


@dataclass(frozen=True)
class StoreSite:
    """conf/store/*.yaml"""

    root: str = knob("folder of the scene store")


@dataclass(frozen=True)
class RunnerSite:
    """conf/runner/*.yaml"""

    workers: int | None = knob("worker processes; null for one per core", low=1)
    timeout_s: dict[str, float] = knob("longest time for one item, by stage, or `default`", above=0)


@dataclass(frozen=True)
class Site:
    """Where things are here."""

    root: Path
    store: Path
    workers: int
    timeout_s: dict[str, float]
    sources: dict[str, Path]

    def timeout_of(self, stage: str) -> float:
        """Longest time for one item of the stage [s]."""
        return self.timeout_s.get(stage, self.timeout_s["default"])


def load(root: Path) -> Site:
    """The site of this process in the checkout `root`, or in DVC_ROOT, of which it is a copy. Raises ConfigError."""
    root = Path(os.environ.get("DVC_ROOT") or root).resolve()
    store = knobs.load(StoreSite, _read("store", root), "store")
    runner = knobs.load(RunnerSite, _read("runner", root), "runner")
    if "default" not in runner.timeout_s:
        raise ConfigError("runner.timeout_s has no `default`: longest time for one item, in s\n"
                          "  conf/runner/local.yaml shows how; ROADMILL_RUNNER names the file that is read")
    workers = runner.workers or len(os.sched_getaffinity(0))
    return Site(root, root / store.root, workers, runner.timeout_s, read_sources(root))


def read_sources(root: Path) -> dict[str, Path]:
    """scan -> folder that its recordings are relative to; ROADMILL_SOURCE comes first, under the name ''."""
    env = os.environ.get("ROADMILL_SOURCE")
    named = {"": env, **_known_sources(root)} if env else _known_sources(root)
    return {scan: root / folder for scan, folder in named.items()}


def remember_source(root: Path, scan: str, folder: Path) -> None:
    """Notes where this machine keeps the recordings of a scan."""
    path, known, folder = root / SOURCES, _known_sources(root), folder.resolve()
    known[scan] = str(folder.relative_to(root) if folder.is_relative_to(root) else folder)
    part = root / ".roadmill" / "sources.part"
    for place in (path, part):
        place.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("# where this machine keeps the recordings of each scan; written by `roadmill scan`\n"
                    + yaml.safe_dump(known))
    part.replace(path)


def _known_sources(root: Path) -> dict[str, str]:
    path = root / SOURCES
    remedy = f"remove it; `roadmill scan` writes it again, and ROADMILL_SOURCE does without it: rm {path}"
    return knobs.read(path, remedy) if path.exists() else {}


def _read(group: str, root: Path) -> dict:
    name = os.environ.get(f"ROADMILL_{group.upper()}", "local")
    path = root / name if name.endswith(".yaml") else root / "conf" / group / f"{name}.yaml"
    if not path.exists():
        choices = sorted(found.stem for found in (root / "conf" / group).glob("*.yaml"))
        raise ConfigError(f"ROADMILL_{group.upper()} is {name!r}, but {path} does not exist; "
                          f"conf/{group} has {', '.join(choices)}")
    return knobs.read(path, f"conf/{group}/local.yaml shows what belongs there")
