"""Runs a stage: plans its items, performs those that were never done, publishes the tables and says so in one line.

The one caller of stages, store and runners. A stage's outputs appear whole: they are written to `.part` folders and
renamed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.lib import knobs, recordings, site
from stages.lib.checkpoints import Checkpoints
from stages.lib.digests import canonical, digest_bytes, digest_file
from stages.lib.errors import ConfigError, DataError, RemoteError, RoadmillError
from stages.lib.knobs import knob
from stages.lib.secrets import redacted
from stages.lib.stage import Item, Out, Result, Summary, Upstream
from stages.runners import local
from stages.runners.run import Lock, Progress, RunRecord, judge, told
from stages.store import code, gc, manifest
from stages.store.action import Action, Operation
from stages.store.places import open_store
from stages.store.ranged import RangedPath
from stages.store.sources import Hashes, Source, locate, open_source

STAGES = ("ingest", "curate", "split", "sample", "autolabel", "merge", "train", "evaluate")
ITEM_STAGES = ("ingest", "sample", "autolabel", "train", "evaluate")
DATA_FOLDERS = {stage: f"data/{stage}" for stage in (*STAGES, "recordings", "labels")} | {"train": "models"}
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class CacheKnobs:
    """When a result made before is taken: the section `cache` of params.yaml."""

    salt: str = knob("changed to disown every result made before")
    code_pins: dict[str, str] = knob("stage -> older code digest to go on using, as `roadmill explain` shows it")


@dataclass(frozen=True, slots=True)
class Planned:
    """An item whose inputs are digests, and its action.

    files  those of this checkout that are among its inputs: in the store once the item is to run
    """

    stage: str
    item: Item
    action: Action
    files: tuple[Path, ...] = ()


class Harness:
    """The stages of the checkout in `root`, with its params.yaml, on this machine's store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = site.load(root)
        self.store = open_store(self.site.store, self.site.root, self.rebuild)
        self._plans: dict[str, dict[str, Planned]] = {}
        self._fresh: dict[str, Path] = {}

    # what a stage is given ----------------------------------------------------------------------------------------
    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """params.yaml."""
        return knobs.read(self.root / "params.yaml", "`roadmill compose` makes it from conf/")

    @functools.cached_property
    def pins(self) -> dict[str, str]:
        """Pinned package versions, which are those installed."""
        pins = code.read_pins(self.root / "constraints.txt")
        code.check_installed(pins)
        return pins

    def knobs(self, stage: str) -> Any:
        """The stage's knobs from its section of params.yaml. Raises ConfigError."""
        return load_knobs(self.params, stage)

    def upstream(self, name: str) -> Upstream:
        """What an earlier stage left on disk. Raises ConfigError where that is missing."""
        folder = self.root / DATA_FOLDERS[name]
        if not folder.is_dir():
            command = "roadmill scan SOURCE --rig RIG" if name in ("recordings", "labels") else f"dvc repro {name}"
            raise ConfigError(f"{folder} does not exist\n  `{command}` makes it, `dvc pull` fetches it")
        return Upstream(folder, self.results(name))

    def inputs(self, stage: str) -> dict[str, Upstream]:
        """name -> Upstream of all that the stage reads."""
        return {name: self.upstream(name) for name in module_of(stage).INPUTS}

    def results(self, stage: str) -> Sequence[Result]:
        """The results that the stage's manifest lists, just made or on disk; none where there is none."""
        path = self._manifest(stage)
        return manifest.Manifest(path, DATA_FOLDERS[stage], self.store.need) if path.exists() else ()

    def manifest_rows(self, stage: str) -> list[dict[str, Any]]:
        """The lines of the stage's manifest, just made or on disk; none where there is none. Raises ConfigError."""
        return list(manifest.rows(self._manifest(stage), DATA_FOLDERS[stage]))

    def _manifest(self, stage: str) -> Path:
        return self._fresh.get(stage, self.root / DATA_FOLDERS[stage] / MANIFEST)

    # actions ------------------------------------------------------------------------------------------------------
    def plan(self, stage: str) -> dict[str, Planned]:
        """Name -> item with its action, in order, of all items of the stage that are wanted now. Raises ConfigError."""
        if stage not in self._plans:
            self._plans[stage] = self._plan(stage)
        return self._plans[stage]

    def _plan(self, stage: str) -> dict[str, Planned]:
        module, cfg, cache = module_of(stage), self.knobs(stage), load_knobs(self.params, "cache")
        digest = cache.code_pins.get(stage) or code.code_digest(self.root, f"stages.{stage}", "run", self.pins)
        operation, planned = Operation(stage, knobs.keyed(cfg), digest, cache.salt), {}
        for item in sorted(module.plan(cfg, self.inputs(stage)), key=lambda item: item.name):
            if item.name in planned:
                raise ConfigError(f"{stage}: two items are called {item.name!r}\n"
                                  "  rename one of the recordings and run `roadmill scan` again")
            files = tuple(what for what in item.inputs.values() if isinstance(what, Path))
            if files:
                item = replace(item, inputs={role: digest_file(what) if isinstance(what, Path) else what
                                             for role, what in item.inputs.items()})
            planned[item.name] = Planned(stage, item, operation.action(item.params, item.inputs), files)
        return planned

    def perform(self, planned: Planned) -> str:
        """Runs one item and commits it; the result's digest. It goes on where an attempt that was stopped left it."""
        module, kept = module_of(planned.stage), []
        with contextlib.ExitStack() as stack:
            if getattr(module, "RESUMES", False):
                kept = [stack.enter_context(
                    Checkpoints(self.store.shared, planned.action.key, self.site.checkpoint_s))]
            folder, held = stack.enter_context(self.store.scratch()), stack.enter_context(self.store.scratch())
            inputs = self._open(planned.item.inputs, held)
            facts = module.run(self.knobs(planned.stage), planned.item, inputs, folder, *kept)
            outputs = {path.relative_to(folder).as_posix(): self.store.put_file(path)
                       for path in sorted(folder.rglob("*")) if path.is_file()}
            if not outputs:
                raise RuntimeError(f"{planned.stage}: {planned.item.name} gave no file")
            result = self.store.commit(planned.action, planned.item.name, facts, outputs)
            for checkpoints in kept:
                checkpoints.forget()
        return result

    def _offer(self, planned: Planned) -> None:
        """Puts the item's files into the store, where whoever runs it finds them."""
        for path in planned.files:
            self.store.put_copy(path)

    def _open(self, inputs: Mapping[str, str], held: Path) -> dict[str, Path | RangedPath]:
        """role -> path of the blob or recording that is wanted there, which stays as long as the scratch folder `held`;
        of a recording in a bucket: what reads like one."""
        blobs = sorted({digest for digest in inputs.values() if digest not in self._recordings})
        lost = [digest for digest, path in zip(blobs, self.store.find_all(blobs)) if path is None]
        for digest in sorted(lost, key=lambda digest: len(self._makers.get(digest, ()))):
            self.store.need(digest)  # first what one item alone makes: it may bring back what others made too
        return {role: locate(self._recordings[digest], self.sources)
                if digest in self._recordings else self.store.hold(digest, held)
                for role, digest in sorted(inputs.items())}

    def rebuild(self, digest: str) -> bool:
        """Runs an item again whose recorded output this is; False where no manifest names it.

        Raises what the first such item ends with where none gives these bytes.
        """
        failed = []
        for stage, name in self._makers.get(digest, ()):
            try:
                if name in self.plan(stage):
                    self._make_again(self.plan(stage)[name], digest)
                    return True
            except RoadmillError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return False

    def _make_again(self, planned: Planned, digest: str) -> None:
        stage, name = planned.stage, planned.item.name
        self._offer(planned)
        self.perform(planned)
        if self.store.find(digest) is None:
            self.store.forget_lost(planned.action)
            made = self.store.lookup(planned.action)["outputs"]
            got = ", ".join(f"{file} {other[:12]}…" for file, (other, _) in made.items())
            raise RemoteError(f"{stage}: {name} was made again and gave other bytes: {got}\n"
                              f"  {DATA_FOLDERS[stage]} wants {digest}\n"
                              f"  `dvc repro -f {stage}` goes on with what the code and the settings give now")
        print(f"{stage}: {name} was made again, {digest[:12]}… was gone", file=sys.stderr)

    @functools.cached_property
    def _recordings(self) -> dict[str, recordings.Recording]:
        folder = self.root / DATA_FOLDERS["recordings"]
        return {one.digest: one for one in recordings.read(folder)} if folder.is_dir() else {}

    @functools.cached_property
    def sources(self) -> list[Source]:
        """Where recordings are looked for."""
        hashes = Hashes(self.site.root)
        return [open_source(where, self.site, hashes) for where in self.site.sources.values()]

    @functools.cached_property
    def _makers(self) -> dict[str, list[tuple[str, str]]]:
        """digest -> (stage, item) of those that made it, by the manifests."""
        found = defaultdict(list)
        for stage in ITEM_STAGES:
            for result in self.results(stage):
                for blob in result.outputs.values():
                    found[blob.digest].append((stage, result.name))
        return found

    # a whole stage ------------------------------------------------------------------------------------------------
    def run(self, stage: str) -> None:
        """Brings data/<stage> and results/<stage> up to date. Raises RoadmillError where that fails."""
        module, cfg = module_of(stage), self.knobs(stage)
        with Lock(self.root / ".roadmill" / f"{stage}.lock", stage), \
                RunRecord(self.root, stage, self._keep_run) as record:
            self.store.remove_leftovers()
            out = self._parts(stage)
            started = time.monotonic()
            if stage in ITEM_STAGES:
                summary = module.collect(cfg, self._run_items(stage, cfg, out, record), out)
            else:
                summary = module.run(cfg, self.inputs(stage), out)
            if summary.num_out == 0:
                raise DataError(f"{stage}: nothing is left of {summary.num_in} {summary.unit_in or summary.unit}: "
                                f"{_counts(summary.dropped) or 'no item'}\n  `roadmill why {stage}` names its settings")
            self._publish(stage, out)
            record.counts |= {"num_in": summary.num_in, "num_out": summary.num_out}
            print(self._line(stage, summary, record.counts, time.monotonic() - started), flush=True)

    def _rescue(self, stage: str, generation: str, keys: set[str]) -> None:
        """Keeps what this run uses from being collected; who may only read the store is told what can't be kept."""
        try:
            gc.rescue(self.store.shared, generation, keys)
        except RemoteError as error:
            print(f"{stage}: a collection has doomed what this run uses, and it can't be kept: {told(error)}",
                  file=sys.stderr)

    def _keep_run(self, stage: str, record: Mapping[str, Any]) -> None:
        self.store.keep_run(stage, record)
        self.store.keep_clone(self.site.root)

    def _run_items(self, stage: str, cfg: Any, out: Out, record: RunRecord) -> Sequence[Result]:
        plan = self.plan(stage)
        generation = next(iter(plan.values())).action.generation if plan else ""
        done = self.store.done(generation) if plan else {}
        if done:
            self._rescue(stage, generation, {one.action.key for one in plan.values()})
        documents = self._documents(plan, done)
        misses = [one for name, one in plan.items() if name not in documents]
        record.counts |= {"items": len(plan), "cached": len(documents), "ran": len(misses)}
        failures = {}
        for one in misses:
            self._offer(one)
        with Progress(stage, len(plan), len(documents)) as progress:
            outcomes = local.perform(_perform_in_worker, [(self.root, one) for one in misses],
                                     workers=self.site.workers, timeout_s=self.site.timeout_of(stage))
            for index, outcome in outcomes:
                one = misses[index]
                if isinstance(outcome, BaseException):
                    failures[one.item.name] = outcome
                else:
                    record.item(one.item.name, outcome, one.action.key)
                    if one.action.key in done:
                        self.store.forget_lost(one.action)
                progress.advance()
        judge(stage, failures, len(plan), getattr(cfg, "max_failed_ratio", 0.0))
        if misses:
            ran = {one.item.name: one for one in misses if one.item.name not in failures}
            made = self.store.done_of([one.action for one in ran.values()], len(plan))
            documents |= self._documents(ran, made)  # as all readers take them, twins included
            for name in sorted(ran.keys() - documents.keys()):
                raise RemoteError(f"{stage}: {name} was done, but {self.store.shared.where} has lost its result again\n"
                                  "  `roadmill store fsck` looks for the damage, `dvc repro` does it once more")
            self.store.keep_pages(generation, {digest_bytes(document): document for document in documents.values()})
        manifest.write(out.data / MANIFEST, documents,
                       {name: self._portable(error) for name, error in failures.items()})
        # `collect` may find blobs gone: DVC has removed the manifest on disk that would say what made them
        self._fresh[stage] = out.data / MANIFEST
        self.__dict__.pop("_makers", None)
        return self.results(stage)

    def _documents(self, plan: Mapping[str, Planned], done: Mapping[str, str]) -> dict[str, bytes]:
        """Item -> result document of those that were done and whose document is whole; of two results, any that is."""
        keys = {name: one.action.key for name, one in plan.items() if one.action.key in done}
        if not keys:
            return {}
        found = self.store.documents(next(iter(plan.values())).action.generation, {done[key] for key in keys.values()})
        documents = {}
        for name, key in keys.items():
            if done[key] in found:
                documents[name] = found[done[key]]
            elif other := self.store.lookup(plan[name].action):
                documents[name] = canonical(other)
        return documents

    def _portable(self, error: BaseException) -> str:
        """The error's text without this machine's folders: manifests are equal everywhere."""
        text = redacted(str(error))
        for folder in (*self.site.sources.values(), self.site.store_folder):
            text = text.replace(f"{folder}/", "")
        return text

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
        self._fresh.pop(stage, None)

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
    return importlib.import_module(f"stages.{known_stage(stage)}")


