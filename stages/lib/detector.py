"""A small CenterPoint-style pillar detector in plain PyTorch: points in, boxes out, both in the ego frame.

Dynamic pillars (arXiv 1910.06528) on a dense grid, a convolutional backbone with a feature pyramid (arXiv 1812.05784),
and centre heat maps with regressed boxes (arXiv 2006.11275). Torch alone, no compiled operator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from stages.lib import knobs
from stages.lib.dataset import BOX
from stages.lib.errors import ConfigError, DataError
from stages.lib.knobs import knob
from stages.lib.targets import CODE, CODE_SIZE, Grid, decode

OUT_STRIDE = 2  # output cells are this many pillars wide
HEAT_BIAS = -2.19  # logit of 0.1
INTENSITY_SCALE = 255.0
AGE_SCALE = 10.0
FORMAT = 1
MAX_LAYERS, MAX_PILLARS = 2**10, 2**24  # 24 layers and 2**18 pillars are many


@dataclass(frozen=True)
class Architecture:
    """What a model is and how its input is made; saved with the weights."""

    classes: tuple[str, ...] = knob("categories it finds, e.g. vehicle.car; all others are background")
    range_m: tuple[float, float, float, float, float, float] = knob(
        "x_min, y_min, z_min, x_max, y_max, z_max of the points it sees, in the ego frame")
    pillar_m: float = knob("side of a pillar; boxes are found on cells of twice this", above=0)
    num_sweeps: int = knob("lidar sweeps gathered for a key frame, itself included", low=1)
    ego_box_m: tuple[float, float, float, float] = knob(
        "x_min, y_min, x_max, y_max of the vehicle itself in the ego frame: points in it are left out")
    intensity: bool = knob("use the points' intensity; it differs from sensor to sensor")
    pillar_channels: int = knob("features of a pillar", low=1)
    stages: tuple[int, ...] = knob("channels of the backbone's stages, each at half the resolution before it", low=1)
    convs_per_stage: int = knob("convolutions in a stage after the one that halves the resolution", low=0)
    neck_channels: int = knob("channels of each stage's part of the pyramid, and of the heads", low=1)
    bn_momentum: float = knob("share of the newest batch in the running batch norm statistics", above=0, high=1)
    nms_radius_m: tuple[float, ...] = knob(
        "for each class: of two centres nearer than this, the better one stays", low=0)
    min_score: float = knob("boxes with a lower score are not given", low=0, high=1)
    max_boxes: int = knob("most boxes of a key frame", low=1)

    def __post_init__(self) -> None:
        if not self.classes or not self.stages:
            raise ConfigError("train.classes and train.stages need at least one value each")
        multiple = 2 ** len(self.stages)
        for axis, low, high in zip("xy", self.range_m[:2], self.range_m[3:5]):
            num_pillars = (high - low) / self.pillar_m
            if num_pillars < 1 or abs(num_pillars - round(num_pillars)) > 1e-6 or round(num_pillars) % multiple:
                raise ConfigError(f"train.range_m {low:g}..{high:g} m along {axis} is {num_pillars:g} pillars of "
                                  f"{self.pillar_m:g} m, expected a multiple of {multiple} (2 for each stage)\n"
                                  "  change train.range_m, train.pillar_m or train.stages")
        if self.range_m[2] >= self.range_m[5]:
            raise ConfigError(f"train.range_m {self.range_m[2]:g}..{self.range_m[5]:g} m along z is empty: change it")
        if len(self.nms_radius_m) != len(self.classes):
            raise ConfigError(f"train.nms_radius_m has {len(self.nms_radius_m)} values for {len(self.classes)} "
                              "classes, expected one for each of train.classes")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pillar grid: rows go along +y, columns along +x."""
        x_min, y_min, _, x_max, y_max, _ = self.range_m
        return round((y_max - y_min) / self.pillar_m), round((x_max - x_min) / self.pillar_m)

    @property
    def grid(self) -> Grid:
        """The output cells."""
        height, width = self.size
        return Grid(*self.range_m[:2], self.pillar_m * OUT_STRIDE, width // OUT_STRIDE, height // OUT_STRIDE)

    def crop(self, points: np.ndarray) -> np.ndarray:
        """The points (N, 5) that lie in range."""
        low, high = np.array(self.range_m[:3], np.float32), np.array(self.range_m[3:], np.float32)
        return points[((points[:, :3] >= low) & (points[:, :3] < high)).all(1)]


def _conv(in_channels: int, out_channels: int, momentum: float, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
                         nn.BatchNorm2d(out_channels, eps=1e-3, momentum=momentum), nn.ReLU())


class Pillars(nn.Module):
    """Points to a dense image: each pillar holds the channel-wise maximum over its points, 0 where there are none.

    A point is its height, intensity, age, offset from the mean of its pillar's points and from the pillar's centre:
    nothing of where in the world it is, so that what is learned in one place holds in another.
    """

    def __init__(self, arch: Architecture):
        super().__init__()
        self.height, self.width = arch.size
        self.pillar_m, self.intensity = arch.pillar_m, arch.intensity
        self.register_buffer("low", torch.tensor(arch.range_m[:3]), persistent=False)
        self.register_buffer("high", torch.tensor(arch.range_m[3:]), persistent=False)
        self.linear = nn.Linear(7 + arch.intensity, arch.pillar_channels, bias=False)
        self.norm = nn.BatchNorm1d(arch.pillar_channels, eps=1e-3, momentum=arch.bn_momentum)

    def forward(self, points: torch.Tensor, sample: torch.Tensor, num_samples: int) -> torch.Tensor:
        """(B, channels, height, width) of points (N, 5) and the sample (N,) int64 that each belongs to."""
        xyz = points[:, :3]
        inside = ((xyz >= self.low) & (xyz < self.high)).all(1)
        corner = torch.floor((xyz[:, :2] - self.low[:2]) / self.pillar_m)
        size = self.height * self.width
        outside = num_samples * size  # a spare pillar, cut off below: no point is dropped, so the graph has one shape
        pillar = (sample * size + corner[:, 1].long() * self.width + corner[:, 0].long()).where(inside, outside)

        counted = torch.cat([xyz, torch.ones_like(xyz[:, :1])], 1)
        sums = _gather(outside + 1, pillar, counted, "sum")[pillar]
        mean = sums[:, :3] / sums[:, 3:]
        centre = self.low[:2] + (corner + 0.5) * self.pillar_m
        shown = [points[:, 3:4] / INTENSITY_SCALE] if self.intensity else []
        features = torch.cat([points[:, 2:3], points[:, 4:5] * AGE_SCALE, *shown, xyz - mean, xyz[:, :2] - centre], 1)
        features = self.norm(self.linear(features)).relu()

        image = _gather(outside + 1, pillar, features, "amax")[:-1]
        return image.view(num_samples, self.height, self.width, -1).permute(0, 3, 1, 2)


def _gather(num_pillars: int, pillar: torch.Tensor, rows: torch.Tensor, how: str) -> torch.Tensor:
    """(num_pillars, C): sum or maximum, and 0, of the rows (N, C) of each pillar."""
    empty = torch.zeros(num_pillars, rows.shape[1])
    return empty.scatter_reduce(0, pillar[:, None].expand(-1, rows.shape[1]), rows, how)


class Net(nn.Module):
    """Points to heat map logits (B, classes, h, w) and code (B, CODE_SIZE, h, w), see `targets.CODE`."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.pillars = Pillars(arch)
        self.stages, self.necks = nn.ModuleList(), nn.ModuleList()
        channels, m, neck = arch.pillar_channels, arch.bn_momentum, arch.neck_channels
        for depth, width in enumerate(arch.stages):
            self.stages.append(nn.Sequential(_conv(channels, width, m, stride=2),
                                             *[_conv(width, width, m) for _ in range(arch.convs_per_stage)]))
            up = 2**depth
            self.necks.append(nn.Sequential(nn.ConvTranspose2d(width, neck, up, up, bias=False),
                                            nn.BatchNorm2d(neck, eps=1e-3, momentum=m), nn.ReLU()))
            channels = width
        self.shared = _conv(neck * len(arch.stages), neck, m)
        self.heat = nn.Sequential(_conv(neck, neck, m), nn.Conv2d(neck, len(arch.classes), 1))
        self.code = nn.Sequential(_conv(neck, neck, m), nn.Conv2d(neck, CODE_SIZE, 1))
        nn.init.constant_(self.heat[-1].bias, HEAT_BIAS)

    def forward(self, points: torch.Tensor, sample: torch.Tensor,
                num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, levels = self.pillars(points, sample, num_samples), []
        for stage, neck in zip(self.stages, self.necks):
            image = stage(image)
            levels.append(neck(image))
        shared = self.shared(torch.cat(levels, 1))
        return self.heat(shared), self.code(shared)


class Detector:
    """A net with its architecture: the whole of what `load` gives and `save` keeps."""

    def __init__(self, arch: Architecture, net: Net, provenance: Mapping[str, Any]):
        self.arch, self.net, self.provenance = arch, net, provenance

    def detect(self, points_ego: np.ndarray) -> pl.DataFrame:
        """Boxes in the ego frame, best first: category, `BOX` columns, score in (0, 1).

        points_ego  (N, 5) float32 from `Dataset.points_ego(sample_token, arch.num_sweeps, arch.ego_box_m)`
        """
        points = torch.from_numpy(np.ascontiguousarray(self.arch.crop(points_ego)))
        with torch.no_grad():
            heat, code = self.net.eval()(points, torch.zeros(len(points), dtype=torch.int64), 1)
        boxes, labels, scores = peaks(heat[0].sigmoid().numpy(), code[0].numpy(), self.arch)
        columns = {name: boxes[:, i] for i, name in enumerate(BOX)}
        return pl.DataFrame({"category": [self.arch.classes[i] for i in labels], **columns, "score": scores},
                            schema={"category": pl.String, **dict.fromkeys(columns, pl.Float64), "score": pl.Float64})


def peaks(heat: np.ndarray, code: np.ndarray, arch: Architecture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(boxes (M, 9), labels (M,), scores (M,)) in falling order of score: local maxima, thinned by distance.

    heat (C, h, w) probabilities; code (CODE_SIZE, h, w).
    """
    highest = torch.nn.functional.max_pool2d(torch.from_numpy(heat)[None], 3, 1, 1)[0].numpy()
    found = np.flatnonzero((heat == highest) & (heat >= arch.min_score))
    found = found[np.argsort(-heat.flat[found], kind="stable")]
    labels, cells = np.divmod(found, heat[0].size)
    code = code.reshape(CODE_SIZE, -1)[:, cells].T.astype(float)
    log_size = slice(CODE["offset"] + CODE["z"], CODE["offset"] + CODE["z"] + CODE["size"])
    code[:, log_size] = code[:, log_size].clip(-4, 4)  # 0.02 m to 55 m: an untrained net must not overflow
    boxes = decode(cells, code, arch.grid)
    kept = thin(boxes[:, :2], labels, arch.nms_radius_m)[:arch.max_boxes]
    return boxes[kept], labels[kept], heat.flat[found[kept]].astype(float)


def thin(xy_m: np.ndarray, labels: np.ndarray, radius_m: tuple[float, ...]) -> np.ndarray:
    """Indices of the centres that stay: (M, 2), best first; each removes the worse ones of its class in its radius."""
    kept: list[int] = []
    for i, label in enumerate(labels):
        rivals = [j for j in kept if labels[j] == label]
        if not rivals or np.hypot(*(xy_m[rivals] - xy_m[i]).T).min() >= radius_m[label]:
            kept.append(i)
    return np.array(kept, np.int64)


def recalibrate_bn(net: Net, batches: Iterable[tuple[torch.Tensor, torch.Tensor, int]]) -> None:
    """Batch norm statistics as the mean over these inputs of `net`, instead of the moving average of training.

    With few steps the moving average lags behind the weights, and a good net looks broken.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        net.train()
        for batch in batches:
            net(*batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    net.eval()


@contextlib.contextmanager
def reproducible(threads: int, seed: int) -> Iterator[None]:
    """Torch with deterministic operators, this many threads and a random state of its own; all is put back after.

    Equal bits need an equal thread count: sums are split by it.
    """
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_deterministic_debug_mode(before[1])


def save(detector: Detector, path: Path) -> None:
    """A file for `load`, of plain values and tensors; the same bytes for the same detector, whatever the path."""
    content = io.BytesIO()  # torch writes a path's name into the file, but not a buffer's
    torch.save({"format": FORMAT, "architecture": dataclasses.asdict(detector.arch),
                "provenance": dict(detector.provenance), "state": detector.net.state_dict()}, content)
    path.write_bytes(content.getvalue())


def _check_size(arch: Architecture, num_bytes: int) -> None:
    """Raises ValueError for a net that has more layers, pillars or parameters than belong to a file of this size."""
    if len(arch.stages) * (arch.convs_per_stage + 2) > MAX_LAYERS or math.prod(arch.size) > MAX_PILLARS:
        raise ValueError(f"more than {MAX_LAYERS} layers or {MAX_PILLARS} pillars")
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in Net(arch).parameters())
    if 4 * num_parameters > num_bytes:
        raise ValueError(f"{num_parameters} parameters in {num_bytes} bytes")


def load(path: Path) -> Detector:
    """The detector of a file that `save` wrote. Nothing in it is executed. Raises DataError where it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        arch = knobs.load(Architecture, content["architecture"], "architecture")
        _check_size(arch, path.stat().st_size)
        net = Net(arch)
        net.load_state_dict(content["state"])
        return Detector(arch, net.eval(), content["provenance"])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a model of this program ({reason})\n  make it again: `dvc repro train`") from None
