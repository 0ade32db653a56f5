"""A detector learned from the train split: weights, the same as ONNX, learning curves, a model card."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import polars as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stages.lib import card, detector, geometry, onnx_model, ranks, report, tables, training
from stages.lib.checkpoints import NOTHING
from stages.lib.dataset import TABLES, Dataset, box_array, move_boxes
from stages.lib.detector import Architecture, Detector
from stages.lib.digests import canonical, digest_bytes, digest_file
from stages.lib.errors import ConfigError, DataError
from stages.lib.knobs import knob
from stages.lib.ranks import Ranks
from stages.lib.report import Section
from stages.lib.stage import Facts, Item, Out, Result, Summary, Upstream
from stages.lib.targets import Wanted
from stages.lib.training import Recipe

INPUTS = ("merge",)
SPLIT = "train"
ITEM = "detector"
RESUMES = True
OUTPUTS = ("model.pt", "model.onnx", "curves.csv", "model_card.md")
NUM_LAST = 20  # losses are reported as means over so many steps
INTERFACE = """\
model.pt holds weights and settings alone: `stages.lib.detector.load` opens it without executing anything, and \
`Detector.detect` turns points (N, 5) into boxes. The points are x, y, z [m] in the ego frame at the key frame's \
stamp, intensity (0 to 255), and age [s] >= 0, from num_sweeps sweeps with the ego motion in between taken out; those \
in ego_box_m are left out. The boxes are in the same frame: centre, length, width, height [m], yaw [rad] about +z from \
+x, velocity [m/s], score.

