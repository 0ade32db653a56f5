"""`dvc repro` on ten simulated drives: everything, nothing to do, one drive added; and train steps a second.

CPU seconds are those of all processes.

    python -m tests.benchmarks.bench_graph
"""

import resource
import shutil
import tempfile
import time
from pathlib import Path

from stages.sim.simulate import simulate
from tests import clones
from tests.clones import counters, run

STEPS = 100
KNOBS = f"train: {{steps: {STEPS}}}\n"
ITEM_STAGES = ("ingest", "sample", "autolabel", "train", "evaluate")


def main() -> None:
    """Prints one row per step."""
    folder = Path(tempfile.mkdtemp())
    simulate(folder / "drives", 11, 20.0, 0, workers=2)
    clone = clones.new_clone(folder / "clone", KNOBS)
    bags = clone / "data/raw/bags"
    shutil.copytree(folder / "drives", bags, ignore=shutil.ignore_patterns("drive_0010*"))
    print("| step | s | CPU s | actions run / cached |\n|---|---|---|---|")
    scan = ("roadmill", "scan", "data/raw/bags", "--rig", "sim")
    timed("scan of ten drives", clone, scan)
    timed("everything", clone, ("dvc", "repro"))
    train_s = counters(clone)["train"]["seconds_per_item"]["detector"]
    timed("nothing to do", clone, ("dvc", "repro"))
    for path in (folder / "drives").glob("drive_0010*"):
        path.rename(bags / path.name)
    timed("scan with one more", clone, scan)
    timed("one drive added to ten", clone, ("dvc", "repro"))
    print(f"\n{STEPS / train_s:.2f} train steps/s, reading and the batch norm statistics at the end included")
    shutil.rmtree(folder)


def timed(name: str, clone: Path, command: tuple[str, ...]) -> None:
    """Runs a command and prints its row."""
    (clone / "results/run.json").unlink(missing_ok=True)
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run(clone, *command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record = counters(clone) if (clone / "results/run.json").exists() else {}
    did = ", ".join(f"{stage} {record[stage]['ran']}/{record[stage]['cached']}"
                    for stage in ITEM_STAGES if stage in record)
    print(f"| {name} | {time.perf_counter() - wall:.1f} | {cpu_s:.1f} | {did} |", flush=True)


if __name__ == "__main__":
    main()
