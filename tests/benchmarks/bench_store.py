"""What a stage of many scenes costs when nothing, or one scene, is to be done; and DVC's own commands beside it.

    python -m tests.benchmarks.bench_store 1000 10000 100000 1000000 [--rounds 3] [--places folder bucket]
    python -m tests.benchmarks.bench_store 1000 10000 --dvc [--rounds 3]

The stage autolabel with its own `plan`, on the manifest of `count` scenes that sample made, and a store that has
all results. "plan" is the harness's plan and the store's listing; "no-op" and "one changed" are the whole stage, from
reading sample's manifest to the published one; the scene that changed runs in the same process and writes one file.
The bucket is `stub_s3`, whose own work is not in the figures. Each figure is the median of some rounds, each round a
process of its own; CPU is user and system.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import yaml

from stages import autolabel, harness
from stages.harness import Harness
from stages.lib.digests import canonical, digest_bytes
from stages.lib.knobs import knob
from stages.lib.stage import Summary
from stages.store.store import PAGE_DOCUMENTS, PAGE_MIN_DOCUMENTS, Store
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
SAMPLED = "data/sample/manifest.jsonl"
STAGE, URL = "autolabel", "s3://bench"
TABLES = ("sample", "sample_data", "ego_pose", "calibrated_sensor", "trajectory", "signals")
CATEGORIES = ("bicycle", "bus", "car", "pedestrian", "truck")


@dataclasses.dataclass(frozen=True)
class Knobs:
    gain: int = knob("a number", low=1)


def sampled(number: int) -> dict:
    """A row of sample's manifest, as long as real ones."""
    files = ("pack.tar", "preview.jpg", *(f"{name}.parquet" for name in TABLES))
    return {"facts": {"missing": {}, "num_samples": 40, "num_sweeps": 400, "scene_token": digest_bytes(b"%d" % number)},
            "name": f"car_{number % 7}/drive_{number // 40:06}-{number % 40:02}",
            "outputs": {file: [digest_bytes(f"{file} {number}".encode()), 1_000_000 + number] for file in files}}


def labelled(number: int) -> dict:
    """A result document of autolabel."""
    files = ("boxes.parquet", "picture.jpg", "raw.parquet")
    return {"facts": {"labeller": "auto", "mean_score": 0.5, "num_boxes": number % 977, "num_sightings": 5000,
                      "num_boxes_by_category": {name: number % 97 for name in CATEGORIES}, "num_sweeps": 400,
                      "num_tracks": 30, "scene_token": digest_bytes(b"%d" % number)},
            "outputs": {file: [digest_bytes(f"{file} {number}".encode()), 10_000 + number] for file in files}}


def perform(cfg, item, inputs, out):
    """One scene, labelled."""
    (out / "boxes.parquet").write_bytes(item.name.encode())
    return labelled(0)["facts"]


def collect(cfg, results, out):
    """A table with a line for each scene."""
    with (out.data / "table").open("w") as file:
        file.writelines(f"{one.name} {one.facts['num_boxes']}\n" for one in results)
    return Summary(len(results), len(results), "scenes")


def synthetic() -> None:
    """Puts the two stages in the place of the real ones, and items into this process."""
    stages = {"sample": SimpleNamespace(Knobs=Knobs, INPUTS=()),
              STAGE: SimpleNamespace(Knobs=Knobs, INPUTS=("sample",), plan=autolabel.plan, run=perform,
                                     collect=collect)}
    harness.module_of = lambda stage: stages[stage]
    harness.code.code_digest = lambda *where: "c0de"
    Harness.pins = {}
    Harness._open = lambda self, inputs: {}  # the inputs are synthetic too: their bytes are nowhere
    harness.local.perform = lambda function, tasks, **how: ((index, function(task)) for index, task in enumerate(tasks))


# a checkout of many scenes --------------------------------------------------------------------------------------------
def make(root: Path, count: int, places: list[str]) -> None:
    """A checkout whose store, in its folder and as FOLDER of `stub_s3`, has the results of all scenes."""
    shutil.copytree(ROOT / "conf", root / "conf")
    settings = {stage: {"gain": 1} for stage in ("sample", STAGE)} | {"cache": {"salt": "", "code_pins": {}}}
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    (root / "data/sample").mkdir(parents=True)
    rows = sorted(map(sampled, range(count)), key=lambda row: row["name"])
    (root / SAMPLED).write_bytes(b"".join(canonical(row) + b"\n" for row in rows))
    synthetic()
    planned = Harness(root).plan(STAGE)
    generation = next(iter(planned.values())).action.generation
    documents = [canonical(labelled(number)) for number in range(count)]
    store, bucket = Store.in_folder(root / "data/store"), Store.in_folder(root / "bucket")
    for first in range(0, count, PAGE_DOCUMENTS):
        page = b"\n".join(documents[first:first + PAGE_DOCUMENTS])
        for one in (store, bucket):
            one.shared.create(f"pages/{generation}/{one.put_bytes(page).digest}", b"")
    with (root / "bucket.names").open("w") as file:
        names = sorted(f"ac/{generation}/{key[:2]}/{key}.{digest_bytes(document)}" for key, document
                       in zip((one.action.key for one in planned.values()), documents))
        for name in names:
            if "folder" in places:
                store.shared.create(name, b"")
            file.write(f"{name}\n")
    if count <= PAGE_MIN_DOCUMENTS:  # no page is read for fewer
        for document in documents:
            store.put_bytes(document)
            bucket.put_bytes(document)


