"""`roadmill why`: what makes a stage run, and what follows. `roadmill explain`: hit or miss of one item, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.harness import ITEM_STAGES, STAGES, Harness, Planned, known_stage
from stages.lib import knobs
from stages.lib.digests import canonical
from stages.lib.errors import ConfigError
from stages.lib.knobs import near_miss
from stages.runners.run import told
from stages.store.action import Action
from stages.tools.programs import say

SINGLE = ("train", "evaluate")  # of one item, named after the run; seconds to import


def why(root: Path, stage: str | None) -> list[str]:
    """Lines that say which stages will run and why: the knob, old and new, the input or the code that changed."""
    wanted = [known_stage(stage)] if stage else STAGES
    params = knobs.read(root / "params.yaml", "`roadmill compose` makes it from conf/")
    status = json.loads(say(root, "dvc", "status", "--json") or "{}")
    locked = knobs.read(root / "dvc.lock", "").get("stages", {}) if (root / "dvc.lock").exists() else {}
    graph = knobs.read(root / "dvc.yaml", "`git checkout dvc.yaml` restores it")["stages"]
    reasons = {name: list(_reasons(root, status.get(name, []), locked.get(name, {}), params)) for name in STAGES}
    moved: list[str] = []
    lines, quiet = [], []
    for name in STAGES:
        before = [earlier for earlier in moved if set(graph[earlier]["outs"]) & set(graph[name]["deps"])]
        if reasons[name] or before:
            moved.append(name)
        if name not in wanted:
            continue
        if reasons[name]:
            lines += [f"{name} will run", *(f"  {reason}" for reason in reasons[name])]
        elif before:
            lines.append(f"{name} will run if the output of {' or '.join(before)} changes")
        else:
            quiet.append(name)
    if quiet:
        lines.append(f"{', '.join(quiet)}: unchanged")
    if stage in moved:
        later = [name for name in moved if STAGES.index(name) > STAGES.index(stage)]
        lines.append(f"what follows: {', '.join(later) or 'nothing'}, as far as its output changes")
    return lines


def _reasons(root: Path, status: list, locked: Mapping, params: Mapping) -> Iterator[str]:
    if not locked:
        yield "it has never run here (not in dvc.lock)"
        return
    gone: list[str] = []
    for change in status:
        if isinstance(change, str):
            yield f"{change} (dvc.yaml)"
            continue
        for kind, what in change.items():
            for path, state in what.items():
                if path == "params.yaml":
                    yield from _knob_changes(locked.get("params", {}).get("params.yaml", {}), params)
                elif not (root / path).exists():
                    gone.append(path)
                elif kind == "changed outs":
                    yield f"{path}: its output is {state}"
                elif path.startswith("stages/"):
                    yield f"{path}: code {state}"
                else:
                    yield f"{path}: {state}"
    if gone:
        yield f"not on this machine: {', '.join(gone)}; `dvc pull` fetches it, `dvc repro --allow-missing` does without"


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


def explain(root: Path, name: str) -> list[str]:
    """Lines that say for each step of a drive, a scene or a run whether its result is in the store, and what differs
    from the last time if not. Raises ConfigError where no stage has an item of this name or token."""
    harness, lines, seen, missed, names = Harness(root), [], set(), "", {name}
    for stage in ITEM_STAGES:
        if lines and stage in SINGLE:
            break
        try:
            plan = harness.plan(stage)
        except ConfigError as error:
            if not lines:
                raise
            lines.append(f"{stage:<10}not planned: {told(error).splitlines()[0]}")
            break
        seen |= set(plan)
        for one in plan.values():
            if names & {one.item.name, one.item.params.get("scene_token"), one.item.params.get("drive_name")}:
                names.add(one.item.name)
                hit = harness.store.lookup(one.action) is not None
                lines.append(f"{stage:<10}{one.item.name}   {'hit' if hit else 'miss'}   action {one.action.key[:12]}…"
                             + (f"   as data/ is now; {missed} runs first" if missed else ""))
                lines += [] if hit else [f"  {text}" for text in _differences(harness, one)]
                missed = missed or ("" if hit else stage)
    if not lines:
        raise ConfigError(f"no item is called {name!r}{near_miss(name, seen)}; an item is a drive, a scene or a run\n"
                          "  data/*/manifest.jsonl name them")
    return lines


def _differences(harness: Harness, planned: Planned) -> list[str]:
    last, now = _last(harness, planned), json.loads(canonical(planned.action.document))
    if last is None:
        return ["never made in this store"]
    if last == now:
        return ["made before, but its result is gone from the store: it will be made again"]
    before, after = dict(_leaves(last)), dict(_leaves(now))
    lines = [f"{key}   {_short(before.get(key, '(none)'))} -> {_short(after.get(key, '(none)'))}"
             for key in sorted(set(before) | set(after)) if before.get(key) != after.get(key)]
    if before["code"] != after["code"]:
        lines.append(f"same results, trust me: cache.code_pins.{planned.stage}={before['code']}")
    return lines


def _last(harness: Harness, planned: Planned) -> Mapping[str, Any] | None:
    """The item's action that gave what data/<stage> holds now, else the newest that was done here."""
    history = harness.store.history(planned.stage, planned.item.name)
    held = {row["name"]: row.get("outputs") for row in harness.manifest_rows(planned.stage)}.get(planned.item.name)
    for document in reversed(history):
        result = harness.store.lookup(Action(**document))
        if result is not None and result["outputs"] == held:
            return document
    return history[-1] if history else None


def code_in_use(root: Path, stage: str) -> str:
    """The digest of the code that made what data/<stage> holds now. Raises ConfigError where no store tells."""
    harness = Harness(root)
    for one in harness.plan(known_stage(stage)).values():
        document = _last(harness, one)
        if document is not None:
            return document["code"]
    raise ConfigError(f"{stage}: {harness.store.shared.where} knows no earlier result of it\n"
                      f"  name the digest: `roadmill store pin {stage} DIGEST`")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
