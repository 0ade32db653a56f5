"""nuScenes detection scores, by nuscenes-devkit's own `DetectionEval` on a nuScenes view of the tables of record.

The view holds what the judge reads: the split's scenes, samples, LIDAR_TOP key frames and annotations. The devkit loads
them, finds velocities along prev and next, filters by range and points, matches, and computes; nothing of that is
redone here. Samples that nobody labelled, and boxes with less than `min_points`, are taken out after its own filter.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from nuscenes import NuScenes
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.algo import accumulate, calc_ap
from nuscenes.eval.detection.constants import DETECTION_NAMES
from nuscenes.eval.detection.data_classes import (
    DetectionBox,
    DetectionConfig,
    DetectionMetricDataList,
    DetectionMetrics,
)
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name

from stages.lib import geometry
from stages.lib.dataset import BOX, move_boxes
from stages.lib.errors import DataError

VERSION = "v1.0-judged"
DIST_THS_M = (0.5, 1.0, 2.0, 4.0)
DIST_TH_TP_M = 2.0
MAX_BOXES_PER_SAMPLE = 500
TP_ERRORS = {"ate_m": "trans_err", "ase": "scale_err", "aoe_rad": "orient_err", "ave_mps": "vel_err"}

# A box somebody claims to see, in the map frame.
PREDICTIONS = {"sample_token": pl.String, "category": pl.String,
               "x_m": pl.Float64, "y_m": pl.Float64, "z_m": pl.Float64,
               "length_m": pl.Float64, "width_m": pl.Float64, "height_m": pl.Float64, "yaw_rad": pl.Float64,
               "vx_mps": pl.Float64, "vy_mps": pl.Float64, "score": pl.Float64}


@dataclass(frozen=True)
class Verdict:
    """What the devkit says about one source of boxes, and the boxes it judged after all filters."""

    metrics: DetectionMetrics
    curves: DetectionMetricDataList
    truth: EvalBoxes
    predicted: EvalBoxes

    def ap(self, name: str, dist_th_m: float | None = None) -> float:
        """AP of a detection class at one matching distance, or the mean over the four."""
        return self.metrics.get_label_ap(name, dist_th_m) if dist_th_m else float(self.metrics.mean_dist_aps[name])


def detection_name(category: str) -> str | None:
    """One of the devkit's ten detection classes, e.g. car for vehicle.car; None for what nuScenes doesn't score."""
    return category_to_detection_name(category)


def config(class_range_m: Mapping[str, float]) -> DetectionConfig:
    """nuScenes' detection_cvpr_2019 with these ranges; classes without one have range 0 and so no boxes."""
    return DetectionConfig(
        class_range={name: class_range_m.get(name, 0.0) for name in DETECTION_NAMES}, dist_fcn="center_distance",
        dist_ths=list(DIST_THS_M), dist_th_tp=DIST_TH_TP_M, min_recall=0.1, min_precision=0.1,
        max_boxes_per_sample=MAX_BOXES_PER_SAMPLE, mean_ap_weight=5)


def in_map(boxes_ego: pl.DataFrame, T_map_ego: np.ndarray, sample_token: str) -> pl.DataFrame:
    """A sample's boxes in the ego frame (PREDICTIONS without sample_token) as rows of PREDICTIONS, in the map frame."""
    boxes = move_boxes(T_map_ego, boxes_ego.select(BOX).to_numpy().astype(float))
    return boxes_ego.with_columns(pl.lit(sample_token).alias("sample_token"),
                                  *[pl.Series(name, boxes[:, i]) for i, name in enumerate(BOX)]).select(*PREDICTIONS)


def results(predictions: pl.DataFrame, sample_tokens: Iterable[str]) -> dict[str, list[dict]]:
    """Boxes in nuScenes' submission format, to the µm: each sample token with its 500 best boxes of the ten classes."""
    ordered = predictions.sort(["score", "x_m", "y_m", "category"], descending=[True, False, False, False],
                               maintain_order=True)
    found: dict[str, list[dict]] = {token: [] for token in sample_tokens}
    for row in ordered.iter_rows(named=True):
        name, boxes = detection_name(row["category"]), found.get(row["sample_token"])
        if name is None or boxes is None or len(boxes) == MAX_BOXES_PER_SAMPLE:
            continue
        boxes.append({"sample_token": row["sample_token"], "translation": _rounded(row["x_m"], row["y_m"], row["z_m"]),
                      "size": _rounded(row["width_m"], row["length_m"], row["height_m"]),
                      "rotation": _rounded(*geometry.yaw_wxyz(row["yaw_rad"]).tolist()),
                      "velocity": _rounded(row["vx_mps"], row["vy_mps"]), "detection_name": name,
                      "detection_score": row["score"], "attribute_name": ""})
    return found


