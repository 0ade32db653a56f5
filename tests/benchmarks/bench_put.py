"""What files cost to put into a store and to get out of it, and actions to commit, beside bare files.

    python -m tests.benchmarks.bench_put [--rounds 5]

Local; for a bucket see bench_bucket. CPU is user and system; the median of interleaved rounds.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stages.lib.digests import digest_file
from stages.store.action import Action
from stages.store.store import Store

SIZES = {"1,000 x 100 KB": (1000, 100_000), "20 x 50 MB": (20, 50_000_000)}
NUM_ACTIONS = 5000


def puts(num_rounds: int) -> None:
    """Prints what it costs to write files, to hash them, and to have them in the store."""
    print("| files | way | s | CPU s | MB/s | CPU, of writing and hashing |\n|---|---|---|---|---|---|")
    for label, (count, size) in SIZES.items():
        data, rows = os.urandom(size), {}
        for _ in range(num_rounds):
            with tempfile.TemporaryDirectory() as folder:
                for way, work in _ways(Path(folder), count, data).items():
                    started, cpu = time.perf_counter(), time.process_time()
                    work()
                    rows.setdefault(way, []).append(
                        (time.perf_counter() - started, time.process_time() - cpu))
        found = {way: [statistics.median(one) for one in zip(*times)] for way, times in rows.items()}
        base = found["write and hash"][1]
        for way, (wall, cpu) in found.items():
            print(f"| {label} | {way} | {wall:.2f} | {cpu:.2f} | {count * size / 1e6 / wall:.0f} | {cpu / base:.2f} |",
                  flush=True)


def _ways(folder: Path, count: int, data: bytes) -> dict[str, Callable[[], object]]:
    """Way -> work; each file has bytes of its own."""
    store, blobs = Store.in_folder(folder / "store"), []
    for name in ("plain", "copied", "hashed"):
        (folder / name).mkdir()

    def write(to: Path) -> list[Path]:
        paths = [to / str(number) for number in range(count)]
        for number, path in enumerate(paths):
            path.write_bytes(b"%s %d " % (to.name.encode(), number) + data)
        return paths

    def put() -> None:
        with store.scratch() as to:
            blobs.extend(store.put_file(path) for path in write(to))

    def get() -> None:
        again = Store.in_folder(folder / "store")
        for blob in blobs:
            again.need(blob.digest)

    return {"write": lambda: write(folder / "plain"),
            "copy": lambda: [shutil.copyfile(path, folder / "copied" / path.name)
                             for path in (folder / "plain").iterdir()],
            "write and hash": lambda: [digest_file(path) for path in write(folder / "hashed")],
            "write and put_file": put,
            "hash": lambda: [digest_file(path) for path in (folder / "hashed").iterdir()],
            "get, verified": get}


def commits(num_rounds: int) -> None:
    """Prints what a commit of an action with one file costs, beside four bare files."""
    rounds = []
    for _ in range(num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(_committed(Path(folder)))
    print("| actions | step | CPU µs each |\n|---|---|---|")
    for step in rounds[0]:
        print(f"| {NUM_ACTIONS:,} | {step} | {statistics.median(one[step] for one in rounds):.0f} |")


def _committed(folder: Path) -> dict[str, float]:
    """Step -> CPU µs each."""
    store, plain, blobs = Store.in_folder(folder / "store"), folder / "plain", []
    plain.mkdir()
    actions = [Action("sample", {"keyframe_hz": 2.0}, "c0de", "", {"scene": number},
                      {"recording": f"{number:064x}"}) for number in range(NUM_ACTIONS)]
    steps = {
        "four bare files": lambda number: [(plain / f"{number} {part}").write_bytes(b"%d" % number * 100)
                                           for part in range(4)],
        "put_bytes": lambda number: blobs.append(store.put_bytes(b"%d" % number * 1000)),
        "commit": lambda number: store.commit(actions[number], str(number), {}, {"pack.tar": blobs[number]})}
    found = {}
    for step, work in steps.items():
        cpu = time.process_time()
        for number in range(NUM_ACTIONS):
            work(number)
        found[step] = (time.process_time() - cpu) / NUM_ACTIONS * 1e6
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    puts(settings.rounds)
    print()
    commits(settings.rounds)
