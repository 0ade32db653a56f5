"""conf/ and params.yaml: compose one from the other, and record an applied experiment."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from stages.harness import STAGES
from stages.lib.errors import ConfigError
from stages.store import code

_ABSENT = object()


def compose(root: Path, overrides: Sequence[str] = ()) -> str:
    """The text of params.yaml: conf/ resolved, as `dvc exp run` writes it too. Raises ConfigError."""
    try:
        with initialize_config_dir(str(root / "conf"), version_base=None):
            cfg = hydra_compose("config", overrides=list(overrides))
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"conf/ does not compose: {error}") from None
    return OmegaConf.to_yaml(cfg)


def write_params(root: Path) -> bool:
    """Brings params.yaml up to date with conf/; whether it changed."""
    text, path = compose(root), root / "params.yaml"
    if path.exists() and path.read_text() == text:
        return False
    path.write_text(text)
    return True


def write_code_deps(root: Path) -> bool:
    """Brings the code that each stage of dvc.yaml depends on up to date with its imports; whether that changed."""
    path, parser = root / "dvc.yaml", _yaml()
    graph = parser.load(path)
    changed = False
    for stage in STAGES:
        deps = graph["stages"][stage]["deps"]
        wanted = code.source_files(root, f"stages.{stage}") + [d for d in deps if not str(d).startswith("stages/")]
        if list(deps) != wanted:
            deps[:] = wanted
            changed = True
    if changed:
        with path.open("w") as file:
            parser.dump(graph, file)
    return changed


def select(root: Path, group: str, choices: str | list[str]) -> None:
    """Sets the choice of one group in the defaults list of conf/config.yaml, comments kept."""
    path, parser = root / "conf" / "config.yaml", _yaml()
    config = parser.load(path)
    for entry in config["defaults"]:
        if isinstance(entry, dict) and group in entry:
            entry[group] = choices
            if isinstance(choices, list):
                entry[group] = CommentedSeq(choices)
                entry[group].fa.set_flow_style()
    with path.open("w") as file:
        parser.dump(config, file)


def selected(root: Path, group: str) -> Any:
    """The choice of one group in the defaults list of conf/config.yaml."""
    defaults = yaml.safe_load((root / "conf" / "config.yaml").read_text())["defaults"]
    return next(entry[group] for entry in defaults if isinstance(entry, dict) and group in entry)


def use_rig(root: Path, rig: str) -> None:
    """Makes sure that the configuration has the rig. Raises ConfigError where conf/rig does not."""
    if not (root / "conf" / "rig" / f"{rig}.yaml").exists():
        known = sorted(path.stem for path in (root / "conf" / "rig").glob("*.yaml"))
        raise ConfigError(f"conf/rig/{rig}.yaml does not exist; rigs: {', '.join(known)}\n"
                          f"  copy conf/rig/{known[0]}.yaml and describe the vehicle there")
    chosen = list(selected(root, "rig@ingest.rig"))
    if rig not in chosen:
        select(root, "rig@ingest.rig", [*chosen, rig])
    write_params(root)


def difference(base: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What must be merged into `base` to make it `wanted`. Raises ConfigError where a key is gone."""
    gone = sorted(set(base) - set(wanted))
    if gone:
        raise ConfigError(f"params.yaml lacks {where}{gone[0]}, which conf/ has; an experiment can change values only\n"
                          "  remove it in conf/ and run `roadmill compose`")
    found = {}
    for key, value in wanted.items():
        old = base.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            inner = difference(old, value, f"{where}{key}.")
            if inner:
                found[key] = inner
        elif old is _ABSENT or old != value:
            found[key] = value
    return found


def record(root: Path, name: str) -> list[str]:
    """Turns the applied experiment into conf/experiment/<name>.yaml, a commit and the tag <name>; returns what changed.

    Raises ConfigError where the stages are not up to date, the name is taken, or the composition would differ.
    """
    path = root / "conf" / "experiment" / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or path.exists() or _git(root, "tag", "-l", name):
        raise ConfigError(f"{name!r} cannot name an experiment: it is taken, or has other characters than letters, "
                          "digits, _ . and -\n  `roadmill record NAME` wants a new name")
    stale = subprocess.run(["dvc", "status", "--json"], cwd=root, capture_output=True, text=True)
    if stale.returncode or stale.stdout.strip() not in ("{}", ""):
        raise ConfigError(f"the stages are not up to date: {stale.stdout.strip()[:200] or stale.stderr.strip()[:200]}\n"
                          "  `dvc repro` first, or `dvc exp apply` the experiment")
    applied = yaml.safe_load((root / "params.yaml").read_text())
    changes = difference(yaml.safe_load(compose(root, ["experiment=none"])), applied)
    path.write_text("# @package _global_\n" + (yaml.safe_dump(changes, sort_keys=True) if changes else "# nothing\n"))
    before = selected(root, "experiment")
    select(root, "experiment", name)
    if yaml.safe_load(compose(root)) != applied:
        select(root, "experiment", before)
        path.unlink()
        raise ConfigError("conf/ with this experiment does not compose to params.yaml\n"
                          "  commit what changed in conf/, or `roadmill compose` and `dvc repro` to go back to it")
    write_params(root)
    tracked = ["conf", "params.yaml", "dvc.yaml", "dvc.lock", "data", "results"]
    _git(root, "add", "--", *[name for name in tracked if (root / name).exists()])
    _git(root, "commit", "--quiet", "--allow-empty", "-m", f"experiment {name}\n\n{yaml.safe_dump(changes)}")
    _git(root, "tag", "-a", name, "-m", f"experiment {name}")
    return flat(changes)


def flat(values: Mapping[str, Any], where: str = "") -> list[str]:
    """`a.b=value` for every leaf."""
    lines = []
    for key, value in values.items():
        lines += flat(value, f"{where}{key}.") if isinstance(value, Mapping) and value else [f"{where}{key}={value}"]
    return lines


def _yaml() -> YAML:
    parser = YAML()
    parser.width = 120
    parser.indent(mapping=2, sequence=4, offset=2)
    return parser


def _git(root: Path, *words: str) -> str:
    ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise ConfigError(f"git {words[0]} failed: {(ran.stderr or ran.stdout).strip()[-300:]}")
    return ran.stdout.strip()