def _rounded(*values: float) -> list[float]:
    return [round(value, 6) for value in values]


def judge(nusc: NuScenes, split: str, submission: Mapping[str, list[dict]], *, class_range_m: Mapping[str, float],
          folder: Path, min_points: int = 1, samples: Collection[str] | None = None) -> Verdict:
    """The devkit's verdict on boxes in submission format over a split of `nusc`.

    min_points  true boxes with fewer lidar and radar points aren't asked for, and to claim one (to be nearer to it than
                to any other of its class, and within 2 m) is no mistake; 1 is nuScenes' own rule
    samples     tokens of the samples to judge, all where None
    folder      an existing scratch folder
    """
    path = folder / "results.json"
    path.write_text(json.dumps({"meta": {}, "results": _never_empty(submission)}))
    with contextlib.redirect_stderr(io.StringIO()):
        evaluation = DetectionEval(nusc, config(class_range_m), str(path), split, str(folder), verbose=False)
    wanted = set(evaluation.sample_tokens if samples is None else samples)
    truth = select(evaluation.gt_boxes, lambda box: box.sample_token in wanted)

    def counts(box: DetectionBox) -> bool:
        same = [true for true in truth[box.sample_token] if true.detection_name == box.detection_name]
        claimed = nearest(box, same, DIST_TH_TP_M)
        return box.sample_token in wanted and (claimed is None or claimed.num_pts >= min_points)

    evaluation.gt_boxes = select(truth, lambda box: box.num_pts >= min_points)
    evaluation.pred_boxes = select(evaluation.pred_boxes, counts)
    metrics, curves = evaluation.evaluate()
    return Verdict(metrics, curves, evaluation.gt_boxes, evaluation.pred_boxes)


def _never_empty(submission: Mapping[str, list[dict]]) -> Mapping[str, list[dict]]:
    """The submission; one without any box gets a box out of every range, since the devkit raises on no box at all."""
    if any(submission.values()):
        return submission
    token = min(submission)
    far = {"sample_token": token, "translation": [1e9, 1e9, 0.0], "size": [1.0, 1.0, 1.0],
           "rotation": [1.0, 0.0, 0.0, 0.0], "velocity": [0.0, 0.0], "detection_name": "car", "detection_score": 0.0,
           "attribute_name": ""}
    return {**submission, token: [far]}


def select(boxes: EvalBoxes, keep: Callable[[DetectionBox], bool]) -> EvalBoxes:
    """Those boxes that `keep` says yes to; every sample stays."""
    chosen = EvalBoxes()
    for token in boxes.sample_tokens:
        chosen.add_boxes(token, [box for box in boxes[token] if keep(box)])
    return chosen


def mean_ap(truth: EvalBoxes, predicted: EvalBoxes, name: str) -> float:
    """The devkit's AP of a class, mean over the four matching distances."""
    limits = config({})
    return float(np.mean([
        calc_ap(accumulate(truth, predicted, name, distance_m, dist_th), limits.min_recall, limits.min_precision)
        for dist_th in DIST_THS_M]))


def best_f1_score(verdict: Verdict, name: str) -> float:
    """The score at which precision and recall at 2 m balance best (the largest F1); 0 where nothing is found."""
    curve = verdict.curves[(name, DIST_TH_TP_M)]
    total = curve.precision + curve.recall
    f1 = np.divide(2 * curve.precision * curve.recall, total, out=np.zeros_like(total), where=total > 0)
    return float(curve.confidence[int(np.argmax(f1))])


def distance_m(one: DetectionBox, other: DetectionBox) -> float:
    """Distance of centres in the plane: the devkit's center_distance, ten times as fast."""
    return math.hypot(one.translation[0] - other.translation[0], one.translation[1] - other.translation[1])


def nearest(box: DetectionBox, others: Iterable[DetectionBox], within_m: float) -> DetectionBox | None:
    """The box among the others whose centre is nearest in the plane, if nearer than within_m."""
    found = min(others, key=lambda other: distance_m(other, box), default=None)
    return found if found is not None and distance_m(found, box) < within_m else None


