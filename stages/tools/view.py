"""The nuScenes tables of a dataroot as plain rows, with the files that they name."""

from __future__ import annotations

import bisect
import functools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from stages.lib import names, nuscenes, pack
from stages.lib import tables as parquet
from stages.lib.errors import ConfigError

KEYS = {
    "attribute": ("token", "name"), "category": ("token", "name"), "visibility": ("token",),
    "sensor": ("token", "channel", "modality"), "log": ("token", "location"),
    "calibrated_sensor": ("token", "sensor_token", "translation", "rotation", "camera_intrinsic"),
    "ego_pose": ("token", "timestamp", "translation", "rotation"), "map": ("token", "filename", "log_tokens"),
    "scene": ("token", "name", "log_token", "nbr_samples", "first_sample_token", "last_sample_token"),
    "sample": ("token", "timestamp", "scene_token", "prev", "next"),
    "sample_data": ("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "fileformat",
                    "is_key_frame", "filename", "width", "height", "prev", "next"),
    "instance": ("token", "category_token", "nbr_annotations", "first_annotation_token", "last_annotation_token"),
    "sample_annotation": ("token", "sample_token", "instance_token", "visibility_token", "attribute_tokens",
                          "translation", "size", "rotation", "prev", "next", "num_lidar_pts", "num_radar_pts")}


class Files(Protocol):
    """Where the files are that the tables name."""

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""

    def read(self, name: str) -> bytes:
        """The content of a file that has a size."""


class Disk:
    """The files of a plain dataroot."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""
        path = self._root / name
        return path.stat().st_size if names.is_below(name) and path.is_file() else None

    def read(self, name: str) -> bytes:
        """The content of a file that has a size."""
        return (self._root / name).read_bytes()


class Packs:
    """The files of a merged dataset, in packs: those that the table sample_data finds at the offset it says."""

    def __init__(self, tables: Path, open_pack: Callable[[str], Path]) -> None:
        columns = ["filename", "pack_digest", "offset", "bytes"]
        rows = parquet.read(tables / "sample_data.parquet", columns).iter_rows()
        self._places = {name: place for name, *place in rows}
        self._open = open_pack
        self._read: tuple[str, dict[str, tuple[int, int]]] = ("", {})

    def size(self, name: str) -> int | None:
        """Bytes of the member, None where there is none."""
        if name not in self._places:
            return None
        digest, offset, num_bytes = self._places[name]
        return num_bytes if self._members(digest).get(name) == (offset, num_bytes) else None

    def read(self, name: str) -> bytes:
        """The content of a file that has a size."""
        digest, offset, num_bytes = self._places[name]
        return pack.read_member(self._open(digest), offset, num_bytes)

    def _members(self, digest: str) -> dict[str, tuple[int, int]]:
        """Name -> (offset, bytes) of the members of a pack; the rows of a pack stand together."""
        if self._read[0] != digest:
            self._read = digest, pack.members(self._open(digest))
        return self._read[1]


class View:
    """The tables of a dataroot with look-ups; splits and results are None where they can't be read.

    Scenes, samples and chains stand in order of time. What isn't found is {} or left out.
    """

    def __init__(self, root: Path, tables: dict[str, list[dict]], splits: Any, files: Files, results: Any) -> None:
        self.root, self.tables, self.splits, self.files, self.results = root, tables, splits, files, results
        self.by_token = {name: {row["token"]: row for row in rows} for name, rows in tables.items()}

    def rows(self, table: str) -> list[dict]:
        return self.tables[table]

    def find(self, table: str, token: str) -> dict:
        """The row, {} where there is none."""
        return self.by_token[table].get(token, {})

    def sensor(self, data: dict) -> dict:
        """The sensor of a sample_data row."""
        mount = self.find("calibrated_sensor", data["calibrated_sensor_token"])
        return self.find("sensor", mount.get("sensor_token", ""))

    def category(self, box: dict) -> str:
        """The category's name of an annotation."""
        instance = self.find("instance", box["instance_token"])
        return self.find("category", instance.get("category_token", "")).get("name", "")

    def time(self, box: dict) -> int:
        """The timestamp of an annotation's sample, 0 where there is none."""
        return stamp(self.find("sample", box["sample_token"]))

    def following(self, scene: str, timestamp: int) -> str:
        """Token of the scene's first sample not before the timestamp, its last one after all; "" without samples."""
        samples = self.samples_of.get(scene, [])
        place = bisect.bisect_left(samples, timestamp, key=stamp)
        return samples[min(place, len(samples) - 1)]["token"] if samples else ""

    @functools.cached_property
    def by_chain(self) -> dict[tuple[str, str], list[dict]]:
        """(scene token, channel) -> its sample_data."""
        found = defaultdict(list)
        for data in self.rows("sample_data"):
            scene = self.find("sample", data["sample_token"]).get("scene_token")
            channel = self.sensor(data).get("channel")
            if scene and channel:
                found[scene, channel].append(data)
        return {key: sorted(rows, key=stamp) for key, rows in found.items()}

    @functools.cached_property
    def samples_of(self) -> dict[str, list[dict]]:
        """scene token -> its samples."""
        return self._grouped("sample", "scene_token", stamp)

    @functools.cached_property
    def boxes_of(self) -> dict[str, list[dict]]:
        """sample token -> its annotations."""
        return self._grouped("sample_annotation", "sample_token", self.time)

    @functools.cached_property
    def by_instance(self) -> dict[str, list[dict]]:
        """instance token -> its annotations."""
        return self._grouped("sample_annotation", "instance_token", self.time)

    @functools.cached_property
    def scenes_of_splits(self) -> dict[str, list[dict]]:
        """Name of a split -> those of its scenes that there are."""
        by_name = {scene["name"]: scene for scene in self.rows("scene")}
        splits = self.splits if isinstance(self.splits, dict) else {}
        return {split: [by_name[name] for name in names if name in by_name] for split, names in splits.items()
                if isinstance(names, list)}

    def _grouped(self, table: str, key: str, order: Callable[[dict], int]) -> dict[str, list[dict]]:
        found = defaultdict(list)
        for row in self.rows(table):
            found[row[key]].append(row)
        return {token: sorted(rows, key=order) for token, rows in found.items()}


def stamp(row: dict) -> int:
    """The row's timestamp, 0 where it is no number."""
    value = row.get("timestamp")
    return value if isinstance(value, (int, float)) else 0


def is_key(data: dict) -> bool:
    """Whether a sample_data row is a key frame: true, and not a text that says so."""
    return data["is_key_frame"] is True


def version_folder(root: Path) -> Path:
    found = sorted(path.parent for path in root.glob("*/scene.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"{root} has the versions {names}, expected one folder with scene.json, "
                          f"like {nuscenes.VERSION}\n  name the dataroot: the folder that holds the version's folder")
    return found[0]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def load(folder: Path) -> tuple[dict[str, list[dict]], list[tuple[str, str]]]:
    """(table -> rows, offences against T1 that keep the other rules from being asked)."""
    tables, faults = {}, []
    for name, keys in KEYS.items():
        rows = read_json(folder / f"{name}.json")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            faults.append((name, f"{name}.json is missing or no JSON array of objects"))
            continue
        tables[name] = rows
        for row in rows:
            lacking = sorted(set(keys) - row.keys())
            if lacking:
                faults.append((str(row.get("token", "")), f"a row of {name}.json has no {lacking[0]!r}"))
    return tables, faults
