"""The local store with many synthetic actions: put, commit, plan and get, in CPU seconds and peak memory.

    python -m tests.benchmarks.bench_store 10000 100000
"""

import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from stages.store.action import Action
from stages.store.store import Store

BLOB_BYTES = 1000


def action(number: int) -> Action:
    """The action of one synthetic scene."""
    return Action("sample", {"keyframe_hz": 2.0}, "c0de", "", {"scene": number}, {"recording": f"{number:064x}"})


def bench(count: int) -> list[str]:
    """One row per step: seconds, CPU seconds, per item."""
    folder = Path(tempfile.mkdtemp())
    store, rows = Store.in_folder(folder), []
    blobs = [b"%d" % number * BLOB_BYTES for number in range(count)]

    def step(name: str, work) -> object:
        wall, cpu = time.perf_counter(), time.process_time()
        got = work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rows.append(f"| {count:,} | {name} | {wall:.2f} | {cpu:.2f} | {cpu / count * 1e6:.0f} |")
        return got

    plain = folder / "plain"
    plain.mkdir()
    step("bare write of the same files", lambda: [(plain / str(i)).write_bytes(b) for i, b in enumerate(blobs)])
    put = step("put", lambda: [store.put_bytes(blob) for blob in blobs])
    step("commit", lambda: [store.commit(action(i), str(i), {}, {"pack.tar": blob}) for i, blob in enumerate(put)])
    store = Store.in_folder(folder)
    done = step("plan: one listing and all keys", lambda: plan(store, count))
    assert done == count
    step("get, verified", lambda: [store.need(blob.digest) for blob in put])
    shutil.rmtree(folder)
    return rows


def plan(store: Store, count: int) -> int:
    """How many of the wanted actions are done."""
    done = store.done(action(0).generation)
    return sum(action(number).key in done for number in range(count))


if __name__ == "__main__":
    print("| actions | step | s | CPU s | CPU µs per action |\n|---|---|---|---|---|")
    for size in map(int, sys.argv[1:]):
        print("\n".join(bench(size)))
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
