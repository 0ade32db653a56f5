"""What a scene costs to sample, beside what its bytes cost to read, decode and encode at all.

    python -m tests.benchmarks.bench_sample [CASE ...]

The recordings are made on the first call and kept under $TMPDIR/roadmill-bench (2.5 GB). Ours is the marginal cost of a
scene in a warm worker: that of five scenes less that of one, over four. Floor and ours take turns, five times, each in
a process of its own; the table has the medians of both, and that of their ratios.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages.runners.local import ENVIRONMENT

ROOT = Path(__file__).parents[2]
NUM_PAIRS = 5
NUM_SCENES = 5
QUALITY = 90
STILL = {"motion_compensate": False}
CASES = {
    "copied": {**STILL, "undistort": False},
    "copied_compensated": {"undistort": False},
    "undistorted": STILL,
    "undistorted_small": {**STILL, "image_width_px": 640},
    "video": {**STILL, "undistort": False, "camera_sweep_hz": 10.0}}
RECORDINGS = {"video": "video"}  # the others: photographs
FLOORS = {"copied_compensated": "copied"}  # the others: their own
AIMS = {"copied": (1.3, 250), "undistorted": (1.15, 300), "undistorted_small": (1.2, 300), "video": (1.25, 400)}


def main(cases: list[str]) -> None:
    """Prints the tables of the cases, and the rows that belong to no case where all are asked for."""
    base = Path(tempfile.gettempdir()) / "roadmill-bench"
    folders = {name: Path(start("make", name, base / name, base).result()["folder"])
               for name in ("photographs", "video", "half_hour") if not cases or name in needed(cases)}
    print("| case | plain read CPU-s | floor CPU-s | its images alone | ours CPU-s | ours / floor | aim | peak MB | "
          "aim MB | pairs |\n|---|---|---|---|---|---|---|---|---|---|")
    for case in cases or CASES:
        print(row(case, folders[RECORDINGS.get(case, "photographs")], base), flush=True)
    if not cases:
        print("\n" + "\n".join([*others(folders, base)]))


def row(case: str, folder: Path, base: Path) -> str:
    """One line of the table."""
    floors, scenes = [], []
    for _ in range(NUM_PAIRS):
        floors.append(start("floor", FLOORS.get(case, case), folder, base).result())
        scenes.append(start("ours", case, folder, base).result())
    ratio = statistics.median(ours["scene_s"] / floor["scene_s"] for ours, floor in zip(scenes, floors))
    aim, aim_mb = AIMS.get(case, ("", ""))
    return (f"| {case} | {median(floors, 'read_s'):.2f} | {median(floors, 'scene_s'):.2f} | "
            f"{median(floors, 'images_s'):.2f} | {median(scenes, 'scene_s'):.2f} | {ratio:.2f} | {aim} | "
            f"{median(scenes, 'peak_mb'):.0f} | {aim_mb} | {NUM_PAIRS} |")


def others(folders: dict[str, Path], base: Path) -> list[str]:
    """The lines that belong to no case."""
    started = [start("imports", "-", base, base).result() for _ in range(NUM_PAIRS)]
    at = start("place", "copied", folders["half_hour"], base).result()
    lines = [f"interpreter and imports: {median(started, 'scene_s'):.2f} CPU-s, {median(started, 'peak_mb'):.0f} MB, "
             f"{'with' if started[0]['torch'] else 'no'} torch",
             f"20 s of 30 min: {at['start_s']:.2f} CPU-s and {at['start_mb']:.1f} MB read at the start, "
             f"{at['end_s']:.2f} CPU-s and {at['end_mb']:.1f} MB near the end"]
    for case in ("copied", "undistorted"):
        for workers in (1, 2):
            together = [start("ours", case, folders["photographs"], base, name=f"out-{number}", wait_s=5.0)
                        for number in range(workers)]
            wall = time.time()
            cpu = statistics.mean(one.result()["scene_s"] for one in together)
            wall = time.time() - wall - 5.0
            lines.append(f"{case}, {workers} worker(s): {workers * NUM_SCENES / wall * 3600:.0f} scenes an hour, "
                         f"{cpu:.2f} CPU-s a scene")
    return lines


def needed(cases: list[str]) -> set[str]:
    return {RECORDINGS.get(case, "photographs") for case in cases}


def median(rows: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


class Child:
    """A measured process. This one stays small: a child's peak memory begins with its parent's."""

    def __init__(self, command: list[str], out: Path) -> None:
        self._out = out
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                         env={"PATH": "/usr/bin:/bin", **ENVIRONMENT})

    def result(self) -> dict[str, float]:
        """What it measured."""
        printed, _ = self._process.communicate()
        shutil.rmtree(self._out, ignore_errors=True)
        if self._process.returncode:
            sys.exit(f"a measured process ended with {self._process.returncode}")
        return json.loads(printed)


def start(what: str, case: str, folder: Path, base: Path, *, name: str = "out",
          wait_s: float = 0.0) -> Child:
    """A process of `child.py`."""
    out = base / name
    return Child([sys.executable, "-m", "tests.benchmarks.child", what, case, str(folder), str(out),
                  str(time.time() + wait_s)], out)


if __name__ == "__main__":
    main(sys.argv[1:])