model.onnx (opset 18) is the net alone: points (N, 5) float32 -> heat (classes, rows, columns), probabilities, and \
code (10, rows, columns): offset of the centre in its cell (2), z, log of length, width, height (3), sin and cos of \
the yaw, velocity (2). Local maxima of heat are boxes; its metadata says where the cells lie."""
LIMITS = """\
A score orders boxes; it is not a probability. Boxes with few points in the key frame were not learned from \
(min_points). Intensity, beam pattern and mounting height of other sensors than those of the train split change what \
the net sees. Velocity needs num_sweeps > 1, sweeps that stand before the key frame in its scene, and more than some \
hundred steps: until then it stays near 0. The same bits again need the same device, num_devices and threads, and a \
machine like it: a CPU with the same instructions, the same kind of GPU."""


@dataclass(frozen=True)
class Knobs(Recipe, Architecture):
    """A model, how it learns, and from which labels."""

    min_points: int = knob("boxes with fewer points in the key frame are neither object nor background", low=0)
    min_auto_score: float = knob("so are automatic boxes with a lower score", low=0, high=1)
    auto_weight: float = knob("weight of automatic boxes, and of the background that nobody reviewed", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_devices:
            raise ConfigError(f"train.batch_size is {self.batch_size}, expected a multiple of train.num_devices, "
                              f"{self.num_devices}: change one of them")


def plan(cfg: Knobs, inputs: Mapping[str, Upstream]) -> list[Item]:
    """One item: the tables, and the packs of the train split."""
    folder = inputs["merge"].folder / "tables"
    paths = {f"tables/{name}.parquet": folder / f"{name}.parquet" for name in TABLES}
    scenes = tables.read(paths["tables/scene.parquet"], ["token", "split", "pack_digest"]).filter(
        pl.col("split") == SPLIT)
    if scenes.is_empty():
        raise ConfigError(f"split {SPLIT} has no scene: there is nothing to learn from\n"
                          f"  set split.quotas.{SPLIT} above 0 and run `roadmill compose`")
    packs = {f"pack/{token}": digest for token, digest in
             scenes.sort("token").select("token", "pack_digest").iter_rows()}
    digests = {role: digest_file(path) for role, path in paths.items()} | packs
    return [Item(ITEM, {"dataset_digest": digest_bytes(canonical(digests))}, {**paths, **packs})]


@dataclass(frozen=True)
class Lessons:
    """What there is to learn from: the key frames of the train split that have labels, and what these say."""

    dataset: Dataset
    tokens: list[str]
    labels: list[Wanted]
    num_sweeps: int
    ego_box_m: tuple[float, float, float, float]

    def read(self, index: int) -> tuple[np.ndarray, Wanted]:
        """The points and labels of one of them, as `training.fit` wants them."""
        return self.dataset.points_ego(self.tokens[index], self.num_sweeps, self.ego_box_m), self.labels[index]


def run(cfg: Knobs, item: Item, inputs: Mapping[str, Path], out: Path, checkpoints: Any = NOTHING) -> Facts:
    """model.pt, model.onnx, curves.csv (a row a step), model_card.md.

    Raises DataError where no key frame of the train split has labels.
    """
    lessons = _lessons(cfg, inputs)
    dataset, tokens, arch = lessons.dataset, lessons.tokens, _part(Architecture, cfg)
    state = checkpoints.load()
    with ranks.shared(cfg.num_devices, cfg.device, _assist, (cfg, inputs, state)) as own:
        net, rows = training.fit(arch, _part(Recipe, cfg), len(tokens), lessons.read, ranks=own, state=state,
                                 checkpoints=checkpoints)
    model = Detector(arch, net, {"dataset_digest": item.params["dataset_digest"], "knobs": dataclasses.asdict(cfg)})
    detector.save(model, out / "model.pt")
    onnx_model.export(model, out / "model.onnx")
    curves = pl.DataFrame(rows)
    curves.write_csv(out / "curves.csv", float_precision=6)
    facts = {
        "num_key_frames": len(dataset.sample_tokens(SPLIT)), "num_labelled": len(tokens),
        "num_scenes": len({dataset.scene_token(token) for token in tokens}),
        "dataset_digest": item.params["dataset_digest"],
        "num_weights": sum(weight.numel() for weight in net.parameters()),
        "labels": _counts(dataset, tokens, lessons.labels, cfg.classes),
        "last_losses": {name: round(curves[name].tail(NUM_LAST).mean(), 6) for name in curves.columns[2:]}}
    (out / "model_card.md").write_text(card.markdown("Model card", _sections(cfg, facts)))
    return facts


def _assist(cfg: Knobs, inputs: Mapping[str, Path], state: bytes | None, own: Ranks) -> None:
    """Learns along as one of the other ranks."""
    lessons = _lessons(cfg, inputs)
    training.fit(_part(Architecture, cfg), _part(Recipe, cfg), len(lessons.tokens), lessons.read, ranks=own,
                 state=state)


def _lessons(cfg: Knobs, inputs: Mapping[str, Path]) -> Lessons:
    dataset = Dataset.from_inputs(inputs)
    tokens = [token for token in dataset.sample_tokens(SPLIT) if dataset.label_source(token)]
    if not tokens:
        raise DataError(f"none of {len(dataset.sample_tokens(SPLIT))} key frames of split {SPLIT} has labels\n"
                        f"  give merge.sources.{SPLIT} a source that covers them, e.g. auto")
    return Lessons(dataset, tokens, [wanted(cfg, dataset, token) for token in tokens], cfg.num_sweeps, cfg.ego_box_m)


def collect(cfg: Knobs, results: list[Result], out: Out) -> Summary:
    """models/: the item's outputs. results/: report.html, curves.csv."""
    (result,) = results
    for name in OUTPUTS:
        (out.data / name).write_bytes(result.path(name).read_bytes())
    (out.results / "curves.csv").write_bytes(result.path("curves.csv").read_bytes())
    facts, curves = result.facts, pl.read_csv(result.path("curves.csv"))
    learning = Section("Learning", f"Means over {NUM_LAST} steps; each part of the loss before its weight.",
                       pictures=(("Loss by step", _picture(curves)),))
    report.write(out.results / "report.html", "Detector", [learning, *_sections(cfg, facts)])
    bare = facts["num_key_frames"] - facts["num_labelled"]
    return Summary(num_in=facts["num_key_frames"], num_out=1, unit="model", unit_in="key frames",
                   dropped={"without labels": bare} if bare else {},
                   notes=(f"{facts['num_weights']} weights, {cfg.steps} steps of {cfg.batch_size} samples, "
                          f"loss {facts['last_losses']['loss']:.3f}",))


