"""conf/ and params.yaml: compose one from the other, and record an applied experiment."""

from __future__ import annotations

import json
import re
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

from stages.harness import STAGES, load_knobs
from stages.lib import knobs
from stages.lib.errors import ConfigError
from stages.lib.knobs import near_miss
from stages.store import code
from stages.tools.programs import has_identity, say

RECORDED = ("conf", "params.yaml", "dvc.yaml", "dvc.lock", "data", "results")
_ABSENT = object()


def compose(root: Path, overrides: Sequence[str] = ()) -> str:
    """The text of params.yaml: conf/ resolved, as `dvc exp run` writes it too. Raises ConfigError."""
    try:
        with initialize_config_dir(str(root / "conf"), version_base=None):
            cfg = hydra_compose("config", overrides=list(overrides))
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError("conf/ does not compose: " + "; ".join(lines[:3])
                          + "\n  mend conf/ and run `roadmill compose`") from None
    return OmegaConf.to_yaml(cfg)


def write_params(root: Path) -> bool:
    """Brings params.yaml up to date with conf/; whether it changed. Raises ConfigError for a knob that is wrong now."""
    text, path = compose(root), root / "params.yaml"
    before = path.read_text() if path.exists() else ""
    if text == before:
        return False
    wanted, known = yaml.safe_load(text), _sections(before)
    for section in wanted:  # those alone, for the sake of the stages that take seconds to import
        if known.get(section) != wanted[section]:
            load_knobs(wanted, section)
    path.write_text(text)
    return True


def _sections(text: str) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(text) or {})
    except (yaml.YAMLError, ValueError, TypeError):
        return {}


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


def cache(root: Path) -> dict[str, Any]:
    """The section `cache` of conf/config.yaml."""
    return yaml.safe_load((root / "conf" / "config.yaml").read_text())["cache"]


def set_cache(root: Path, knob: str, value: Any) -> None:
    """Sets a knob of the section `cache` in conf/config.yaml, comments kept, and composes.

    Raises ConfigError, with nothing changed, where params.yaml is not the composition of conf/ or the value is wrong.
    """
    path, parser = root / "conf" / "config.yaml", _yaml()
    if (root / "params.yaml").read_text() != compose(root):
        raise ConfigError(f"params.yaml is not the composition of conf/, so cache.{knob} cannot be changed in it\n"
                          "  `roadmill compose` takes conf/, `roadmill record NAME` keeps an applied experiment")
    before = path.read_text()
    config = parser.load(before)
    config["cache"][knob] = value
    with path.open("w") as file:
        parser.dump(config, file)
    try:
        write_params(root)
    except ConfigError:
        path.write_text(before)
        raise


def selected(root: Path, group: str) -> Any:
    """The choice of one group in the defaults list of conf/config.yaml."""
    defaults = yaml.safe_load((root / "conf" / "config.yaml").read_text())["defaults"]
    return next(entry[group] for entry in defaults if isinstance(entry, dict) and group in entry)


def use_rig(root: Path, rig: str) -> None:
    """Makes sure that the configuration has the rig. Raises ConfigError where that would lose an applied experiment."""
    chosen = list(selected(root, "rig@ingest.rig"))
    if rig in chosen:
        return
    path = root / "params.yaml"
    if path.exists() and path.read_text() != compose(root):
        raise ConfigError(f"params.yaml is not the composition of conf/, so the rig {rig!r} cannot be added to it\n"
                          "  `roadmill compose` takes conf/, `roadmill record NAME` keeps an applied experiment")
    select(root, "rig@ingest.rig", [*chosen, rig])
    try:
        write_params(root)
    except ConfigError:
        select(root, "rig@ingest.rig", chosen)
        raise


def known_rig(root: Path, rig: str) -> None:
    """Raises ConfigError for a rig that conf/rig does not have."""
    if not (root / "conf" / "rig" / f"{rig}.yaml").exists():
        known = sorted(path.stem for path in (root / "conf" / "rig").glob("*.yaml"))
        raise ConfigError(f"conf/rig/{rig}.yaml does not exist{near_miss(rig, known)}; rigs: {', '.join(known)}\n"
                          "  copy conf/rig/sim.yaml and describe the vehicle there")


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

    Raises ConfigError where the stages are not up to date, the name is taken, or the composition would differ; nothing
    is changed then.
    """
    path = root / "conf" / "experiment" / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9]+([_.-][A-Za-z0-9]+)*", name):
        raise ConfigError(f"{name!r} cannot name an experiment: letters and digits, with single _ . or - between\n"
                          "  `roadmill record NAME`")
    if path.exists() or say(root, "git", "tag", "-l", name):
        raise ConfigError(f"the name {name!r} is taken, by conf/experiment or a tag\n  `roadmill record OTHER_NAME`")
    if not has_identity(root):
        raise ConfigError("git does not know who commits\n"
                          "  `git config user.email YOU@HOST` and `git config user.name NAME`")
    stale = json.loads(say(root, "dvc", "status", "--json") or "{}")
    if stale:
        raise ConfigError(f"not up to date: {', '.join(stale)}\n"
                          "  `dvc repro` first, or `dvc exp apply` the experiment; `roadmill why` says what changed")
    applied = knobs.read(root / "params.yaml", "`roadmill compose` makes it from conf/")
    changes = difference(yaml.safe_load(compose(root, ["experiment=none"])), applied)
    chosen = root / "conf" / "config.yaml"
    before = chosen.read_text()
    path.write_text("# @package _global_\n" + (yaml.safe_dump(changes, sort_keys=True) if changes else "# nothing\n"))
    try:
        select(root, "experiment", name)
        if yaml.safe_load(compose(root)) != applied:
            raise ConfigError("conf/ with this experiment does not compose to params.yaml\n"
                              "  commit what changed in conf/, or `roadmill compose` and `dvc repro` to go back to it")
        write_params(root)
        places = [place for place in (*RECORDED, *_code(root)) if (root / place).exists()]
        say(root, "git", "add", "--", *places)
        say(root, "git", "commit", "--quiet", "-m", f"experiment {name}\n\n{yaml.safe_dump(changes)}", "--", *places)
    except ConfigError:
        path.unlink()
        chosen.write_text(before)
        say(root, "git", "reset", "--quiet", "--", str(path), str(chosen))
        raise
    say(root, "git", "tag", "-a", name, "-m", f"experiment {name}")
    return flat(changes)


def _code(root: Path) -> list[str]:
    """The files that dvc.lock names by hash beside data: without them in the commit, its stages would run again."""
    graph = yaml.safe_load((root / "dvc.yaml").read_text())
    return sorted({dep for entry in graph["stages"].values() for dep in entry["deps"] if (root / dep).is_file()})


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
