"""A dataset for other machines: which store the team shares, packs fetched from it, results copied between stores."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.harness import DATA_FOLDERS, ITEM_STAGES, MANIFEST, Harness
from stages.lib import site, tables
from stages.lib.digests import canonical, digest_bytes
from stages.lib.errors import ConfigError, RemoteError
from stages.lib.site import BucketStore
from stages.lib.stage import Blob
from stages.runners.run import watched
from stages.store.action import Action
from stages.store.places import open_store
from stages.store.store import Store, blob_name, concurrently
from stages.tools import history
from stages.tools.export import select
from stages.tools.programs import say

DVC_OPTIONS = {"endpointurl": "endpoint", "region": "region", "profile": "profile", "sse": "sse",
               "sse_kms_key_id": "sse_kms_key"}


@dataclass(frozen=True)
class Moved:
    """What was fetched or copied, and what was there already."""

    num_moved: int
    num_there: int
    num_bytes: int


def use(root: Path, name: str) -> None:
    """Makes conf/store/NAME.yaml the store of all clones, and its dvc_remote DVC's default remote: .dvc/config.

    Raises ConfigError where there is no such store.
    """
    store = site.read_store(root, name)
    if not isinstance(store, BucketStore):
        if site.team_store(root):
            say(root, "dvc", "remote", "default", "--unset")
        return
    say(root, "dvc", "remote", "add", "--force", "--default", name, store.dvc_remote)
    for option, knob in DVC_OPTIONS.items():
        if getattr(store, knob):
            say(root, "dvc", "remote", "modify", name, option, getattr(store, knob))


def fetch(root: Path, splits: Sequence[str], scenes: Sequence[str]) -> Moved:
    """Brings the packs of a selection of the merged dataset to this machine; those that the store lost are made again.

    Raises ConfigError for a scene or split that is not there, and where the store's cache is too small for all.
    """
    merged = root / "data" / "merge" / "tables" / "scene.parquet"
    if not merged.exists():
        raise ConfigError(f"{merged.parents[1]} has no merged dataset\n"
                          "  `dvc pull` fetches it, `dvc repro merge` makes it")
    wanted = set(select(tables.read(merged), scenes, splits)["pack_digest"])
    harness = Harness(root)
    packs = dict(blob for row in harness.manifest_rows("sample") for blob in row.get("outputs", {}).values()
                 if blob[0] in wanted)
    cache_bytes, needed = harness.store.cache_bytes, sum(packs.values())
    if needed > cache_bytes:
        raise ConfigError(f"the selection has {needed / 2**30:.1f} GiB, the store's cache {cache_bytes / 2**30:.1f}\n"
                          "  raise cache_gib in conf/store, or fetch less: --split, --scene")
    there = {digest for digest in wanted if harness.store.local.size(blob_name(digest)) is not None}
    order = sorted(wanted)
    found = watched("fetch", harness.store.find_all(order), len(order))
    lost = [digest for digest, path in zip(order, found) if path is None]
    for digest in lost:
        harness.store.need(digest)
    num_bytes = sum(harness.store.local.size(blob_name(digest)) or 0 for digest in wanted - there)
    return Moved(len(wanted - there), len(there), num_bytes)


def copy(root: Path, source_name: str, target_name: str, ref: str) -> Moved:
    """Copies what the manifests of a git ref name from one store to another: blobs first, then the actions that made
    them, so that a kill leaves nothing half done; what the target has is passed over.

    Raises ConfigError where a manifest of the ref can't be had, RemoteError where the source lacks results.
    """
    source, target = (open_store(site.read_store(root, name), root) for name in (source_name, target_name))
    rows = [(stage, row) for stage, found in _manifests(root, ref) for row in found if "outputs" in row]
    copied = list(watched("copy", concurrently(lambda one: _copy_result(source, target, *one), rows), len(rows)))
    pages: dict[str, dict[str, bytes]] = defaultdict(dict)
    for one in filter(None, copied):
        for generation in one.generations:
            pages[generation][digest_bytes(one.document)] = one.document
    for generation, documents in sorted(pages.items()):
        target.keep_pages(generation, documents)
    lacking = [f"{stage}: {row['name']}" for (stage, row), one in zip(rows, copied) if one is None]
    if lacking:
        print(*lacking, sep="\n", file=sys.stderr)
        raise RemoteError(f"{source.shared.where} lacks {len(lacking)} of {len(rows)} results of {ref}, the others are "
                          f"copied\n  make them there: `git checkout {ref}`, `ROADMILL_STORE={source_name} dvc repro`")
    num_new = sum(one.is_new for one in copied)
    return Moved(num_new, len(copied) - num_new, sum(one.num_bytes for one in copied))


def _manifests(root: Path, ref: str) -> list[tuple[str, list[dict]]]:
    """(stage, rows) of the manifests that a ref names. Raises ConfigError where one can't be had, or there is none."""
    commit = say(root, "git", "rev-parse", "--verify", f"{ref}^{{commit}}")
    tree = next(tree for tree in history.trees(root, {ref: commit}) if ref in tree.revs)
    objects, found = history.Objects(root), []
    for stage in ITEM_STAGES:
        folder = DATA_FOLDERS[stage]
        if folder in tree.outs:
            rows = history.read_rows(objects.path(folder, tree.outs[folder], MANIFEST))
            if rows is None:
                raise ConfigError(f"{ref}: the manifest of {stage} is neither here nor in DVC's cache or remote"
                                  f"{objects.remote_fault and f' ({objects.remote_fault})'}\n"
                                  "  `dvc push` it where it was made")
            found.append((stage, rows))
    if not found:
        raise ConfigError(f"{ref} names no manifest of a stage{tree.fault and f': {tree.fault}'}\n"
                          "  `dvc repro` makes them, and a commit keeps them")
    return found


@dataclass(frozen=True)
class _Copied:
    document: bytes
    generations: tuple[str, ...]
    is_new: bool
    num_bytes: int


def _copy_result(source: Store, target: Store, stage: str, row: dict) -> _Copied | None:
    """What was copied of one row of a manifest; None where the source lacks something of it."""
    outputs = {file: Blob(*blob) for file, blob in row["outputs"].items()}
    document = canonical({"facts": row["facts"], "outputs": row["outputs"]})
    result = digest_bytes(document)
    actions = [action for known in source.history(stage, row["name"])
               if result in source.results(action := Action(**known))]
    if not actions:
        return None
    num_bytes = 0
    for blob in outputs.values():
        if not target.keeps(blob.digest, blob.bytes):
            path = source.find(blob.digest)
            if path is None:
                return None
            num_bytes += target.put_copy(path).bytes
    new = [action for action in actions if result not in target.results(action)]
    for action in new:
        target.commit(action, row["name"], row["facts"], outputs)
    generations = tuple(action.generation for action in actions)
    return _Copied(document, generations, bool(new or num_bytes), num_bytes)