def matches(truth: Sequence[DetectionBox], predicted: Sequence[DetectionBox], dist_th_m: float) -> list[int]:
    """For each predicted box the index of its match among `truth`, or -1; both are one sample's boxes of one class.

    The devkit's rule: by falling score, the nearest true box that is still free, if nearer than dist_th_m.
    """
    match, free = [-1] * len(predicted), dict(enumerate(truth))
    for index in sorted(range(len(predicted)), key=lambda i: (-predicted[i].detection_score, -i)):
        closest = nearest(predicted[index], free.values(), dist_th_m)
        if closest is not None:
            match[index] = next(i for i, box in free.items() if box is closest)
            del free[match[index]]
    return match


def open_view(read: Callable[[str], pl.DataFrame], split: str, folder: Path) -> tuple[NuScenes, str]:
    """(NuScenes, name of the split in it): the split's part of the tables of record, as the devkit loads it.

    read  table name -> its rows as `merge` wrote them (scene, sample, sample_data, ego_pose, sample_annotation)
    Raises DataError where a sample has no LIDAR_TOP key frame: ranges are measured from there.
    """
    rows, name = _rows(read, split), f"roadmill_{split}"
    root = folder / VERSION
    root.mkdir(parents=True)
    (folder / "map.png").write_bytes(b"")
    for table, records in rows.items():
        (root / f"{table}.json").write_text(json.dumps(records))
    (root / "splits.json").write_text(json.dumps({name: [scene["name"] for scene in rows["scene"]]}))
    return NuScenes(VERSION, str(folder), verbose=False), name


def _rows(read: Callable[[str], pl.DataFrame], split: str) -> dict[str, list[dict[str, Any]]]:
    scenes = read("scene").filter(pl.col("split") == split)
    samples = read("sample").filter(pl.col("scene_token").is_in(scenes["token"].implode()))
    lidar = read("sample_data").filter((pl.col("channel") == "LIDAR_TOP") & pl.col("is_key_frame")
                                       & pl.col("sample_token").is_in(samples["token"].implode()))
    blind = samples.filter(~pl.col("token").is_in(lidar["sample_token"].implode()))
    if blind.height:
        raise DataError(f"{blind.height} of {samples.height} samples of split {split} have no LIDAR_TOP key frame, the "
                        f"first is {blind['token'][0]} at {blind['stamp_us'][0]} us: there is nothing to measure "
                        "ranges from\n  set sample.reference_channel to LIDAR_TOP and run `roadmill compose`")
    poses = read("ego_pose").filter(pl.col("token").is_in(lidar["ego_pose_token"].implode()))
    boxes = read("sample_annotation").filter(pl.col("sample_token").is_in(samples["token"].implode()))
    categories = boxes["category"].unique().sort().to_list()
    instances = boxes.group_by("instance_token", maintain_order=True).agg(pl.col("category").first())
    return {
        "category": [{"token": c, "name": c} for c in categories],
        "attribute": [], "visibility": [],
        "instance": [{"token": r["instance_token"], "category_token": r["category"]}
                     for r in instances.iter_rows(named=True)],
        "sensor": [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}],
        "calibrated_sensor": [{"token": "lidar", "sensor_token": "lidar"}],
        "ego_pose": [{"token": r["token"], "translation": [r["x_m"], r["y_m"], r["z_m"]]}
                     for r in poses.iter_rows(named=True)],
        "log": [{"token": "log"}],
        "map": [{"token": "map", "filename": "map.png", "log_tokens": ["log"]}],
        "scene": [{"token": r["token"], "name": r["name"], "log_token": "log"} for r in scenes.iter_rows(named=True)],
        "sample": [{"token": r["token"], "timestamp": r["stamp_us"], "scene_token": r["scene_token"]}
                   for r in samples.iter_rows(named=True)],
        "sample_data": [{"token": r["token"], "sample_token": r["sample_token"], "is_key_frame": True,
                         "ego_pose_token": r["ego_pose_token"], "calibrated_sensor_token": "lidar"}
                        for r in lidar.iter_rows(named=True)],
        "sample_annotation": [
            {"token": r["token"], "sample_token": r["sample_token"], "instance_token": r["instance_token"],
             "attribute_tokens": [], "translation": [r["x_m"], r["y_m"], r["z_m"]],
             "size": [r["width_m"], r["length_m"], r["height_m"]],
             "rotation": [r["qw"], r["qx"], r["qy"], r["qz"]], "num_lidar_pts": r["num_lidar_pts"],
             "num_radar_pts": r["num_radar_pts"], "prev": r["prev"] or "", "next": r["next"] or ""}
            for r in boxes.iter_rows(named=True)],
    }
