"""Scores: the model, the automatic labels and two blind baselines before one judge, nuscenes-devkit's `DetectionEval`.

Truth is the split's annotations in the merged dataset, which must come from a person or a simulator; samples that
nobody labelled are not asked for. All four are matched with the same filters.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from stages.lib import baselines, detector, knobs, mistakes, plots, report, scoring, slices, tables
from stages.lib.dataset import TABLES, Dataset
from stages.lib.digests import canonical
from stages.lib.errors import ConfigError, DataError
from stages.lib.knobs import knob
from stages.lib.report import Section
from stages.lib.scoring import DIST_THS_M, TP_ERRORS, Verdict
from stages.lib.stage import Facts, Item, Out, Result, Summary, Upstream

INPUTS = ("merge", "autolabel", "train")
ITEM = "evaluate"
TRUSTED = ("truth", "human")
SLICED = ("model", "geometric")
CURVED = (*SLICED, "mean_box")
SOURCES = (*CURVED, "nothing")
LOG = "log"
FEW = {"drives": 2, "key frames": 80, "boxes": 300}
NUM_LISTED = 20


@dataclass(frozen=True)
class Knobs:
    """What is judged, and how the report is sliced."""

    split: str = knob("split to judge on", choices=("val", "test"))
    class_range_m: dict[str, float] = knob("detection class of nuScenes -> range from the ego vehicle", above=0)
    min_points: int = knob("true boxes with fewer points count neither way; nuScenes' own rule is 1", low=1)
    slice_range_m: float = knob("width of the range slices", above=0)
    slice_points: tuple[int, ...] = knob("fewest points of each slice by points, rising", low=1)
    moving_mps: float = knob("what is at least this fast counts as moving", above=0)
    num_worst: int = knob("pictures of the samples with most errors", low=0)
    num_typical: int = knob("pictures of samples with a middling number of errors", low=0)
    threads: int = knob("CPU threads of the model; more may change the last bits", low=1)


def plan(cfg: Knobs, inputs: Mapping[str, Upstream]) -> list[Item]:
    """One item: the model, the tables, the packs and automatic labels of the split's scenes."""
    _check(cfg)
    folder = inputs["merge"].folder / "tables"
    scenes = tables.read(folder / "scene.parquet", ["token", "split", "pack_digest"])
    scenes = scenes.filter(pl.col("split") == cfg.split)
    if scenes.is_empty():
        raise ConfigError(f"split {cfg.split} has no scene: there is nothing to judge on\n"
                          "  set split.quotas or evaluate.split, and run `roadmill compose`")
    packs = dict(scenes.select("token", "pack_digest").iter_rows())
    labels = {f"labels/{result.name}": result.outputs["boxes.parquet"].digest
              for result in inputs["autolabel"].results if result.facts["scene_token"] in packs}
    return [Item(ITEM, {}, {
        "model.pt": inputs["train"].folder / "model.pt",
        **{f"tables/{name}.parquet": folder / f"{name}.parquet" for name in (*TABLES, LOG)},
        **{f"pack/{token}": digest for token, digest in packs.items()}, **labels})]


