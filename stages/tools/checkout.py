"""The data of one revision: tables and manifests as they lie on disk, or as a commit's dvc.lock names them."""

from __future__ import annotations

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
    """What one tree says of the data; `objects` is None for the files on disk."""

    root: Path
    tree: Tree
    objects: Objects | None

    @property
    def name(self) -> str:
        """The revision, for people."""
        if self.objects is None:
            return WORKING_TREE
        committed = [rev for rev in self.tree.revs if rev != WORKING_TREE]
        return history.names(committed)[0] if committed else "dvc.lock"

    def md5(self, folder: str) -> str:
        """DVC's md5 of the folder; "" where dvc.lock has none."""
        return self.tree.outs.get(folder, "")

    def path(self, folder: str, file: str) -> Path | None:
        """Where the file can be read; None where it can't."""
        if self.objects is None:
            path = self.root / folder / file
            return path if path.is_file() else None
        return self.objects.path(folder, self.md5(folder), file)

    def files(self, folder: str) -> list[str]:
        """Names of the files in the folder; none where that can't be known."""
        if self.objects is None:
            place = self.root / folder
            return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
        return sorted(self.objects.members(folder, self.md5(folder)) or {})

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The lines of the stage's manifest that are results; none where it can't be had."""
        rows = history.read_rows(self.path(DATA_FOLDERS[stage], MANIFEST)) or []
        return [row for row in rows if "outputs" in row]

    def find(self, table: str, column: str, value: str) -> list[dict[str, Any]]:
        """Rows of a merged table; none where it can't be had."""
        path = self.path(DATA_FOLDERS["merge"], f"tables/{table}.parquet")
        return [] if path is None else tables.scan(path).filter(pl.col(column) == value).collect().to_dicts()

    def table(self, name: str) -> pl.DataFrame | None:
        """A merged table; None where it can't be had."""
        path = self.path(DATA_FOLDERS["merge"], f"tables/{name}.parquet")
        return None if path is None else tables.read(path)

    def recordings(self) -> list[tuple[str, Recording]]:
        """(scan, recording) of all scans; none where their lists can't be had."""
        folder = DATA_FOLDERS["recordings"]
        paths = [self.path(folder, file) for file in self.files(folder) if file.endswith(".jsonl")]
        scans = [Path(file).stem for file in self.files(folder) if file.endswith(".jsonl")]
        return [(scan, one) for scan, path in zip(scans, paths) if path for one in recordings.read_listing(path)]
