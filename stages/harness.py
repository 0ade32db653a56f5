"""Runs a stage: plans its items, performs those that were never done, publishes the tables and says so in one line.

The one caller of stages, store and runners. A stage's outputs appear whole: they are written to `.part` folders and
renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from stages.lib import knobs, recordings, site, sources
from stages.lib.digests import canonical
from stages.lib.errors import ConfigError, DataError, RemoteError, RoadmillError
from stages.lib.stage import Blob, Item, Out, Result, Summary, Upstream
from stages.runners import local
from stages.runners.run import Lock, Progress, RunRecord, remove_leftovers, scratch_prefix
from stages.store import code
from stages.store.action import Action
from stages.store.local import LocalStore

STAGES = ("ingest", "curate", "split", "sample", "autolabel", "merge", "train", "evaluate")
DATA_FOLDERS = {stage: f"data/{stage}" for stage in (*STAGES, "recordings", "labels")} | {"train": "models"}
MANIFEST = "manifest.jsonl"


class StageFailedError(RoadmillError):
    """Some items failed; the others are committed."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Planned:
    """An item whose inputs are digests, and its action."""

    stage: str
    item: Item
    action: Action


class Harness:
    """The stages of the checkout in `root`, with its params.yaml, on this machine's store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = site.load()
        self.store = LocalStore(self.site.store, rebuild=self.rebuild)

    # what a stage is given ----------------------------------------------------------------------------------------
    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """params.yaml."""
        path = self.root / "params.yaml"
        if not path.exists():
            raise ConfigError(f"{path} does not exist\n  `roadmill compose` makes it from conf/")
        return yaml.safe_load(path.read_text())

    @functools.cached_property
    def pins(self) -> dict[str, str]:
        """Pinned package versions, which are those installed."""
        pins = code.read_pins(self.root / "constraints.txt")
        code.check_installed(pins)
        return pins

    def knobs(self, stage: str) -> Any:
        """The stage's knobs from its section of params.yaml. Raises ConfigError."""
        if stage not in self.params:
            raise ConfigError(f"params.yaml has no section {stage!r}\n  `roadmill compose` makes it from conf/{stage}/")
        return knobs.load(module_of(stage).Knobs, self.params[stage], stage)

    def upstream(self, name: str) -> Upstream:
        """What an earlier stage left on disk. Raises ConfigError where that is missing."""
        folder = self.root / DATA_FOLDERS[name]
        if not folder.is_dir():
            command = "roadmill scan SOURCE --rig RIG" if name in ("recordings", "labels") else f"dvc repro {name}"
            raise ConfigError(f"{folder} does not exist\n  `{command}` makes it, `dvc pull` fetches it")
        return Upstream(folder, tuple(self.results(name)))

    def inputs(self, stage: str) -> dict[str, Upstream]:
        """name -> Upstream of all that the stage reads."""
        return {name: self.upstream(name) for name in module_of(stage).INPUTS}

    def results(self, stage: str) -> Iterator[Result]:
        """The results that the stage's manifest on disk lists."""
        for row in self.manifest_rows(stage):
            if "outputs" in row:
                outputs = {name: Blob(*blob) for name, blob in row["outputs"].items()}
                yield Result(row["name"], row["facts"], outputs, functools.partial(self._path, outputs))

    def manifest_rows(self, stage: str) -> list[dict[str, Any]]:
        """The lines of the stage's manifest on disk; none where there is no manifest."""
        path = self.root / DATA_FOLDERS[stage] / MANIFEST
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _path(self, outputs: Mapping[str, Blob], name: str) -> Path:
        return self.store.need(outputs[name].digest)

    # actions ------------------------------------------------------------------------------------------------------
    def plan(self, stage: str) -> list[Planned]:
        """All items of the stage that is wanted now, with their actions, by name. Raises ConfigError."""
        module, cfg, cache = module_of(stage), self.knobs(stage), self.params["cache"]
        digest = cache["code_pins"].get(stage) or code.code_digest(self.root, f"stages.{stage}", "run", self.pins)
        planned = []
        for item in sorted(module.plan(cfg, self.inputs(stage)), key=lambda item: item.name):
            inputs = {role: self.store.put_copy(what).digest if isinstance(what, Path) else what
                      for role, what in sorted(item.inputs.items())}
            item = dataclasses.replace(item, inputs=inputs)
            planned.append(Planned(stage, item, Action(
                stage, knobs.keyed(cfg), digest, cache["salt"], item.params, inputs)))
        names = [one.item.name for one in planned]
        twins = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twins:
            raise ConfigError(f"{stage}: {len(twins)} names stand for two items each, first {twins[0]!r}")
        return planned

    def perform(self, planned: Planned) -> tuple[dict[str, Any], dict[str, Blob], str]:
        """Runs one item and commits it: (facts, outputs, digest of the result)."""
        with tempfile.TemporaryDirectory(dir=self._scratch(), prefix=scratch_prefix()) as folder:
            out = Path(folder) / "out"
            out.mkdir()
            inputs = {role: self.open(digest) for role, digest in planned.item.inputs.items()}
            facts = module_of(planned.stage).run(self.knobs(planned.stage), planned.item, inputs, out)
            outputs = {path.relative_to(out).as_posix(): self.store.put_file(path)
                       for path in sorted(out.rglob("*")) if path.is_file()}
        if not outputs:
            raise RuntimeError(f"{planned.stage}: {planned.item.name} gave no file")
        return facts, outputs, self.store.commit(planned.action, planned.item.name, facts, outputs)

    def open(self, digest: str) -> Path:
        """The recording or blob with this digest, as a local path."""
        recording = self._recordings.get(digest)
        if recording is None:
            return self.store.need(digest)
        hashes = sources.Hashes(self.site.root)
        path = sources.locate(recording, self.site.sources.values(), hashes)
        hashes.save()
        return path

    def rebuild(self, digest: str) -> bool:
        """Runs the item again whose recorded output this is; False where no manifest names it.

        Raises RemoteError where the item now gives other bytes.
        """
        made_by = self._makers.get(digest)
        if made_by is None:
            return False
        stage, name = made_by
        planned = {one.item.name: one for one in self.plan(stage)}.get(name)
        if planned is None:
            return False
        print(f"{stage}: {name} is made again, {digest[:12]}… was gone", file=sys.stderr)
        _, outputs, _ = self.perform(planned)
        if digest not in {blob.digest for blob in outputs.values()}:
            got = ", ".join(f"{file} {blob.digest[:12]}…" for file, blob in outputs.items())
            raise RemoteError(f"{stage}: {name} was made again and gave other bytes: {got}, data/{stage} wants {digest}\n"
                              f"  `dvc repro {stage}` brings the manifest up to date with the code and the settings")
        return True

    @functools.cached_property
    def _recordings(self) -> dict[str, recordings.Recording]:
        folder = self.root / DATA_FOLDERS["recordings"]
        return {one.digest: one for one in recordings.read(folder)} if folder.is_dir() else {}

    @functools.cached_property
    def _makers(self) -> dict[str, tuple[str, str]]:
        """digest -> (stage, item) that made it, by the manifests on disk."""
        return {blob.digest: (stage, result.name) for stage in STAGES for result in self.results(stage)
                for blob in result.outputs.values()}

    def _scratch(self) -> Path:
        folder = self.site.store / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # a whole stage ------------------------------------------------------------------------------------------------
    def run(self, stage: str) -> None:
        """Brings data/<stage> and results/<stage> up to date. Raises RoadmillError where that fails."""
        lock = Lock(self.root / ".roadmill" / f"{stage}.lock", stage)
        with lock, RunRecord(self.root, self.site.store, stage) as record:
            remove_leftovers(self._scratch())
            out = self._parts(stage)
            module, cfg = module_of(stage), self.knobs(stage)
            started = time.monotonic()
            if hasattr(module, "plan"):
                results = self._run_items(stage, cfg, out, record)
                summary = module.collect(cfg, results, out)
            else:
                summary = module.run(cfg, self.inputs(stage), out)
            if summary.num_out == 0:
                raise DataError(f"{stage}: nothing is left of {summary.num_in} {summary.unit_in or summary.unit}: "
                                f"{_counts(summary.dropped) or 'no item'}\n  `roadmill why {stage}` names its settings")
            self._publish(stage, out)
            record.counts |= {"num_in": summary.num_in, "num_out": summary.num_out}
            print(self._line(stage, summary, record.counts, time.monotonic() - started), flush=True)

    def _run_items(self, stage: str, cfg: Any, out: Out, record: RunRecord) -> list[Result]:
        plan = self.plan(stage)
        done = {generation: self.store.done(generation) for generation in {one.action.generation for one in plan}}
        rows: dict[str, dict[str, Any]] = {}
        misses = []
        for one in plan:
            known = done[one.action.generation].get(one.action.key)
            document = self.store.result(known) if known else None
            if document is None:
                misses.append((one, known))
            else:
                rows[one.item.name] = document
        record.counts |= {"items": len(plan), "cached": len(plan) - len(misses), "ran": len(misses)}
        failures = {}
        with Progress(stage, len(plan), len(rows)) as progress:
            outcomes = local.perform(_perform_in_worker, [(self.root, one) for one, _ in misses],
                                     workers=self.site.workers, timeout_s=self.site.timeout_of(stage))
            for index, outcome in outcomes:
                one, known = misses[index]
                if isinstance(outcome, BaseException):
                    failures[one.item.name] = outcome
                else:
                    facts, outputs, result, seconds = outcome
                    blobs = {file: [blob.digest, blob.bytes] for file, blob in outputs.items()}
                    rows[one.item.name] = {"facts": facts, "outputs": blobs}
                    record.item(one.item.name, seconds)
                    if known and known != result:
                        self.store.disown(one.action, known)
                progress.advance()
        self._judge(stage, cfg, failures, len(plan))
        lines = [{"name": name, **rows[name]} for name in rows]
        lines += [{"name": name, "error": str(error)} for name, error in failures.items()]
        manifest = b"".join(canonical(line) + b"\n" for line in sorted(lines, key=lambda line: line["name"]))
        (out.data / MANIFEST).write_bytes(manifest)
        results = []
        for name in sorted(rows):
            outputs = {file: Blob(*blob) for file, blob in rows[name]["outputs"].items()}
            results.append(Result(name, rows[name]["facts"], outputs, functools.partial(self._path, outputs)))
        return results

    def _judge(self, stage: str, cfg: Any, failures: Mapping[str, BaseException], num_items: int) -> None:
        """Names the failed items; raises StageFailedError unless all are the recordings' own fault and few enough."""
        if not failures:
            return
        for name, error in sorted(failures.items()):
            print(f"{stage}: {name}: {error or type(error).__name__}", file=sys.stderr)
        own_fault = all(isinstance(error, DataError) for error in failures.values())
        allowed = getattr(cfg, "max_failed_ratio", 0.0)
        if own_fault and len(failures) <= allowed * num_items:
            return
        codes = [getattr(error, "exit_code", 1) for error in failures.values()]
        exit_code = DataError.exit_code if own_fault else max(codes)
        hint = f"\n  {stage}.max_failed_ratio={allowed:g} allows {int(allowed * num_items)}" if own_fault else ""
        text = f"{stage}: {len(failures)} of {num_items} items failed, the others are kept{hint}"
        raise StageFailedError(text, exit_code)

    def _parts(self, stage: str) -> Out:
        folders = [self.root / f"{name}.part" for name in (DATA_FOLDERS[stage], f"results/{stage}")]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return Out(*folders)

    def _publish(self, stage: str, out: Out) -> None:
        for part, name in ((out.data, DATA_FOLDERS[stage]), (out.results, f"results/{stage}")):
            place = self.root / name
            shutil.rmtree(place, ignore_errors=True)
            part.rename(place)

    def _line(self, stage: str, summary: Summary, counts: Mapping[str, int], seconds: float) -> str:
        came = f"{summary.num_in} {summary.unit_in}".strip()
        cells = [f"{stage:<10}{came} -> {summary.num_out} {summary.unit}"]
        if summary.dropped:
            cells.append(f"dropped: {_counts(summary.dropped)}")
        if "ran" in counts:
            cells.append(f"cached {counts['cached']}, ran {counts['ran']}")
        cells.append(f"{seconds:.1f} s")
        report = Path("results") / stage / "report.html"
        if (self.root / report).exists():
            cells.append(str(report))
        return "   ".join(cells) + "".join(f"\n  {note}" for note in summary.notes)


def module_of(stage: str) -> ModuleType:
    """The stage's module. Raises ConfigError for a name that is no stage."""
    if stage not in STAGES:
        raise ConfigError(f"{stage!r} is not a stage{knobs.near_miss(stage, STAGES)}; stages: {', '.join(STAGES)}")
    return importlib.import_module(f"stages.{stage}")


@functools.cache
def _harness_of_worker(root: Path) -> Harness:
    return Harness(root)


def _perform_in_worker(task: tuple[Path, Planned]) -> tuple[dict[str, Any], dict[str, Blob], str, float]:
    root, planned = task
    started = time.monotonic()
    return *_harness_of_worker(root).perform(planned), time.monotonic() - started


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{rule} {count}" for rule, count in sorted(dropped.items(), key=lambda d: (-d[1], d[0])) if count)