def wanted(cfg: Knobs, dataset: Dataset, sample_token: str) -> Wanted:
    """What a key frame's labels say of the model's classes, in the ego frame."""
    boxes = dataset.boxes(sample_token).filter(pl.col("category").is_in(cfg.classes))
    by_person = boxes["source"].is_in(["human", "truth"]).to_numpy()
    faint = (boxes["num_lidar_pts"] < cfg.min_points).to_numpy()
    doubtful = (boxes["score"] < cfg.min_auto_score).to_numpy() & ~by_person
    return Wanted(
        boxes=move_boxes(geometry.invert(dataset.T_map_ego(sample_token)), box_array(boxes)),
        labels=np.array([cfg.classes.index(name) for name in boxes["category"]], int),
        weights=np.where(by_person, 1.0, cfg.auto_weight), ignored=faint | doubtful,
        background=1.0 if dataset.is_reviewed(sample_token) else cfg.auto_weight)


def _part(cls: type, cfg: Knobs) -> Any:
    return cls(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(cls)})


def _counts(dataset: Dataset, tokens: list[str], labels: list[Wanted], classes: tuple[str, ...]) -> list[list[Any]]:
    """Rows of source, key frames, and of each class boxes learned from and ignored."""
    frames = Counter(dataset.label_source(token) for token in tokens)
    used, ignored = Counter(), Counter()
    for token, one in zip(tokens, labels):
        source = dataset.label_source(token)
        used.update((source, int(label)) for label in one.labels[~one.ignored])
        ignored.update((source, int(label)) for label in one.labels[one.ignored])
    return [[source, frames[source], name, used[source, i], ignored[source, i]]
            for source in sorted(frames) for i, name in enumerate(classes)]


def _sections(cfg: Knobs, facts: Facts) -> list[Section]:
    labels = pl.DataFrame(facts["labels"], orient="row", schema=[
        "label source", "key frames", "category", "boxes learned from", "boxes ignored"])
    losses = pl.DataFrame({"part": list(facts["last_losses"]), "loss": list(facts["last_losses"].values())})
    values = dataclasses.asdict(cfg)
    settings = pl.DataFrame({"knob": list(values), "value": [_yaml(value) for value in values.values()]})
    return [
        Section("What it is", f"A pillar detector with centre heat maps for {', '.join(cfg.classes)}: "
                f"{facts['num_weights']} weights, {cfg.steps} steps of {cfg.batch_size} samples."),
        Section("Learned from", f"{facts['num_labelled']} of {facts['num_key_frames']} key frames of split {SPLIT}, in "
                f"{facts['num_scenes']} scenes.\n\nDataset {facts['dataset_digest']}: sha256 over the digests of "
                "the tables and packs.", labels),
        Section("Loss", f"Means over the last {NUM_LAST} steps, each part before its weight.", losses),
        Section("What goes in and comes out", INTERFACE),
        Section("Limits", LIMITS),
        Section("Settings", table=settings)]


def _yaml(value: Any) -> str:
    """A knob's value as YAML would have it."""
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, tuple) else str(value)


def _picture(curves: pl.DataFrame) -> bytes:
    """PNG: the loss and its parts by step, smoothed, on a logarithmic scale."""
    content = io.BytesIO()
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
        for name in curves.columns[2:]:
            axes.plot(curves["step"], curves[name].rolling_mean(NUM_LAST, min_samples=1), label=name,
                      linewidth=2 if name == "loss" else 1)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right center")
        FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()
