"""The contract between the harness and a stage program.

A stage is a module in `stages/` named as in `dvc.yaml`, with

    Knobs   a frozen dataclass of knobs: the stage's section of params.yaml (see `lib.knobs`)
    INPUTS  names of what it reads: other stages, or the scanned folders "recordings" and "labels"

and either, for a stage of many items (ingest, sample, autolabel, train, evaluate),

    plan(cfg: Knobs, inputs: Mapping[str, Upstream]) -> list[Item]
    run(cfg: Knobs, item: Item, inputs: Mapping[str, Path], out: Path) -> Facts       one item
    collect(cfg: Knobs, results: Sequence[Result], out: Out) -> Summary

or, for a whole-stage program (curate, split, merge),

    run(cfg: Knobs, inputs: Mapping[str, Upstream], out: Out) -> Summary

They read only their arguments and write only under `out`: no clock, environment, network or global random state.

A stage of many items that sets `RESUMES = True` has a fifth argument of `run`, `lib.checkpoints.Checkpoints`: it asks
them for the state that an attempt left which was stopped, and offers them its own. What comes out is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Facts = dict[str, Any]
"""What one item found out, as JSON: counts, rates, faults. Equal action, equal facts."""


@dataclass(frozen=True, slots=True)
class Item:
    """One action to be: `run(cfg, item, inputs, out)`.

    name    unique in its stage and readable, e.g. the drive's or the scene's name
    params  what `run` needs beside the knobs; plain JSON; part of the action's key
    inputs  role -> sha256 of a recording or of a blob in the store, or the Path of an upstream file that the harness
            puts into the store. `run` receives role -> Path of a local read-only copy.
    """

    name: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str | Path]


class Blob(NamedTuple):
    """A file that an action made: sha256 of its bytes, and how many they are."""

    digest: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """What one action gave.

    outputs  file name under `out` -> Blob
    path     path(file name) -> local read-only file, fetched or made again if it is gone
    """

    name: str
    facts: Facts
    outputs: Mapping[str, Blob]
    path: Callable[[str], Path] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Upstream:
    """What an earlier stage left: its folder under `data/`, and its results where it has items, by name; each is read
    when it is asked for."""

    folder: Path
    results: Sequence[Result] = ()


@dataclass(frozen=True)
class Out:
    """Where a stage writes: tables go to `data` (becomes data/<stage>), pages and figures to `results`
    (becomes results/<stage>). Both exist and are empty."""

    data: Path
    results: Path


@dataclass(frozen=True)
class Summary:
    """The stage's one line: what came in, what went out, what was dropped and why.

    num_in, num_out  counts of `unit` (num_in of `unit_in` where that differs)
    dropped          rule -> count
    notes            short sentences a user should read now (a clock offset found, a split by drive only)
    """

    num_in: int
    num_out: int
    unit: str
    unit_in: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
