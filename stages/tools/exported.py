"""Files of an exported nuScenes dataroot, found again in the datasets that they may be of, byte for byte."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from stages.harness import DATA_FOLDERS
from stages.lib import nuscenes, pack
from stages.lib.digests import digest_bytes
from stages.lib.errors import DataError
from stages.store.store import Store
from stages.tools.checkout import Checkout

MEMBER = re.compile(r"(?:samples|sweeps)/[^/]+/[^/]+$")
MERGE = DATA_FOLDERS["merge"]


def member(path: Path, checkouts: Iterable[Checkout], store: Store) -> tuple[Checkout, dict[str, Any]] | None:
    """The sample_data row whose frame this image or cloud is, by its name, and by its bytes in the pack.

    None where no dataset has the name; raises DataError where none that has it has these bytes.
    """
    name, content, others = "/".join(path.parts[-3:]), path.read_bytes(), {}
    for checkout in checkouts:
        for row in checkout.find("sample_data", "filename", name):
            place = store.find(row["pack_digest"])
            if place is None:
                others[f"pack {row['pack_digest']} of {checkout.name} is not in the store"] = True
                continue
            kept = pack.read_member(place, row["offset"], row["bytes"])
            if kept == content:
                return checkout, row
            others[f"{checkout.name} has sha256 {digest_bytes(kept)}"] = True
    if others:
        raise DataError(f"{path}: its bytes (sha256 {digest_bytes(content)}) are not those of {name} in any dataset "
                        f"that is known here: {'; '.join(others)}\n"
                        "  it was changed, or is of another clone; `roadmill export OUT` writes the file again")
    return None


def view(path: Path, checkouts: Iterable[Checkout]) -> tuple[Checkout, pl.DataFrame] | None:
    """The dataset and its scenes of whose nuScenes view this JSON or map is a file: written again, it has its bytes.

    None where it is of no view of a dataset that is known here.
    """
    root = next((folder for folder in path.parents if (folder / nuscenes.VERSION / "scene.json").is_file()), None)
    if root is None:
        return None
    tokens = [row["token"] for row in json.loads((root / nuscenes.VERSION / "scene.json").read_bytes())]
    for checkout in checkouts:
        scenes = checkout.table("scene")
        chosen = pl.DataFrame() if scenes is None else scenes.filter(pl.col("token").is_in(tokens))
        if chosen.height != len(tokens):
            continue
        with tempfile.TemporaryDirectory(prefix="roadmill-view-") as folder:
            again = Path(folder) / "view" / path.relative_to(root)
            nuscenes.write(_dataset(checkout, Path(folder) / "dataset"), chosen, Path(folder) / "view")
            if again.is_file() and again.read_bytes() == path.read_bytes():
                return checkout, chosen
    return None


def _dataset(checkout: Checkout, folder: Path) -> Path:
    """The merged tables of the checkout as `nuscenes.write` reads them, as links."""
    for file in checkout.files(MERGE):
        if file.endswith(".parquet") and (place := checkout.path(MERGE, file)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).symlink_to(place)
    return folder
