"""`roadmill export`: a plain nuScenes dataroot of any selection of a merged dataset's scenes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from stages.lib import nuscenes, pack, tables
from stages.lib.errors import ConfigError
from stages.lib.knobs import near_miss


@dataclass(frozen=True)
class Exported:
    """What was written."""

    num_scenes: int
    num_files: int


def export(dataset: Path, out: Path, open_pack: Callable[[str], Path], *, scenes: Sequence[str] = (),
           splits: Sequence[str] = ()) -> Exported:
    """`out` becomes a dataroot: samples/, sweeps/, maps/, can_bus/, v1.0-roadmill/ and the dataset's README.md.

    dataset         what merge wrote (data/merge)
    open_pack       digest of a pack -> local file
    scenes, splits  names or tokens of scenes, and splits, that are wanted; all where both are empty
    Raises ConfigError where `out` has something in it, or a scene or split is not there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder\n  name another, or remove it first")
    if not (dataset / "tables" / "scene.parquet").exists():
        raise ConfigError(f"{dataset} has no merged dataset\n  `dvc repro merge` makes it, `dvc pull` fetches it")
    chosen = select(tables.read(dataset / "tables" / "scene.parquet"), scenes, splits)
    nuscenes.write(dataset, chosen, out)
    shutil.copyfile(dataset / "README.md", out / "README.md")
    num_files = sum(len(pack.extract(open_pack(digest), out)) for digest in chosen["pack_digest"])
    return Exported(chosen.height, num_files)


def select(table: pl.DataFrame, scenes: Sequence[str], splits: Sequence[str]) -> pl.DataFrame:
    """The rows of the table scene that are wanted, in its order. Raises ConfigError for what is not there."""
    known = {**dict(zip(table["name"], table["token"])), **dict(zip(table["token"], table["token"]))}
    for kind, wanted, there in (("scene", scenes, known), ("split", splits, dict.fromkeys(table["split"].sort()))):
        unknown = next((name for name in wanted if name not in there), None)
        if unknown is not None:
            some = near_miss(unknown, there) if kind == "scene" else f"; splits: {', '.join(there)}"
            raise ConfigError(f"the dataset has no {kind} {unknown!r}{some}\n  data/merge/splits.json lists the names")
    tokens = [known[name] for name in scenes]
    if not scenes and not splits:
        return table
    return table.filter(pl.col("token").is_in(tokens) | pl.col("split").is_in(list(splits)))
