"""`roadmill scan`: decides which recordings the dataset is made of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stages.lib import recordings, site
from stages.lib.errors import ConfigError
from stages.lib.recordings import Recording
from stages.runners.run import watched
from stages.store.sources import Hashes, Source, describe, look, open_source
from stages.tools import config
from stages.tools.programs import say

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


def scan(root: Path, where: str | Path, rig: str) -> Scanned:
    """Writes data/recordings/<last part of WHERE>.jsonl and data/labels, and tracks both with DVC.

    `where` is a folder or s3://bucket/prefix of recordings, or one recording. Those of other scans stay. Raises
    ConfigError where there are none, two have the same bytes or name, the rig is unknown, or the name of WHERE is
    another scan's.
    """
    config.known_rig(root, rig)
    _want_fetched(root)
    here, hashes = site.load(root), Hashes(root)
    where = str(where).rstrip("/") if site.is_url(str(where)) else str(Path(where).resolve())
    source, files = look(where, lambda at: open_source(at, here, hashes))
    name = where.rpartition("/")[2]
    listing = root / "data" / "recordings" / f"{name}.jsonl"
    before = {one.name: one for one in recordings.read_listing(listing)} if listing.exists() else {}
    with ThreadPoolExecutor(source.at_once) as pool:
        described = pool.map(lambda one: describe(source, one, files[one], rig), files)
        found = list(watched("scan", described, len(files)))
    now = {one.name: one for one in found}
    _want_own_name(root, name, source.where, set(now) & set(before))
    _want_no_twins(listing, source.where, found)
    config.use_rig(root, rig)
    recordings.write_listing(found, listing)
    site.remember_source(root, name, source.where)
    num_labels = _copy_labels(root, source, found, gone=set(before) - set(now))
    say(root, "dvc", "add", "--quiet", "data/recordings", "data/labels")
    return Scanned(name, len(found), sum(one.bytes for one in found), num_labels,
                   sorted(set(now) - set(before)), sorted(set(before) - set(now)),
                   sorted(name for name in set(now) & set(before) if now[name] != before[name]))


def _want_fetched(root: Path) -> None:
    for folder in ("data/recordings", "data/labels"):
        if (root / f"{folder}.dvc").exists() and not (root / folder).exists():
            raise ConfigError(f"{folder} is in this commit, but not on this disk: a scan would forget what it holds\n"
                              f"  `dvc pull {folder}` fetches it; `git rm {folder}.dvc` begins anew")


def _want_own_name(root: Path, scan_name: str, base: str, kept: set[str]) -> None:
    """A scan replaces the earlier one of its name: that must be the same folder, or hold some of its recordings."""
    earlier = site.read_sources(root).get(scan_name, base)
    same = base in (earlier, str(Path(earlier).resolve()))
    if not same and (site.is_url(earlier) or Path(earlier).exists()) and not kept:
        raise ConfigError(f"the scan {scan_name!r} is of {earlier}; {base} would replace all its recordings\n"
                          "  rename one of the two folders, or scan one above both")


def _want_no_twins(listing: Path, base: str, found: list[Recording]) -> None:
    known = {}
    for other in sorted(listing.parent.glob("*.jsonl")):
        if other != listing:
            for one in recordings.read_listing(other):
                known[one.name] = known[one.digest] = f"{one.name!r} of the scan {other.stem!r}"
    for one in found:
        for what, value in (("bytes", one.digest), ("name", one.name)):
            if value in known:
                raise ConfigError(f"{base}/{one.name} has the same {what} as {known[value]}\n"
                                  "  move one away, or scan a folder above both so that their names differ; "
                                  "`rm data/recordings/SCAN.jsonl` forgets a scan")
        known[one.digest] = repr(one.name)


def _copy_labels(root: Path, source: Source, found: list[Recording], gone: set[str]) -> dict[str, int]:
    """Copies the label files that lie beside the recordings to data/labels/<kind>/<recording>.json."""
    counts = {}
    for kind, suffix in SIDE_FILES.items():
        folder = root / "data" / "labels" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name in gone:
            (folder / f"{name}.json").unlink(missing_ok=True)
        counts[kind] = 0
        with ThreadPoolExecutor(source.at_once) as pool:
            texts = pool.map(lambda one, suffix=suffix: source.read(f"{one.name}{suffix}"), found)
            for one, text in zip(found, texts):
                target = folder / f"{one.name}.json"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                if text is not None:
                    target.write_bytes(text)
                    counts[kind] += 1
    readme = root / "data" / "labels" / "README"
    if not readme.exists():
        readme.write_text("human/<recording>.json, truth/<recording>.json: OpenLABEL 1.0, copied by `roadmill scan`\n")
    return counts
