"""Collection in a store of many synthetic results, half of them dead: CPU seconds, requests, peak memory.

    python -m tests.benchmarks.bench_upkeep 100000

Each result has one pack. The store is a bucket in memory whose names are made as they are listed; documents come by
pages, which are real.
"""

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from stages.lib.digests import canonical, digest_bytes
from stages.store import gc
from stages.store.folder import Folder
from stages.store.gc import Live
from stages.store.objects import Listed
from stages.store.store import Store, blob_name

GRACE_S = 30 * 86_400.0
GENERATION = "sample/0123456789abcdef"
PAGE = 20_000


def row(number: int) -> dict:
    """The manifest's row of one result."""
    return {"facts": {"num_keyframes": 40, "num_images": 240, "scene": number},
            "outputs": {"pack.tar": [digest_bytes(b"%d" % number), 50_000_000],
                        "tables.parquet": [digest_bytes(b"t%d" % number), 50_000]}}


class Synthetic(Folder):
    """A bucket of `count` old results; what is written to it lies in a folder."""

    def __init__(self, root: Path, count: int) -> None:
        super().__init__(root)
        self.count, self.requests = count, Counter()

    def names(self, prefix):
        return (one.name for one in self.list(prefix))

    def list(self, prefix):
        for number, one in enumerate(self._all(prefix)):
            self.requests["LIST"] += number % 1000 == 0
            yield one

    def _all(self, prefix):
        yield from super().list(prefix)
        for number in range(self.count) if prefix.startswith(("ac/", "cas/")) else ():
            document = row(number)
            result = digest_bytes(canonical(document))
            key = digest_bytes(b"k%d" % number)
            if prefix.startswith("ac/"):
                yield Listed(f"ac/{GENERATION}/{key[:2]}/{key}.{result}", 0, 0.0)
            else:
                for digest, num_bytes in [(result, 300), *document["outputs"].values()]:
                    if blob_name(digest).startswith(prefix):
                        yield Listed(blob_name(digest), num_bytes, 0.0)

    def delete(self, names):
        names = list(names)
        self.requests["DELETE"] += -(-len(names) // 1000)


def bench(count: int) -> list[str]:
    """A row per step."""
    rows, held = [], tempfile.TemporaryDirectory()
    folder = Path(held.name)
    bucket = Synthetic(folder / "bucket", count)
    store = Store(Folder(folder / "cache"), bucket)
    for first in range(0, count, PAGE):
        page = store.put_bytes(b"\n".join(canonical(row(number)) for number in range(first, min(first + PAGE, count))))
        bucket.create(f"pages/{GENERATION}/{page.digest}", b"")

    def step(name: str, work) -> object:
        bucket.requests.clear()
        cpu = time.process_time()
        got = work()
        rows.append(f"| {count:,} | {name} | {time.process_time() - cpu:.1f} | {dict(bucket.requests)} | "
                    f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} |")
        return got

    live = Live()
    step("roots: half of the results", lambda: [live.add(row(number)) for number in range(count // 2)])
    found = step("survey", lambda: gc.survey(store, live, GRACE_S))
    assert len(found.dooms) == (count - count // 2) * 4
    step("tombstone", lambda: gc.bury(store, found))
    ripe = step("survey a grace period later", lambda: gc.survey(store, live, 0.0))
    assert len(ripe.goes) == len(found.dooms)
    return rows


if __name__ == "__main__":
    print("| results | step | CPU s | requests | peak MB |\n|---|---|---|---|---|")
    for size in map(int, sys.argv[1:]):
        print("\n".join(bench(size)), flush=True)
