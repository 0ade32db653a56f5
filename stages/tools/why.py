"""`roadmill why`: what makes a stage run, and what follows. `roadmill explain`: hit or miss of one item, and why."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.harness import STAGES, Harness, module_of
from stages.lib.errors import ConfigError
from stages.lib.knobs import near_miss


def why(root: Path, stage: str | None) -> list[str]:
    """Lines that say which stages will run and why: the knob, old and new, the input or the code that changed."""
    if stage is not None:
        module_of(stage)
    status, locked, params = _status(root), _locked(root), yaml.safe_load((root / "params.yaml").read_text())
    runs: dict[str, list[str]] = {}
    for name in STAGES:
        reasons = list(_reasons(name, status.get(name, []), locked.get(name, {}), params, runs))
        if reasons:
            runs[name] = reasons
    wanted = [stage] if stage else STAGES
    lines = []
    for name in wanted:
        if name in runs:
            lines += [f"{name} will run", *(f"  {reason}" for reason in runs[name])]
    quiet = [name for name in wanted if name not in runs]
    if quiet:
        lines.append(f"{', '.join(quiet)}: unchanged")
    if stage in runs:
        later = [name for name in STAGES if name in runs and STAGES.index(name) > STAGES.index(stage)]
        lines.append(f"what follows: {', '.join(later) or 'nothing'}, as far as its output changes")
    return lines


def _reasons(stage: str, status: list, locked: Mapping, params: Mapping, runs: Mapping) -> Iterator[str]:
    if not locked:
        yield "it has never run here (not in dvc.lock)"
        return
    inputs = set(module_of(stage).INPUTS)
    for change in status:
        if "changed command" in str(change):
            yield "its command changed (dvc.yaml)"
            continue
        for kind, what in change.items():
            for path, state in what.items():
                if path == "params.yaml":
                    yield from _knob_changes(locked["params"]["params.yaml"], params)
                elif kind == "changed outs":
                    yield f"{path}: its output is {state}"
                elif path.startswith("stages/"):
                    yield f"{path}: code {state}"
                else:
                    yield f"{path}: {state}"
    for name in sorted(inputs & set(runs), key=STAGES.index):
        yield f"{name} runs before it"


def _knob_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = dict(_leaves(old)), dict(_leaves({section: new.get(section) for section in old}))
    for knob in sorted(set(before) | set(after)):
        if before.get(knob) != after.get(knob):
            yield f"{knob}   {before.get(knob, '(none)')} -> {after.get(knob, '(none)')}   params.yaml"


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def _status(root: Path) -> dict[str, list]:
    ran = subprocess.run(["dvc", "status", "--json"], cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise ConfigError(f"dvc status failed: {ran.stderr.strip()[-300:]}\n  `roadmill doctor` looks for the cause")
    return json.loads(ran.stdout or "{}")


def _locked(root: Path) -> dict[str, Any]:
    path = root / "dvc.lock"
    if not path.exists():
        return {}
    return (yaml.safe_load(path.read_text()) or {}).get("stages", {})


def explain(root: Path, name: str) -> list[str]:
    """Lines that say, for each stage with an item of this name (a drive, a scene, or the start of one), whether its
    result is in the store, and if not, what differs from the last time."""
    harness, lines, seen = Harness(root), [], set()
    for stage in STAGES:
        if not hasattr(module_of(stage), "plan"):
            continue
        plan = harness.plan(stage)
        seen |= {one.item.name for one in plan}
        for one in plan:
            if name not in (one.item.name, one.item.params.get("scene_token"), one.item.params.get("drive_name")):
                continue
            result = harness.store.done(one.action.generation).get(one.action.key)
            known = bool(result) and harness.store.result(result) is not None
            lines.append(f"{stage:<10}{one.item.name}   {'hit' if known else 'miss'}   action {one.action.key[:12]}…")
            if not known:
                lines += [f"  {text}" for text in _differences(harness, one)]
    if not lines:
        raise ConfigError(f"no item is called {name!r}{near_miss(name, seen)}; an item is a drive, a scene or a run, "
                          "as data/*/manifest.jsonl names it")
    return lines


def _differences(harness: Harness, planned: Any) -> list[str]:
    history = harness.store.history(planned.stage, planned.item.name)
    if not history:
        return ["never made in this store"]
    last, now = history[-1], planned.action.document
    if last == now:
        return ["made before, but its result is gone from the store: it will be made again"]
    before, after = dict(_leaves(last)), dict(_leaves(now))
    return [f"{key}   {_short(before.get(key, '(none)'))} -> {_short(after.get(key, '(none)'))}"
            for key in sorted(set(before) | set(after)) if before.get(key) != after.get(key)]


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
