"""One measured process of `bench_sample`: prints what it took as a line of JSON."""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.bench_sample import CASES, NUM_SCENES, QUALITY


def make(case: str, folder: Path, out: Path) -> dict[str, str]:
    """The recording of that name in `folder`, ingested."""
    from tests.benchmarks import reference
    return {"folder": str(reference.ready(getattr(reference, case), folder))}


def ours(case: str, folder: Path, out: Path) -> dict[str, float]:
    """CPU seconds of the first scene and of one more in this process, which begins warm: its imports are done."""
    run = sampler(case, folder, out)
    begun = cpu_s()
    run()
    first = cpu_s()
    for _ in range(NUM_SCENES - 1):
        run()
    return {"first_s": first - begun, "scene_s": (cpu_s() - first) / (NUM_SCENES - 1), "peak_mb": peak_mb()}


def floor(case: str, folder: Path, out: Path) -> dict[str, float]:
    """CPU seconds of the bare loop's second time over the same bytes, of one without images, and of a plain read."""
    from tests.benchmarks import floors

    def took_s(run: Callable[[], object]) -> float:
        before = cpu_s()
        run()
        return cpu_s() - before

    run, rest = floors.FLOORS[case](folder, QUALITY), floors.without_images(folder, QUALITY)
    run(emptied(out))
    whole_s, rest_s = (took_s(lambda bare=bare: bare(emptied(out))) for bare in (run, rest))
    return {"scene_s": whole_s, "images_s": whole_s - rest_s, "read_s": took_s(lambda: floors.plain_read(folder))}


def place(case: str, folder: Path, out: Path) -> dict[str, float]:
    """CPU seconds and bytes read of a scene at the start and one near the end, by turns."""
    from tests.benchmarks import reference
    places = {"start": reference.T0_US + 1_000_000,
              "end": reference.T0_US + reference.HALF_HOUR_US - reference.SCENE_US - 1_000_000}
    runs = {name: sampler(case, folder, out, start_us) for name, start_us in places.items()}
    took: dict[str, list[float]] = {name: [] for name in places}
    read: dict[str, int] = {}
    for turn in range(1 + NUM_SCENES):
        for name, run in runs.items():
            before, bytes_before = cpu_s(), bytes_read()
            run()
            read[name] = bytes_read() - bytes_before
            took[name] += [cpu_s() - before] if turn else []
    return {f"{name}_s": statistics.median(took[name]) for name in places} | {
        f"{name}_mb": read[name] / 1e6 for name in places}


def imports(case: str, folder: Path, out: Path) -> dict[str, float]:
    """CPU seconds from the interpreter's start until a worker of the harness has what a scene needs."""
    import stages.harness
    import stages.sample  # noqa: F401
    return {"scene_s": cpu_s(), "peak_mb": peak_mb(), "torch": "torch" in sys.modules}


def sampler(case: str, folder: Path, out: Path, start_us: int | None = None) -> Callable[[], object]:
    """What a worker does for a scene, and the first to do it: sample it, and keep what came out in a store of a folder.
    """
    import yaml

    from stages import sample
    from stages.lib import knobs
    from stages.store.action import Action
    from stages.store.store import Store
    from tests.benchmarks import reference
    conf = yaml.safe_load((Path(__file__).parents[2] / "conf/sample/default.yaml").read_text())
    cfg = knobs.load(sample.Knobs, {**conf, **CASES[case], "jpeg_quality": QUALITY}, "sample")
    item, inputs = reference.scene(folder, *([start_us] if start_us else []))

    def run() -> None:
        store = Store.in_folder(emptied(out))
        with store.scratch() as made:
            facts = sample.run(cfg, item, inputs, made)
            outputs = {path.name: store.put_file(path) for path in sorted(made.iterdir())}
        store.commit(Action("sample", {}, "", "", {}, {}), item.name, facts, outputs)
    return run


def emptied(out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return out


def cpu_s() -> float:
    """User and system seconds of this process and its children."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF,
                                                                                  resource.RUSAGE_CHILDREN)))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def bytes_read() -> int:
    """What read(2) and its kin gave this process, from disk or cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    what, case, folder, out, start_at = sys.argv[1:]
    time.sleep(max(0.0, float(start_at) - time.time()))
    print(json.dumps(globals()[what](case, Path(folder), Path(out))))
