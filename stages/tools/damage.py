"""`roadmill store fsck`: is all there that the store should have, byte for byte? What can be done where it is not?"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from pathlib import Path

from stages.harness import ITEM_STAGES, Harness
from stages.lib.digests import canonical, digest_bytes
from stages.runners.run import watched
from stages.store import fsck
from stages.store.fsck import Findings
from stages.store.gc import Live
from stages.store.names import action_name
from stages.store.store import Store, blob_name
from stages.tools import roots

SHOWN = 20


def examine(root: Path, repair: bool) -> tuple[list[str], bool]:
    """Lines that say what is wrong with the store, and what was done about it where a repair is wanted; whether
    nothing is wrong in the end."""
    harness = Harness(root)
    rows = {stage: [row for row in harness.manifest_rows(stage) if "outputs" in row] for stage in ITEM_STAGES}
    live = Live()
    for row in (row for found in rows.values() for row in found):
        live.add(row)
    found = fsck.check(harness.store, live, functools.partial(watched, "fsck"))
    owners = {bytes.fromhex(digest): f"{stage} {row['name']}" for stage in ITEM_STAGES for row in rows[stage]
              for digest, _ in row["outputs"].values() if bytes.fromhex(digest) in found.lost}
    lines = _say(harness.store, found, owners)
    if not repair or found.is_clean:
        hint = "`roadmill store fsck --repair` brings back what it can, and forgets the rest: `dvc repro` makes it"
        return lines if found.is_clean else [*lines, hint], found.is_clean
    done = fsck.repair(harness.store, found, live, _documents(root, found.lost))
    lines.append(f"repaired: {len(done.restored)} blobs are whole again, {len(done.forgotten)} results are forgotten: "
                 "the next run that wants them makes them again")
    lines += _some(f"not to be had: {blob_name(digest.hex())}   {owners.get(digest, '')}: {text}"
                   for digest, text in sorted(done.lost.items()))
    return lines, not done.lost


def _say(store: Store, found: Findings, owners: dict[bytes, str]) -> list[str]:
    num = found.num
    lines = [f"{store.shared.where}: {num['results']} results, {num['blobs']} blobs, {num['bytes'] / 2**30:.3f} GiB, "
             f"{num['actions']} action documents, {num['pages']} pages"]
    for digest in sorted(found.damaged | found.lost.keys()):
        what = "damaged" if digest in found.damaged else "missing"
        owner = owners.get(digest) or found.lost.get(digest, "nobody's")
        lines.append(f"{what:<9}{blob_name(digest.hex())}   {owner or 'a manifest here'}")
    lines = lines[:1] + _some(lines[1:])
    lines += _some(f"{'hollow':<9}{action_name(generation, pair)}   counts as done, but not all of it is there"
                   for pair, generation in found.hits.of.items())
    lines += _some(f"{'damaged':<9}{name}" for name in (*found.pages, *found.actions))
    lines += _some(f"{'foreign':<9}{name}   not a name of the store; left alone" for name in found.foreign)
    if found.num_orphans:
        lines.append(f"{found.num_orphans} blobs, {found.orphan_bytes / 2**30:.3f} GiB, are nobody's: "
                     "`roadmill store gc` takes them when they are old")
    return [*lines, "all whole"] if found.is_clean else lines


def _documents(root: Path, lost: Collection[bytes]) -> dict[bytes, bytes]:
    """Digest -> result document, of those that are lost and that a manifest of this clone's refs repeats."""
    rows = (row for one in roots.manifests(root) for row in one.rows or () if "outputs" in row)
    documents = (canonical({"facts": row["facts"], "outputs": row["outputs"]}) for row in rows)
    return {digest: document for document in documents
            if (digest := bytes.fromhex(digest_bytes(document))) in lost}


def _some(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return lines[:SHOWN] + ([f"  … and {len(lines) - SHOWN} more such"] if len(lines) > SHOWN else [])
