"""Recordings: what a scan found, as `data/recordings/<scan>.jsonl` keeps it, one line per recording."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.lib import names
from stages.lib.errors import ConfigError


@dataclass(frozen=True)
class Recording:
    """One drive log: a bag file, a rosbag2 folder with all its splits, or a folder of videos with their stamps
    and the bag of the other sensors.

    name     path relative to the scanned source, with forward slashes
    digest   sha256 of the file; of a folder: of the sorted member names and hashes
    members  of a folder: (name, bytes, sha256) of each file, sorted
    """

    name: str
    bytes: int
    digest: str
    rig: str
    members: tuple[tuple[str, int, str], ...] = ()


def read(folder: Path) -> list[Recording]:
    """All recordings of all scans, by name. Raises ConfigError where there are none, or two of one name."""
    found: dict[str, Recording] = {}
    for listing in sorted(folder.glob("*.jsonl")):
        for recording in read_listing(listing):
            if recording.name in found:
                raise ConfigError(f"{folder}: two scans name a recording {recording.name!r}, again in {listing.name}\n"
                                  "  scan a folder above both, so that their names differ")
            found[recording.name] = recording
    if not found:
        raise ConfigError(f"{folder} names no recordings\n  `roadmill scan SOURCE --rig RIG` looks for them")
    return [found[name] for name in sorted(found)]


def read_listing(listing: Path) -> list[Recording]:
    """The recordings of one scan. Raises ConfigError where the listing is damaged."""
    found = []
    for number, line in enumerate(listing.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            recording = Recording(**{**row, "members": tuple(map(tuple, row["members"]))})
            if not all(map(names.is_below, (recording.name, *(member for member, _, _ in recording.members)))):
                raise ValueError
            found.append(recording)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ConfigError(f"{listing}, line {number}: not a recording: {line[:80]!r}\n"
                              "  `dvc checkout data/recordings` restores it, `roadmill scan` makes it") from None
    return found


def write_listing(recordings: Iterable[Recording], listing: Path) -> None:
    """One JSON line per recording, sorted by name; a new file, never a write into one that DVC may have linked."""
    listing.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(recording) for recording in sorted(recordings, key=lambda recording: recording.name)]
    listing.unlink(missing_ok=True)
    listing.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