def run(cfg: Knobs, item: Item, inputs: Mapping[str, Path], out: Path) -> Facts:
    """predictions.json, slices.csv, pr.csv, samples.csv, pr_<class>.png, pictures/*.jpg; facts hold the scores.

    Raises ConfigError where the truth has automatic labels, DataError where there is no truth.
    """
    _check(cfg)
    dataset = Dataset.from_inputs(inputs)

    @functools.cache
    def read(name: str) -> pl.DataFrame:
        return tables.read(inputs[f"tables/{name}.parquet"])

    judged, truth = _judged(cfg, read)
    tokens = dataset.sample_tokens(cfg.split)
    automatic = [tables.read(path) for role, path in sorted(inputs.items()) if role.startswith("labels/")]
    predictions = {
        "model": _predict(cfg, dataset, inputs["model.pt"], tokens),
        "geometric": baselines.labels(pl.concat([tables.frame([], tables.BOXES), *automatic]), "geometric"),
        "mean_box": _mean_box(dataset, read, tokens),
        "nothing": baselines.nothing()}
    submissions = {source: scoring.results(boxes, tokens) for source, boxes in predictions.items()}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        nusc, split = scoring.open_view(read, cfg.split, Path(folder) / "view")
        verdicts = {source: scoring.judge(nusc, split, submission, class_range_m=cfg.class_range_m, folder=Path(folder),
                                          min_points=cfg.min_points, samples=judged)
                    for source, submission in submissions.items()}
        plain = scoring.judge(nusc, split, submissions["model"], class_range_m=cfg.class_range_m, folder=Path(folder),
                              samples=judged)

    (out / "predictions.json").write_bytes(canonical({
        "meta": {"use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False},
        "results": submissions["model"]}))
    places = _places(read, judged)
    _slices(cfg, verdicts, places).write_csv(out / "slices.csv", float_precision=6)
    curves = _curves(cfg, verdicts)
    curves.write_csv(out / "pr.csv", float_precision=6)
    for name in cfg.class_range_m:
        of_class = {source: curves[f"{name}_{source}_200cm"].to_numpy() for source in CURVED}
        (out / f"pr_{name}.png").write_bytes(plots.lines(curves["recall"].to_numpy(), of_class, "recall", "precision"))
    min_score = {name: scoring.best_f1_score(verdicts["model"], name) for name in cfg.class_range_m}
    marked = mistakes.mark(verdicts["model"], min_score, judged)
    samples = mistakes.table(marked, places)
    samples.write_csv(out / "samples.csv")
    middling = samples.sort((pl.int_range(pl.len()) - pl.len() // 2).abs(), maintain_order=True)
    shown = {"worst": mistakes.choose(samples, cfg.num_worst), "typical": mistakes.choose(middling, cfg.num_typical)}
    (out / "pictures").mkdir()
    for token in sorted({token for tokens in shown.values() for token in tokens}):
        range_m = max(cfg.class_range_m.values())
        above = mistakes.from_above(dataset, token, marked[token], range_m)
        (out / f"pictures/{token}_above.jpg").write_bytes(above)
        if cameras := _cameras(read, token):
            views = mistakes.through_cameras(dataset, token, marked[token], cameras, range_m)
            (out / f"pictures/{token}_cameras.jpg").write_bytes(views)
    return {"metrics": _metrics(cfg, verdicts, plain, places), "aps": _aps(cfg, verdicts), "shown": shown,
            "truth": truth, "num_unlabelled": len(tokens) - len(judged)}


def collect(cfg: Knobs, results: list[Result], out: Out) -> Summary:
    """metrics.json, report.html, slices.csv, pr.csv under results; predictions.json, samples.csv under data."""
    (result,) = results
    metrics = result.facts["metrics"]
    (out.results / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    for name in ("slices.csv", "pr.csv"):
        (out.results / name).write_bytes(result.path(name).read_bytes())
    for name in ("predictions.json", "samples.csv"):
        (out.data / name).write_bytes(result.path(name).read_bytes())
    notes = _notes(cfg, result.facts)
    report.write(out.results / "report.html", f"Scores on {cfg.split}", _sections(cfg, result, notes))
    scores = [f"{name} AP {metrics[f'{name}_ap']:.3f} (geometric labels {metrics[f'{name}_ap_geometric']:.3f}, "
              f"mean box {metrics[f'{name}_ap_mean_box']:.3f}, nothing {metrics[f'{name}_ap_nothing']:.3f})"
              for name in cfg.class_range_m if metrics[f"num_{name}_boxes"]]
    return Summary(num_in=metrics["num_key_frames"], num_out=metrics["num_key_frames"], unit="key frames judged",
                   unit_in="key frames", notes=(*scores, *notes))


def _check(cfg: Knobs) -> None:
    for name in cfg.class_range_m:
        if name not in scoring.DETECTION_NAMES:
            raise ConfigError(f"evaluate.class_range_m has {name!r}{knobs.near_miss(name, scoring.DETECTION_NAMES)}; "
                              f"nuScenes scores {', '.join(scoring.DETECTION_NAMES)}")
    if not cfg.class_range_m or not cfg.slice_points or list(cfg.slice_points) != sorted(set(cfg.slice_points)):
        raise ConfigError(f"evaluate.class_range_m is {cfg.class_range_m} and evaluate.slice_points is "
                          f"{list(cfg.slice_points)}, expected at least one class, and rising numbers of points")


def _judged(cfg: Knobs, read: Callable[[str], pl.DataFrame]) -> tuple[list[str], dict[str, int]]:
    """Tokens of the split's labelled samples, and how many boxes of the classes asked for each trusted source gave.

    Raises where an automatic label is among them, or where there is no box.
    """
    scenes = read("scene").filter(pl.col("split") == cfg.split).select(scene_token="token", scene="name")
    samples = read("sample").filter(pl.col("label_source") != "").join(scenes, on="scene_token")
    samples = samples.sort("scene", "stamp_us")
    boxes = read("sample_annotation").join(scenes, on="scene_token", maintain_order="left")
    automatic = pl.concat([samples.select("token", source="label_source"), boxes.select("token", "source")]).filter(
        ~pl.col("source").is_in(TRUSTED))
    if automatic.height:
        raise ConfigError(f"truth of split {cfg.split} has {automatic.height} automatic labels, which can't judge: the "
                          f"first is {automatic['token'][0]} from {automatic['source'][0]!r}\n"
                          f"  set merge.sources.{cfg.split} to [truth, human] and run `roadmill compose`")
    asked = boxes.filter([scoring.detection_name(category) in cfg.class_range_m for category in boxes["category"]])
    if asked.is_empty():
        raise DataError(f"split {cfg.split} has no box of {', '.join(cfg.class_range_m)} by a person or a simulator\n"
                        "  add labels beside the recordings and run `roadmill scan`, or change evaluate.class_range_m")
    return samples["token"].to_list(), dict(asked.group_by("source").len().sort("source").iter_rows())


def _predict(cfg: Knobs, dataset: Dataset, model: Path, tokens: Sequence[str]) -> pl.DataFrame:
    """What the model sees at these samples: scoring.PREDICTIONS."""
    teller, found = detector.load(model), [baselines.nothing()]
    with detector.reproducible(cfg.threads, seed=0):
        for token in tokens:
            boxes_ego = teller.detect(dataset.points_ego(token, teller.arch.num_sweeps, teller.arch.ego_box_m))
            found.append(scoring.in_map(boxes_ego, dataset.T_map_ego(token), token))
    return pl.concat(found)


def _mean_box(dataset: Dataset, read: Callable[[str], pl.DataFrame], tokens: Sequence[str]) -> pl.DataFrame:
    """The mean box of the train split, at these samples: scoring.PREDICTIONS."""
    scenes = read("scene").filter(pl.col("split") == "train").select(scene_token="token")
    labelled = read("sample").join(scenes, on="scene_token").filter(pl.col("label_source") != "")
    poses = baselines.lidar_poses(labelled, read("sample_data"), read("ego_pose"))
    boxes_ego = baselines.mean_box(read("sample_annotation"), poses)
    return pl.concat([baselines.nothing(),
                      *[scoring.in_map(boxes_ego, dataset.T_map_ego(token), token) for token in tokens]])


def _places(read: Callable[[str], pl.DataFrame], tokens: Sequence[str]) -> pl.DataFrame:
    """sample_token, stamp_us, scene, drive and location of these samples, in their order."""
    scenes = read("scene").join(read(LOG), left_on="log_token", right_on="token").select(
        scene_token="token", scene="name", drive="logfile", location="location")
    samples = read("sample").select(sample_token="token", stamp_us="stamp_us", scene_token="scene_token")
    return (pl.DataFrame({"sample_token": tokens}, schema={"sample_token": pl.String})
            .join(samples, on="sample_token", maintain_order="left")
            .join(scenes, on="scene_token", maintain_order="left").drop("scene_token"))


def _slices(cfg: Knobs, verdicts: Mapping[str, Verdict], places: pl.DataFrame) -> pl.DataFrame:
    sliced = {source: verdicts[source] for source in SLICED}
    parts = []
    for name, range_m in cfg.class_range_m.items():
        dimensions = [slices.by_range(cfg.slice_range_m, range_m), slices.by_points(cfg.slice_points),
                      slices.by_motion(cfg.moving_mps),
                      *[slices.by_sample(column, dict(places.select("sample_token", column).iter_rows()))
                        for column in ("location", "drive")]]
        parts.append(slices.table(sliced, name, dimensions))
    return pl.concat(parts)


def _curves(cfg: Knobs, verdicts: Mapping[str, Verdict]) -> pl.DataFrame:
    """Precision over recall in steps of 0.01, a column for each class, source and distance: car_model_50cm, …"""
    columns = {f"{name}_{source}_{dist_th * 100:.0f}cm": verdicts[source].curves[(name, dist_th)].precision
               for name in cfg.class_range_m for source in CURVED for dist_th in DIST_THS_M}
    return pl.DataFrame({"recall": np.linspace(0, 1, 101), **columns})


def _aps(cfg: Knobs, verdicts: Mapping[str, Verdict]) -> list[dict[str, str | float]]:
    """The rows of the report's first table."""
    return [{"class": name, "source": source.replace("_", " "), "AP": verdict.ap(name),
             **{f"AP at {dist_th:g} m": verdict.ap(name, dist_th) for dist_th in DIST_THS_M}}
            for name in cfg.class_range_m for source, verdict in verdicts.items()]


def _metrics(cfg: Knobs, verdicts: Mapping[str, Verdict], plain: Verdict,
             places: pl.DataFrame) -> dict[str, float | int]:
    """The numbers of metrics.json. A class without truth has a count and no score, a cone has no heading's error.

    plain: the model's verdict by nuScenes' own rule, that every box with a point is asked for.
    """
    metrics: dict[str, float | int] = {"num_drives": places["drive"].n_unique(), "num_key_frames": places.height}
    model, aps = verdicts["model"], []
    for name in cfg.class_range_m:
        metrics[f"num_{name}_boxes"] = sum(box.detection_name == name for box in model.truth.all)
        if not metrics[f"num_{name}_boxes"]:
            continue
        aps.append(model.ap(name))
        metrics |= {f"{name}_ap": aps[-1], f"{name}_ap_any_points": plain.ap(name)}
        metrics |= {f"{name}_ap_{source}": verdicts[source].ap(name) for source in SOURCES if source != "model"}
        metrics |= {f"{name}_ap_{dist_th * 100:.0f}cm": model.ap(name, dist_th) for dist_th in DIST_THS_M}
        metrics |= {f"{name}_{error}": model.metrics.get_label_tp(name, key) for error, key in TP_ERRORS.items()}
        metrics[f"{name}_best_f1_score"] = scoring.best_f1_score(model, name)
    metrics["mean_ap"] = float(np.mean(aps)) if aps else 0.0
    return {name: round(value, 6) for name, value in metrics.items() if not np.isnan(value)}


def _cameras(read: Callable[[str], pl.DataFrame], sample_token: str) -> list[tuple[str, float]]:
    """(channel, seconds from the sample's stamp to the image's) of a sample's images."""
    stamp_us = read("sample").filter(pl.col("token") == sample_token)["stamp_us"][0]
    sensors = read("calibrated_sensor").filter(pl.col("modality") == "camera")
    images = read("sample_data").filter((pl.col("sample_token") == sample_token) & pl.col("is_key_frame")).join(
        sensors, left_on="calibrated_sensor_token", right_on="token", how="semi")
    return [(channel, (us - stamp_us) / 1e6) for channel, us in images.select("channel", "stamp_us").iter_rows()]


def _notes(cfg: Knobs, facts: Facts) -> tuple[str, ...]:
    """What a reader of the scores should know."""
    metrics, notes = facts["metrics"], []
    counts = {"drives": metrics["num_drives"], "key frames": metrics["num_key_frames"]}
    for name in cfg.class_range_m:
        of_class = counts | {"boxes": metrics[f"num_{name}_boxes"]}
        few = [f"{what} {count} (less than {FEW[what]})" for what, count in of_class.items() if count < FEW[what]]
        if few:
            notes.append(f"{name} is judged on too little for its score to mean much: {', '.join(few)}")
    if facts["num_unlabelled"]:
        notes.append(f"key frames of {cfg.split} that nobody labelled are left out: {facts['num_unlabelled']}")
    return tuple(notes)


def _sections(cfg: Knobs, result: Result, notes: Sequence[str]) -> list[Section]:
    metrics = result.facts["metrics"]
    scored = [name for name in cfg.class_range_m if metrics[f"num_{name}_boxes"]]
    labels = ", ".join(f"{num} {source}" for source, num in result.facts["truth"].items())
    asked = ", ".join(f"{metrics[f'num_{name}_boxes']} {name} boxes within {range_m:g} m"
                      for name, range_m in cfg.class_range_m.items())
    judged = (f"Judged on split {cfg.split}: drives {metrics['num_drives']}, key frames {metrics['num_key_frames']}, "
              f"labelled boxes {labels}. Asked for, with {cfg.min_points} or more points: {asked}.")
    aps = pl.DataFrame([row for row in result.facts["aps"] if row["class"] in scored])
    errors = pl.DataFrame([{"class": name, **{error: metrics.get(f"{name}_{error}") for error in TP_ERRORS}}
                           for name in scored])
    curves = tuple((name, result.path(f"pr_{name}.png").read_bytes()) for name in scored)
    samples = pl.read_csv(result.path("samples.csv"))
    scores = ", ".join(f"{name} {metrics[f'{name}_best_f1_score']:.3f}" for name in scored)
    plain = ", ".join(f"{name} {metrics[f'{name}_ap_any_points']:.3f}" for name in scored)
    return [
        Section("Scores", "\n\n".join([judged, *notes, _SCORES_TEXT, f"{_PLAIN_TEXT} {plain}."]), aps),
        Section("The model's errors", _ERRORS_TEXT, errors),
        Section("Precision over recall at 2 m", pictures=curves),
        Section("Slices", _SLICES_TEXT, pl.read_csv(result.path("slices.csv"))),
        *[Section(f"{kind.capitalize()} samples", _PICTURES_TEXT, pictures=_pictures(result, samples, tokens))
          for kind, tokens in result.facts["shown"].items() if tokens],
        Section("Samples with most errors", f"{_SAMPLES_TEXT} {scores}.", samples.head(NUM_LISTED))]


_SCORES_TEXT = """\
AP is nuScenes' average precision, the mean over matching distances of 0.5, 1, 2 and 4 m.

geometric: the automatic labels themselves. mean box: the same boxes everywhere, where train has most objects. \
nothing: no box at all."""
_PLAIN_TEXT = "AP of the model by nuScenes' own rule, which asks for every true box with a point:"
_ERRORS_TEXT = """\
Of what is found within 2 m: ate_m, distance of centres; ase, 1 - IoU of sizes; aoe_rad, heading; ave_mps, velocity."""
_SLICES_TEXT = """\
AP by part. A predicted box belongs to a part by its own place; by points and by motion, to the part of the nearest \
true box within 4 m, and to every part where there is none."""
_PICTURES_TEXT = f"""\
{mistakes.LEGEND}

From above, forward is up and a ring stands every 10 m; a line marks a box's front, in an image a cross."""
_SAMPLES_TEXT = """\
Matched at 2 m; a prediction counts from the score on where precision and recall balance best (the largest F1):"""


def _pictures(result: Result, samples: pl.DataFrame, tokens: Sequence[str]) -> tuple[tuple[str, bytes], ...]:
    """(caption, JPEG) of the pictures that `run` made of these samples."""
    pictures = []
    for token in tokens:
        row = samples.row(by_predicate=pl.col("sample_token") == token, named=True)
        caption = (f"{row['scene']} at {row['stamp_us']} us: {row['num_boxes']} true boxes, {row['num_missed']} "
                   f"missed, {row['num_false']} false")
        for name in (f"pictures/{token}_above.jpg", f"pictures/{token}_cameras.jpg"):
            if name in result.outputs:
                pictures.append((caption, result.path(name).read_bytes()))
    return tuple(pictures)