def point_to(root: Path, port: int) -> None:
    """Makes the stub's bucket the store that ROADMILL_STORE=s3 names."""
    path = root / "conf/store/s3.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {
        "url": URL, "dvc_remote": "s3://other/dvc", "endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}))


def change_one(root: Path, number: str) -> None:
    """Other bytes for one scene in sample's manifest."""
    path = root / SAMPLED
    lines = path.read_bytes().splitlines()
    row = json.loads(lines[0])
    row["outputs"]["pack.tar"][0] = digest_bytes(number.encode())
    path.write_bytes(b"\n".join([canonical(row), *lines[1:]]) + b"\n")


def plan(root: Path) -> None:
    """What would run."""
    one = Harness(root)
    planned = one.plan(STAGE)
    done = one.store.done(next(iter(planned.values())).action.generation)
    assert all(item.action.key in done for item in planned.values())


def run(root: Path) -> None:
    """The stage."""
    Harness(root).run(STAGE)


STEPS = {"plan": plan, "no-op": run, "one changed": run}


# rows -----------------------------------------------------------------------------------------------------------------
def child(step: str, root: Path, **environment: str) -> dict[str, float]:
    """What a process of this module says of a step."""
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_store", "--step", step, "--root", str(root)],
                          env=os.environ | environment, stdout=subprocess.PIPE, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(step: str, root: Path) -> None:
    """Does a step and prints its seconds, CPU seconds and peak memory as JSON."""
    synthetic()
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    STEPS[step](root)
    peak_kib = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps({"s": time.perf_counter() - started, "cpu_s": sum(os.times()[:4]) - cpu,
                      "peak_mb": peak_kib / 1024}))


def plans(count: int, places: list[str], num_rounds: int) -> None:
    """Prints the rows of one number of scenes."""
    with tempfile.TemporaryDirectory() as folder:
        root, port = Path(folder), free_port()
        subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_store", str(count), "--step", "make", "--root",
                        folder, "--places", *places], cwd=ROOT, check=True)
        point_to(root, port)
        server = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.stub_s3", str(port), f"{root}/bucket"],
                                  cwd=ROOT)
        try:
            asked(port)
            rows = {(place, step): [] for place in places for step in STEPS}
            for turn, ((place, step), found) in itertools.product(range(num_rounds), rows.items()):
                manifest = (root / SAMPLED).read_bytes()
                if step == "one changed":
                    change_one(root, f"{turn} {place}")
                found.append(child(step, root, ROADMILL_STORE="local" if place == "folder" else "s3",
                                   AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none"))
                found[-1]["requests"] = asked(port)
                (root / SAMPLED).write_bytes(manifest)
        finally:
            server.kill()
            server.wait()
    for (place, step), found in rows.items():
        one = median(found)
        print(f"| {count:,} | {place} | {step} | {one['s']:.2f} | {one['cpu_s']:.2f} | "
              f"{one['cpu_s'] / count * 1e6:.0f} | {one['peak_mb']:.0f} | {found[0]['requests']} |", flush=True)


def asked(port: int) -> str:
    """What the stub was asked since this was asked last."""
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/requests") as answer:
                return ", ".join(f"{count} {kind}" for kind, count in sorted(json.load(answer).items()))
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the stub does not answer")


def dvc(count: int, num_rounds: int) -> None:
    """Prints what DVC's own commands cost for a folder of so many files of some 100 bytes."""
    rows = {"dvc add, first": [], "dvc status, nothing changed": [], "dvc add, one changed": []}
    for _ in range(num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "files").mkdir()
            for number in range(count):
                (root / f"files/{number:07}").write_bytes(b"%07d" % number * 14)
            for words in ("git init", "dvc init"):
                timed(root, f"{words} --quiet")
            for row, found in rows.items():
                if "one" in row:
                    (root / "files/0000000").write_bytes(b"other")
                found.append(timed(root, f"{row.partition(',')[0]}{' files' if 'add' in row else ''}"))
    for row, found in rows.items():
        one = median(found)
        print(f"| {count:,} | - | {row} | {one['s']:.2f} | {one['cpu_s']:.2f} | {one['cpu_s'] / count * 1e6:.0f} | "
              f"{one['peak_mb']:.0f} | |", flush=True)


def timed(root: Path, command: str) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of a command."""
    started = time.perf_counter()
    started_child = subprocess.Popen(command.split(), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(started_child.pid, 0)
    assert status == 0, command
    return {"s": time.perf_counter() - started, "cpu_s": used.ru_utime + used.ru_stime,
            "peak_mb": used.ru_maxrss / 1024}


def median(rounds: list[dict]) -> dict[str, float]:
    """Of each figure by itself."""
    return {name: statistics.median(one[name] for one in rounds) for name in ("s", "cpu_s", "peak_mb")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("counts", nargs="*", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--places", nargs="+", default=["folder", "bucket"])
    parser.add_argument("--dvc", action="store_true")
    parser.add_argument("--step", choices=["make", *STEPS])
    parser.add_argument("--root", type=Path)
    settings = parser.parse_args()
    if settings.step == "make":
        make(settings.root, *settings.counts, settings.places)
    elif settings.step:
        measured(settings.step, settings.root)
    else:
        print("| scenes | store | step | s | CPU s | CPU µs a scene | peak MB | requests |\n"
              "|---|---|---|---|---|---|---|---|")
        for number in settings.counts:
            dvc(number, settings.rounds) if settings.dvc else plans(number, settings.places, settings.rounds)
