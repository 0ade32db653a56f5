"""`roadmill demo`: the whole way, from drives that never happened to a score."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from pathlib import Path

from stages.lib.errors import RoadmillError
from stages.runners.run import Progress
from stages.sim.simulate import simulate as write_drives
from stages.tools.scan import scan

DRIVES = Path("data/raw/demo")
BRANCH = "demo"
RECORDED = ("conf/config.yaml", "params.yaml", "data/recordings.dvc", "data/labels.dvc", "dvc.lock",
            "results/evaluate/metrics.json")


class DemoFailedError(RoadmillError):
    """A command of the demo failed; it has said why."""


def simulate(out: Path, num_drives: int, duration_s: float, seed: int) -> None:
    """Writes the drives with one process per core, and says how far it is."""
    with Progress("simulate", num_drives, 0) as bar:
        write_drives(out, num_drives, duration_s, seed, workers=len(os.sched_getaffinity(0)),
                     progress=lambda name, done, total: bar.advance())


def demo(root: Path) -> None:
    """Runs everything, prints the scores, the costs and the report, and commits the record on the branch `demo`."""
    started = time.monotonic()
    simulate(root / DRIVES, 12, 20.0, 0)
    scan(root, root / DRIVES, "sim")
    _run(root, "dvc", "repro")
    scores = json.loads((root / "results/evaluate/metrics.json").read_text())
    _record(root)
    _run(root, "dvc", "metrics", "show")
    cpu_s = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"car AP {scores['car_ap']:.3f} on {scores['num_drives']} val drives, {scores['num_key_frames']} key frames, "
          f"{scores['num_car_boxes']} car boxes")
    print(f"report results/evaluate/report.html   {(time.monotonic() - started) / 60:.1f} min, "
          f"{cpu_s / 60:.1f} CPU-min")


def _record(root: Path) -> None:
    """Commits what this run decided and found, and nothing else, on the branch `demo`."""
    if _git(root, "branch", "--show-current") != BRANCH:
        exists = _git(root, "branch", "--list", BRANCH)
        _git(root, "switch", "--quiet", *(["--merge", BRANCH] if exists else ["-c", BRANCH]))
    paths = [path for path in RECORDED if (root / path).exists()]
    _git(root, "add", "--", *paths)
    if _git(root, "status", "--porcelain", "--", *paths):
        author = [] if _git(root, "config", "--default", "", "user.email") else [
            "-c", "user.name=roadmill demo", "-c", "user.email=demo@localhost"]
        _git(root, *author, "commit", "--quiet", "-m", "demo: 12 simulated drives", "--", *paths)


def _git(root: Path, *words: str) -> str:
    ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise DemoFailedError(f"git {' '.join(words[:2])} failed: {ran.stderr.strip()[-300:]}")
    return ran.stdout.strip()


def _run(root: Path, *command: str) -> None:
    if subprocess.run(command, cwd=root).returncode:
        raise DemoFailedError(f"`{' '.join(command)}` failed; it says why above")
