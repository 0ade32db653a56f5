"""`roadmill check`: is this a nuScenes dataset that the devkit and its users read rightly? By named rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.lib.errors import ConfigError
from stages.tools import rules
from stages.tools.view import Disk, Packs, View, load, read_json, version_folder


@dataclass(frozen=True)
class Finding:
    """What a rule found: how many rows offend it, the token of the first and what is wrong there. 0, "", "" is fine."""

    rule: str
    name: str
    count: int
    token: str
    sentence: str


def check(dataroot: Path, *, open_pack: Callable[[str], Path] | None = None,
          results: Path | None = None) -> list[Finding]:
    """One finding per rule, in order; T1 alone where the tables can't be read.

    dataroot   a plain dataroot, or a merged dataset (data/merge) whose files are then read from its packs
    open_pack  digest of a pack -> local file; needed for a merged dataset
    results    detections in nuScenes' submission format, for E2
    Contents are read of key frames, names and sizes are looked at for all files. Tables are held in memory, as the
    devkit does. Raises ConfigError where dataroot has no tables.
    """
    merged = dataroot / "tables"
    if merged.is_dir():
        if open_pack is None:
            raise ConfigError(f"{dataroot} is a merged dataset, its images and points are in packs\n"
                              "  run `roadmill check` in the checkout that made it, or `roadmill export OUT` first")
        root, files = dataroot / "nuscenes", Packs(merged, open_pack)
    else:
        root, files = dataroot, Disk(dataroot)
    folder = version_folder(root)
    tables, faults = load(folder)
    if faults:
        return [_finding("T1", "tables_complete", faults)]
    view = View(root, tables, read_json(folder / "splits.json"), files, read_json(results) if results else None)
    return [_finding(rule, function.__name__, function(view)) for rule, function in rules.RULES.items()]


def _finding(rule: str, name: str, offences: Iterable[tuple[str, str]]) -> Finding:
    count, first = 0, ("", "")
    for count, offence in enumerate(offences, 1):
        first = offence if count == 1 else first
    return Finding(rule, name, count, *first)
