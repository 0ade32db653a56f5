"""Which objects a model found, missed or made up, sample by sample, and pictures of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from nuscenes.eval.detection.data_classes import DetectionBox
from pyquaternion import Quaternion

from stages.lib import draw, geometry, scoring
from stages.lib.dataset import BOX, Dataset, box_array, move_boxes
from stages.lib.draw import Layer
from stages.lib.scoring import DIST_TH_TP_M, Verdict

GREY = (130, 140, 150)
RING = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
LEGEND = ("Green: true box. Grey: true box that isn't asked for (too far, too few points, another class). "
          "Blue: found by the model. Orange: claimed by the model where there is none.")


@dataclass(frozen=True)
class Marked:
    """A sample's boxes as `dataset.BOX` arrays (M, 9) in the map frame; found and false are predictions."""

    truth: np.ndarray
    found: np.ndarray
    false: np.ndarray

    @property
    def num_missed(self) -> int:
        """True boxes that no prediction matches."""
        return len(self.truth) - len(self.found)


def mark(verdict: Verdict, min_score: Mapping[str, float], tokens: Iterable[str]) -> dict[str, Marked]:
    """Sample token -> Marked, matched at 2 m class by class. min_score: detection class -> lowest score that counts."""
    marked = {}
    for token in tokens:
        truth, found, false = [], [], []
        for name, lowest in min_score.items():
            true = [box for box in verdict.truth[token] if box.detection_name == name]
            claimed = [box for box in verdict.predicted[token]
                       if box.detection_name == name and box.detection_score >= lowest]
            match = scoring.matches(true, claimed, DIST_TH_TP_M)
            truth += true
            found += [box for box, at in zip(claimed, match) if at >= 0]
            false += [box for box, at in zip(claimed, match) if at < 0]
        marked[token] = Marked(_array(truth), _array(found), _array(false))
    return marked


def table(marked: Mapping[str, Marked], places: pl.DataFrame) -> pl.DataFrame:
    """num_boxes, num_missed, num_false of each sample of `places` (with its columns), most errors first."""
    rows = [marked[token] for token in places["sample_token"]]
    return places.with_columns(
        pl.Series("num_boxes", [len(m.truth) for m in rows], pl.Int64),
        pl.Series("num_missed", [m.num_missed for m in rows], pl.Int64),
        pl.Series("num_false", [len(m.false) for m in rows], pl.Int64),
    ).sort(pl.col("num_missed") + pl.col("num_false"), "sample_token", descending=[True, False])


def choose(samples: pl.DataFrame, num: int) -> list[str]:
    """Tokens of the first `num` rows, but each scene's first before any scene's second."""
    turn = samples.with_columns(turn=pl.int_range(pl.len()).over("scene"))
    return turn.sort("turn", maintain_order=True)["sample_token"].head(num).to_list()


def from_above(dataset: Dataset, token: str, marked: Marked, range_m: float) -> bytes:
    """JPEG of the sample's key frame from above."""
    points = dataset.points_ego(token, num_sweeps=1)
    T_ego_map = geometry.invert(dataset.T_map_ego(token))
    layers = [Layer(move_boxes(T_ego_map, layer.boxes), layer.colour) for layer in _layers(dataset, token, marked)]
    return draw.jpeg(draw.from_above(points, layers, range_m))


def through_cameras(dataset: Dataset, token: str, marked: Marked, cameras: Sequence[tuple[str, float]],
                    range_m: float) -> bytes:
    """JPEG of the sample's images side by side. Boxes are moved by their velocity to each image's own stamp.

    cameras  (channel, seconds from the sample's stamp to the image's)
    """
    T_map_ego, views = dataset.T_map_ego(token), []
    for channel, after_s in sorted(cameras, key=lambda camera: ((*RING, camera[0]).index(camera[0]), camera[0])):
        K, T_map_cam = dataset.camera(token, channel)
        layers = []
        for layer in _layers(dataset, token, marked):
            near = layer.boxes[np.hypot(*(layer.boxes[:, :2] - T_map_ego[:2, 3]).T) < range_m]
            near[:, :2] += np.nan_to_num(near[:, 7:9]) * after_s
            layers.append(Layer(near, layer.colour))
        image = dataset.image(token, channel)
        views.append((channel, draw.through_camera(image, K, geometry.invert(T_map_cam), layers)))
    return draw.jpeg(draw.side_by_side(views, columns=3))


def _layers(dataset: Dataset, token: str, marked: Marked) -> list[Layer]:
    return [Layer(box_array(dataset.boxes(token)), GREY), Layer(marked.truth, draw.GREEN),
            Layer(marked.false, draw.ORANGE), Layer(marked.found, draw.BLUE)]


def _array(boxes: Sequence[DetectionBox]) -> np.ndarray:
    rows = [(*box.translation, box.size[1], box.size[0], box.size[2], Quaternion(box.rotation).yaw_pitch_roll[0],
             *box.velocity) for box in boxes]
    return np.array(rows, float).reshape(-1, len(BOX))
