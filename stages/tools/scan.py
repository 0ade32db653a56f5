"""`roadmill scan`: decides which recordings the dataset is made of."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from stages.lib import recordings, site, sources
from stages.lib.errors import ConfigError
from stages.lib.recordings import Recording
from stages.tools import config

SIDE_FILES = {"human": ".labels.json", "truth": ".truth.json"}


@dataclass(frozen=True)
class Scanned:
    """What a scan wrote: its name, what is in it, and what changed since the last scan of that name."""

    scan: str
    num_recordings: int
    num_bytes: int
    num_labels: dict[str, int]
    added: list[str]
    gone: list[str]
    changed: list[str]


def scan(root: Path, source: Path, rig: str) -> Scanned:
    """Writes data/recordings/<folder name>.jsonl and data/labels, and tracks both with DVC.

    The recordings of other scans stay. Raises ConfigError where the source is empty, two recordings have the same
    bytes, or the rig is unknown.
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is not a folder\n  `roadmill scan SOURCE` reads a folder of recordings")
    config.use_rig(root, rig)
    source = source.resolve()
    found = _describe(source, rig, sources.Hashes(root))
    listing = root / "data" / "recordings" / f"{source.name}.jsonl"
    before = {one.name: one for one in recordings.read_listing(listing)} if listing.exists() else {}
    recordings.write_listing(found, listing)
    recordings.read(listing.parent)
    site.remember_source(root, source.name, source)
    num_labels = _copy_labels(root, source, found, gone=set(before) - {one.name for one in found})
    _track(root)
    now = {one.name: one for one in found}
    return Scanned(source.name, len(found), sum(one.bytes for one in found), num_labels,
                   sorted(set(now) - set(before)), sorted(set(before) - set(now)),
                   sorted(name for name in set(now) & set(before) if now[name].digest != before[name].digest))


def _describe(source: Path, rig: str, hashes: sources.Hashes) -> list[Recording]:
    paths = sources.discover(source)
    found = [sources.describe(path, path.relative_to(source).as_posix(), rig, hashes)
             for path in track(paths, description="hashing", transient=True)]
    hashes.save()
    twins = [digest for digest, count in Counter(one.digest for one in found).items() if count > 1]
    if twins:
        names = [one.name for one in found if one.digest == twins[0]]
        raise ConfigError(f"{source}: {' and '.join(names[:2])} are the same bytes ({twins[0][:12]}…): one drive would "
                          "be learned from twice\n  move one of them away and scan again")
    return found


def _copy_labels(root: Path, source: Path, found: list[Recording], gone: set[str]) -> dict[str, int]:
    """Copies the label files that lie beside the recordings to data/labels/<kind>/<recording>.json."""
    counts = {}
    for kind, suffix in SIDE_FILES.items():
        folder = root / "data" / "labels" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name in gone:
            (folder / f"{name}.json").unlink(missing_ok=True)
        counts[kind] = 0
        for one in found:
            target = folder / f"{one.name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            beside = source / f"{one.name}{suffix}"
            if beside.exists():
                shutil.copyfile(beside, target)
                counts[kind] += 1
    readme = root / "data" / "labels" / "README"
    if not readme.exists():
        readme.write_text("human/<recording>.json, truth/<recording>.json: OpenLABEL 1.0, copied by `roadmill scan`\n")
    return counts


def _track(root: Path) -> None:
    command = ["dvc", "add", "--quiet", "data/recordings", "data/labels"]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise ConfigError(f"dvc add data/recordings data/labels failed: {ran.stderr.strip()[-300:]}")
