"""The data of one revision: tables and manifests as they lie on disk, or as a commit's dvc.lock names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from stages.harness import DATA_FOLDERS, MANIFEST
from stages.lib import recordings, tables
from stages.lib.recordings import Recording
from stages.tools import history
from stages.tools.history import WORKING_TREE, Objects, Tree


@dataclass(frozen=True)
class Checkout:
    """What one tree says of the data; `objects` is None for the files on disk.

    A folder is taken as `reader` (a stage) read it, which may be older than what stands there now; as it was made,
    where no reader is named.
    """

    root: Path
    tree: Tree
    objects: Objects | None

    @property
    def name(self) -> str:
        """The revision, for people."""
        return WORKING_TREE if self.objects is None else history.names(self.tree.revs)[0]

    def md5(self, folder: str, reader: str = "") -> str:
        """DVC's md5 of the folder; "" where dvc.lock has none."""
        return (self.tree.deps.get(reader, {}) if reader else self.tree.outs).get(folder, "")

    def path(self, folder: str, file: str, reader: str = "") -> Path | None:
        """Where the file can be read; None where it can't."""
        if self.objects is None:
            path = self.root / folder / file
            return path if path.is_file() else None
        return self.objects.path(folder, self.md5(folder, reader), file)

    def rows(self, stage: str, reader: str = "") -> list[dict[str, Any]] | None:
        """The lines of the stage's manifest; None where it can't be had."""
        return history.read_rows(self.path(DATA_FOLDERS[stage], MANIFEST, reader))

    def table(self, folder: str, file: str, reader: str = "") -> pl.DataFrame | None:
        """A table; None where it can't be had."""
        path = self.path(folder, file, reader)
        return None if path is None else tables.read(path)

    def recordings(self) -> list[tuple[str, Recording]]:
        """(scan, recording) of all scans; none where their lists can't be had."""
        return [(Path(file).stem, one) for file in self.files(DATA_FOLDERS["recordings"]) if file.endswith(".jsonl")
                for path in [self.path(DATA_FOLDERS["recordings"], file)] if path
                for one in recordings.read_listing(path)]

    def files(self, folder: str) -> list[str]:
        """Names of the files in the folder; none where that can't be known."""
        if self.objects is None:
            place = self.root / folder
            return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
        return sorted(self.objects.members(folder, self.md5(folder)) or {})


def checkouts(root: Path, trees: list[Tree], objects: Objects) -> Iterator[Checkout]:
    """The files on disk first, then what dvc.lock of each tree names."""
    yield Checkout(root, trees[0], None)
    for tree in trees:
        yield Checkout(root, tree, objects)
