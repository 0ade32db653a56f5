"""What was made from a recording: every dataset, model and score of every commit that git's refs reach.

A drive's token is made of its recording's digest and name, so the tables of a dataset tell by themselves whether they
hold scenes of it; nothing has to be believed of names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from stages.harness import DATA_FOLDERS, MANIFEST
from stages.lib import recordings, tables
from stages.lib.errors import ConfigError, DataError
from stages.lib.recordings import Recording
from stages.tools import history
from stages.tools.history import WORKING_TREE, Objects, Tree
from stages.tools.programs import say

RECORDINGS, MERGE, MODELS, SCORES = (DATA_FOLDERS[name] for name in ("recordings", "merge", "train", "evaluate"))
KINDS = {MERGE: "datasets", MODELS: "models", SCORES: "scores"}
READERS = {MODELS: "train", SCORES: "evaluate"}
DATASET = ("tables/log.parquet", "tables/scene.parquet")
ON_DISK = ""  # stands for the md5 of a folder that no dvc.lock names


@dataclass(frozen=True)
class Known:
    """A recording as one or more revisions list it."""

    recording: Recording
    scan: str
    revs: tuple[str, ...]


class Made(NamedTuple):
    """A folder that a stage made: its md5, and that of the dataset that is in it or that it was made from.

    split  of the dataset's scenes: those that went into it; "" for all
    """

    folder: str
    md5: str
    dataset_md5: str
    split: str


def listed(trees: list[Tree], objects: Objects) -> tuple[list[Known], list[dict[str, Any]]]:
    """(every recording that any tree lists, the lists that can't be had)."""
    by_md5: dict[str, list[str]] = defaultdict(list)
    for tree in trees:
        if RECORDINGS in tree.outs:
            by_md5[tree.outs[RECORDINGS]] += tree.revs
    here = sorted((objects.root / RECORDINGS).glob("*.jsonl"))
    found: dict[tuple[str, str], tuple[Recording, str, list[str]]] = {}
    gaps = []
    for md5, revs in [(ON_DISK, [WORKING_TREE]), *by_md5.items()]:
        files = {path.stem: path for path in here} if md5 == ON_DISK else _listings(objects, md5)
        if files is None:
            gaps.append(_gap(RECORDINGS, md5, revs, objects))
        for scan, path in (files or {}).items():
            for one in recordings.read_listing(path):
                found.setdefault((one.digest, one.name), (one, scan, []))[2].extend(revs)
    return [Known(one, scan, tuple(dict.fromkeys(revs))) for one, scan, revs in found.values()], gaps


def _listings(objects: Objects, md5: str) -> dict[str, Path] | None:
    files = [file for file in objects.members(RECORDINGS, md5) or () if file.endswith(".jsonl")]
    paths = {Path(file).stem: objects.path(RECORDINGS, md5, file) for file in files}
    return paths if paths and all(paths.values()) else None


def uses(digest: str, trees: list[Tree], objects: Objects) -> dict[str, Any]:
    """What was made from the recording with this sha256, by kind, and what could not be looked into.

    datasets  md5 of data/merge, revs, scenes [{name, token, split, pack_digest}]
    models    md5 of models, revs, dataset_md5, scenes: those it learned from
    scores    md5 of data/evaluate, revs, dataset_md5, scenes: those it was judged on
    gaps      path, md5 ("" for what lies on disk), revs, remedy
    """
    found: dict[str, Any] = {kind: [] for kind in KINDS.values()}
    scenes: dict[str, pl.DataFrame | None] = {}
    unseen: dict[str, list[str]] = defaultdict(list)
    for made, revs in _made(trees, objects).items():
        dataset = made.dataset_md5
        if dataset not in scenes:
            scenes[dataset] = _scenes(objects, dataset, digest)
        own = scenes[dataset]
        if own is None:
            unseen[dataset] += revs
            continue
        own = own.filter((pl.col("split") == made.split) | (made.split == ""))
        if own.height:
            read = {"dataset_md5": dataset} if made.folder in READERS else {}
            found[KINDS[made.folder]].append({"md5": made.md5, "revs": revs, **read, "scenes": own.to_dicts()})
    gaps = [_gap(MERGE, md5, dict.fromkeys(revs), objects) for md5, revs in unseen.items()]
    return found | {"gaps": [*_unread(trees, objects), *gaps]}


def _made(trees: list[Tree], objects: Objects) -> dict[Made, list[str]]:
    """What may hold the recording -> the revisions that name it."""
    found: dict[Made, list[str]] = defaultdict(list)
    for tree in trees:
        if MERGE in tree.outs:
            found[Made(MERGE, tree.outs[MERGE], tree.outs[MERGE], "")] += tree.revs
        for folder, stage in READERS.items():
            dataset = tree.deps.get(stage, {}).get(MERGE)
            if folder in tree.outs and dataset:
                split = tree.params[stage].get("evaluate", {}).get("split", "") if folder == SCORES else "train"
                found[Made(folder, tree.outs[folder], dataset, split)] += tree.revs
    if (objects.root / MERGE).is_dir() and not _as_locked(objects, trees[0], MERGE, *DATASET):
        found[Made(MERGE, ON_DISK, ON_DISK, "")] = [WORKING_TREE]
    return found


def _scenes(objects: Objects, md5: str, digest: str) -> pl.DataFrame | None:
    """The dataset's scenes of the recording: name, token, split, pack_digest; None where it can't be looked into."""
    paths = [objects.root / MERGE / file if md5 == ON_DISK else objects.path(MERGE, md5, file) for file in DATASET]
    if None in paths:
        return None
    try:
        log, scenes = map(tables.read, paths)
    except DataError:
        return None
    own = [token for token, name in log.select("drive_token", "logfile").iter_rows()
           if tables.token("drive", digest, name) == token]
    return scenes.filter(pl.col("drive_token").is_in(own)).select("name", "token", "split", "pack_digest")


def _unread(trees: list[Tree], objects: Objects) -> Iterator[dict[str, Any]]:
    """Gaps: damaged commits, and what lies on disk though no dvc.lock says what it was made from."""
    for tree in trees:
        if tree.fault:
            yield {"path": history.LOCK, "md5": "", "revs": list(tree.revs), "remedy": tree.fault}
    for folder in READERS:
        if (objects.root / folder).is_dir() and not _as_locked(objects, trees[0], folder, MANIFEST):
            yield {"path": folder, "md5": ON_DISK, "revs": [WORKING_TREE], "remedy":
                   "it is not what dvc.lock names: `dvc status` says why, `dvc checkout` or `dvc repro` mends it"}


def _as_locked(objects: Objects, tree: Tree, folder: str, *files: str) -> bool:
    """Whether these files on disk are those of the folder that dvc.lock names."""
    members = objects.members(folder, tree.outs.get(folder, "")) or {}
    paths = {file: objects.root / folder / file for file in files}
    return all(path.is_file() and history.file_md5(path) == members.get(file) for file, path in paths.items())


def _gap(folder: str, md5: str, revs: Iterable[str], objects: Objects) -> dict[str, Any]:
    if md5 == ON_DISK:
        remedy = f"what lies there is damaged: `dvc checkout {folder}` restores it"
    elif objects.remote_fault:
        remedy = f"DVC's remote can't be asked ({objects.remote_fault}): `dvc remote list` names it"
    elif not objects.has_remote:
        remedy = "not in DVC's cache, and this clone has no DVC remote: `dvc remote add --default NAME URL`"
    else:
        remedy = ("neither in DVC's cache nor in its remote: `dvc push --all-commits` where it was made, "
                  "`dvc exp push origin NAME` of an experiment")
    return {"path": folder, "md5": md5, "revs": list(revs), "remedy": remedy}


def beyond(root: Path, commits: Mapping[str, str]) -> list[str]:
    """What this clone can't know of, each with the command that helps: refs of its git remotes, older commits."""
    lines, here = [], set(commits.values())
    if history.is_shallow(root):
        lines.append("this clone is shallow, its older commits are missing: `git fetch --unshallow`")
    for remote in say(root, "git", "remote").split():
        try:
            listed = [line.split("\t") for line in say(root, "git", "ls-remote", remote).splitlines()]
        except ConfigError:
            lines.append(f"{remote} does not answer, so what it has beyond this clone is not known: "
                         f"`git ls-remote {remote}`")
            continue
        there = {ref.removesuffix("^{}"): commit for commit, ref in listed}  # a tag's commit comes after the tag
        for ref in sorted(ref for ref, commit in there.items() if commit not in here):
            kind, name = ref.partition("/")[2].partition("/")[0], ref.rpartition("/")[2]
            command = {"heads": f"git fetch {remote} {ref}", "tags": f"git fetch {remote} {ref}:{ref}",
                       "exps": f"dvc exp pull {remote} {name}"}.get(kind)
            lines += [f"{history.short(ref)} of {remote}: `{command}`"] if command else []
    return lines


def looked_into(trees: list[Tree], commits: Mapping[str, str]) -> dict[str, int]:
    """How many refs, commits, and distinct states of dvc.lock and data/*.dvc."""
    return {"refs": sum(1 for name in commits if not history.COMMIT.fullmatch(name)),
            "commits": len(set(commits.values())), "states": len(trees)}
