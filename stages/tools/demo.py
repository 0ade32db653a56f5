"""`roadmill demo`: the whole way, from drives that never happened to a score."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from pathlib import Path

from stages.lib.errors import ConfigError, RoadmillError
from stages.runners.run import Progress
from stages.sim.simulate import simulate as write_drives
from stages.tools.programs import PROGRAMS, has_identity, say
from stages.tools.scan import scan

DRIVES = Path("data/raw/demo")
BRANCH = "demo"
SUBJECT = "demo: 12 simulated drives"
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
    _want_branch(root)
    simulate(root / DRIVES, 12, 20.0, 0)
    scan(root, root / DRIVES, "sim")
    _show(root, "repro")
    scores = json.loads((root / "results/evaluate/metrics.json").read_text())
    _record(root)
    _show(root, "metrics", "show")
    cpu_s = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"car AP {scores['car_ap']:.3f} on {scores['num_drives']} val drives, {scores['num_key_frames']} key frames, "
          f"{scores['num_car_boxes']} car boxes")
    print(f"report results/evaluate/report.html   {(time.monotonic() - started) / 60:.1f} min, "
          f"{cpu_s / 60:.1f} CPU-min")


def _want_branch(root: Path) -> None:
    """Raises ConfigError where the branch `demo` holds other commits than the demo's own, which `_record` replaces."""
    if say(root, "git", "branch", "--show-current") != BRANCH and say(root, "git", "branch", "--list", BRANCH):
        subject = say(root, "git", "log", "-1", "--format=%s", BRANCH)
        if subject != SUBJECT:
            raise ConfigError(f"the branch {BRANCH!r} is where this command commits, and it ends with {subject!r}\n"
                              f"  `git branch -m {BRANCH} NAME` keeps that under another name")


def _record(root: Path) -> None:
    """Commits what this run decided and found, and nothing else, on the branch `demo`, made anew from here."""
    if say(root, "git", "branch", "--show-current") != BRANCH:
        say(root, "git", "switch", "--quiet", "--force-create", BRANCH)
    paths = [path for path in RECORDED if (root / path).exists()]
    say(root, "git", "add", "--", *paths)
    if say(root, "git", "status", "--porcelain", "--", *paths):
        author = () if has_identity(root) else ("-c", "user.name=roadmill demo", "-c", "user.email=demo@localhost")
        say(root, "git", *author, "commit", "--quiet", "-m", SUBJECT, "--", *paths)


def _show(root: Path, *words: str) -> None:
    if subprocess.run([*PROGRAMS["dvc"], *words], cwd=root).returncode:
        raise DemoFailedError(f"`dvc {' '.join(words)}` failed; it says why above")