def known_stage(stage: str) -> str:
    """The name itself. Raises ConfigError where it is no stage's."""
    if stage not in STAGES:
        raise ConfigError(f"{stage!r} is not a stage{knobs.near_miss(stage, STAGES)}; stages: {', '.join(STAGES)}")
    return stage


def load_knobs(params: Mapping[str, Any], section: str) -> Any:
    """The knobs of one section of params.yaml: a stage's, or `cache`. Raises ConfigError, also for unknown sections."""
    sections = (*STAGES, "cache")
    for name in params:
        if name not in sections:
            raise ConfigError(f"params.yaml has an unknown section {name!r}{knobs.near_miss(str(name), sections)}\n"
                              "  mend conf/ and run `roadmill compose`")
    if section not in params:
        raise ConfigError(f"params.yaml has no section {section!r}\n  `roadmill compose` makes it from conf/")
    if section != "cache":
        return knobs.load(module_of(section).Knobs, params[section], section)
    cache = knobs.load(CacheKnobs, params[section], section)
    for stage in cache.code_pins:
        known_stage(stage)
    return cache


@functools.cache
def _harness_of_worker(root: Path) -> Harness:
    return Harness(root)


def _perform_in_worker(task: tuple[Path, Planned]) -> float:
    """Seconds it took."""
    root, planned = task
    started = time.monotonic()
    _harness_of_worker(root).perform(planned)
    return time.monotonic() - started


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{rule} {count}" for rule, count in sorted(dropped.items(), key=lambda d: (-d[1], d[0])) if count)
