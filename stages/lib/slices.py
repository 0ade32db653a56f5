"""The score by parts: near and far, many points and few, moving and standing, drive by drive."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
from nuscenes.eval.detection.data_classes import DetectionBox

from stages.lib import scoring
from stages.lib.scoring import DIST_THS_M, Verdict


@dataclass(frozen=True)
class Dimension:
    """A way to part boxes. index(box) is the place of a box's part in `parts`, or -1 for none.

    of_truth  only the truth knows (points, motion): a predicted box then belongs to the part of the nearest true box
              within 4 m, and to all parts where there is none
    """

    name: str
    parts: Sequence[str]
    index: Callable[[DetectionBox], int]
    of_truth: bool


def by_range(step_m: float, range_m: float) -> Dimension:
    """Rings around the ego vehicle, step_m wide, out to range_m."""
    inner = np.arange(0, range_m, step_m)
    return Dimension("range", [f"{low:g}-{min(low + step_m, range_m):g} m" for low in inner],
                     lambda box: int(box.ego_dist // step_m), of_truth=False)


def by_points(edges: Sequence[int]) -> Dimension:
    """Lidar (and radar) points in the true box; edges are the fewest points of each part, rising."""
    parts = [f"{low}-{high - 1}" for low, high in pairwise(edges)] + [f"{edges[-1]} or more"]
    return Dimension("points", parts, lambda box: bisect_right(edges, box.num_pts) - 1, of_truth=True)


def by_motion(moving_mps: float) -> Dimension:
    """Whether the true box moves, by the devkit's velocity along prev and next."""
    def index(box: DetectionBox) -> int:
        speed_mps = np.hypot(*box.velocity)
        return 2 if np.isnan(speed_mps) else int(speed_mps < moving_mps)
    return Dimension("motion", ("moving", "standing", "unknown"), index, of_truth=True)


def by_sample(name: str, part_of: Mapping[str, str]) -> Dimension:
    """Parts of the samples: sample token -> part, e.g. the drive."""
    parts = sorted(set(part_of.values()))
    return Dimension(name, parts, lambda box: parts.index(part_of[box.sample_token]), of_truth=False)


def table(verdicts: Mapping[str, Verdict], name: str, dimensions: Sequence[Dimension]) -> pl.DataFrame:
    """AP of a detection class, mean over the four matching distances, by source, for each part that has truth.

    verdicts  source -> Verdict, all on the same truth. Columns: class, slice, part, num_boxes, <source>_ap.
    """
    rows = []
    for dimension in dimensions:
        aps = {source: _aps(verdict, name, dimension) for source, verdict in verdicts.items()}
        first = next(iter(aps.values()))
        for index, part in enumerate(dimension.parts):
            if first[index][0]:
                rows.append({"class": name, "slice": dimension.name, "part": part, "num_boxes": first[index][0],
                             **{f"{source}_ap": ap[index][1] for source, ap in aps.items()}})
    schema = {"class": pl.String, "slice": pl.String, "part": pl.String, "num_boxes": pl.Int64}
    return pl.DataFrame(rows, schema=schema | {f"{source}_ap": pl.Float64 for source in verdicts})


def _aps(verdict: Verdict, name: str, dimension: Dimension) -> list[tuple[int, float]]:
    """(number of true boxes, AP) of each part."""
    truth = scoring.select(verdict.truth, lambda box: box.detection_name == name)
    predicted = scoring.select(verdict.predicted, lambda box: box.detection_name == name)
    part = {id(box): dimension.index(box) for box in truth.all}
    for box in predicted.all:
        if dimension.of_truth:
            nearest = scoring.nearest(box, truth[box.sample_token], DIST_THS_M[-1])
            part[id(box)] = None if nearest is None else part[id(nearest)]
        else:
            part[id(box)] = dimension.index(box)
    found = []
    for index in range(len(dimension.parts)):
        true = scoring.select(truth, lambda box, i=index: part[id(box)] == i)
        claimed = scoring.select(predicted, lambda box, i=index: part[id(box)] in (i, None))
        found.append((len(true.all), scoring.mean_ap(true, claimed, name) if true.all else 0.0))
    return found
