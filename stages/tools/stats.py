"""`roadmill store stats`: who needs how much of the store."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stages.harness import Harness
from stages.lib.errors import RoadmillError
from stages.runners.run import told
from stages.store.names import outputs_of, parse_action, parse_blob, result_digest
from stages.store.store import Store
from stages.tools import collect, history, roots

NAMED = 3  # refs of one dataset that are named


class Line(NamedTuple):
    """One line of the table.

    freed_bytes  what a collection frees of it; None where that is not known
    """

    name: str
    num_results: int
    num_blobs: int
    num_bytes: int
    freed_bytes: int | None


def stats(root: Path, clones: Sequence[Path], grace_days: float) -> list[str]:
    """A table: results, blobs and GiB of each op, and of the dataset of each git ref of this clone and those named.

    The last column has what a collection with these roots frees now and later; for a dataset, what no other needs.
    """
    store, clones = Harness(root).store, [root, *(clone.resolve() for clone in clones)]
    sizes = {digest: one.bytes for one in store.shared.list("cas/") if (digest := parse_blob(one.name))}
    try:
        found, refused = collect.look(store, clones, grace_days), ""
    except RoadmillError as error:
        found, refused = None, told(error)
    freed = Counter()
    for (_, op), count in found.tally.items() if found else ():
        freed[op] += count["bytes"]
    ops = list(of_ops(store, sizes, freed if found else None))
    total = Line("all", sum(one.num_results for one in ops), len(sizes), sum(sizes.values()),
                 sum(freed.values()) if found else None)
    datasets = sorted(of_datasets(clones), key=lambda one: (-one.num_bytes, one.name))
    return [store.shared.where,
            _row("made by", "results", "blobs", "GiB", "a gc frees"), *map(_told, [*ops, total]), "",
            _row("needed by", "results", "blobs", "GiB", "no other needs"), *map(_told, datasets),
            *([f"a gc would stop: {refused}"] if refused else [])]


def of_ops(store: Store, sizes: dict[bytes, int], freed: Counter | None) -> Iterator[Line]:
    """A line for each op, and for what no op made. A blob that several made counts for the first."""
    results = defaultdict(set)
    for name in store.shared.names("ac/"):
        if parsed := parse_action(name):
            results[parsed[0]].add(parsed[1][32:].hex())
    made, num_results, owned = defaultdict(Counter), Counter(), set()
    for generation in sorted(results):
        op = generation.partition("/")[0]
        num_results[op] += len(results[generation])
        for result, document in store.each_document(generation, results[generation]):
            blobs = ({bytes.fromhex(result), *outputs_of(json.loads(document))} & sizes.keys()) - owned
            made[op] += Counter(blobs=len(blobs), bytes=sum(sizes[blob] for blob in blobs))
            owned |= blobs
    for op in sorted(num_results):
        yield Line(op, num_results[op], made[op]["blobs"], made[op]["bytes"], None if freed is None else freed[op])
    yield Line("pages and inputs", 0, len(sizes) - len(owned), sum(sizes.values()) - sum(map(sizes.get, owned)),
               None if freed is None else freed["(pages)"] + freed["(nobody's)"])


def of_datasets(clones: Sequence[Path]) -> Iterator[Line]:
    """A line for each dataset that a ref or a working tree of the clones names, by its manifests."""
    manifests, of_rev = [], defaultdict(int)  # revision -> its manifests, a bit for each
    needed: dict[bytes, int] = defaultdict(int)  # blob -> the manifests that name it
    sizes = {}
    for clone in clones:
        for one in roots.manifests(clone):
            bit = 1 << len(manifests)
            rows = [row for row in one.rows or () if "outputs" in row]
            manifests.append(len(rows))
            for rev in one.revs:
                of_rev[str(clone) if len(clones) > 1 else "", rev] |= bit
            for row in rows:
                for digest, num_bytes in row["outputs"].values():
                    sizes[bytes.fromhex(digest)] = num_bytes
                for blob in (bytes.fromhex(result_digest(row)), *outputs_of(row)):
                    needed[blob] |= bit
    alike, blobs = defaultdict(list), Counter()
    for (clone, rev), mask in of_rev.items():
        alike[mask].append(f"{history.short(rev)}{clone and f' in {clone}'}")
    num_bytes = Counter()
    for blob, mask in needed.items():
        blobs[mask] += 1
        num_bytes[mask] += sizes.get(blob, 0)
    for own, names in alike.items():
        others = [mask for mask in alike if mask != own]
        mine = [mask for mask in blobs if mask & own]
        alone = [mask for mask in mine if not any(mask & other for other in others)]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield Line(", ".join(names[:NAMED]) + more, sum(num for bit, num in enumerate(manifests) if own >> bit & 1),
                   sum(blobs[mask] for mask in mine), sum(num_bytes[mask] for mask in mine),
                   sum(num_bytes[mask] for mask in alone))


def _told(line: Line) -> str:
    freed = "?" if line.freed_bytes is None else f"{line.freed_bytes / 2**30:.3f}"
    return _row(line.name, str(line.num_results), str(line.num_blobs), f"{line.num_bytes / 2**30:.3f}", freed)


def _row(name: str, results: str, blobs: str, gib: str, freed: str) -> str:
    return f"{results:>9}{blobs:>10}{gib:>11}{freed:>16}   {name}"
