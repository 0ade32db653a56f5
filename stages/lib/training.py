"""A detector fitted to samples: the same bits for the same samples, recipe and kind of machine.

Nothing is remembered between steps but the weights and the optimiser: which samples a step sees follows from the seed
and the step, and each sample's augmentation from the seed, its epoch and its index.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from stages.lib import augment, targets
from stages.lib.detector import Architecture, Net, recalibrate_bn, reproducible
from stages.lib.knobs import knob
from stages.lib.targets import Wanted

Read = Callable[[int], tuple[np.ndarray, Wanted]]
"""Index of a sample -> its points (N, 5) float32 and what its labels say, both in the ego frame."""


@dataclass(frozen=True)
class Recipe:
    """How a model learns."""

    seed: int = knob("of the first weights, the order of samples and their augmentation", low=0)
    threads: int = knob("CPU threads; another count gives other bits", low=1, high=256)
    steps: int = knob("optimiser steps", low=1)
    batch_size: int = knob("samples a step", low=1)
    lr: float = knob("highest learning rate", above=0)
    warmup_ratio: float = knob("share of the steps in which the rate rises", low=0, high=1)
    weight_decay: float = knob("of AdamW", low=0)
    max_gradient_norm: float = knob("longer gradients are shortened to this", above=0)
    code_weight: float = knob("weight of the box terms against the heat map's", low=0)
    velocity_weight: float = knob("weight of the velocity among the box terms", low=0)
    bn_batches: int = knob("batches that the batch norm statistics are taken from at the end", low=1)
    flip: bool = knob("mirror samples in x and in y, each at even odds")
    max_yaw_rad: float = knob("samples are turned by up to this, either way", low=0, high=3.2)
    max_scale_ratio: float = knob("samples are scaled by up to this share, either way", low=0, high=0.5)


def draw(seed: int, num_samples: int, batch_size: int, step: int) -> list[tuple[int, int]]:
    """(epoch, sample index) of each sample of a step. Every epoch visits each sample once, in an order of its own."""
    places = [divmod(place, num_samples) for place in range(step * batch_size, (step + 1) * batch_size)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_samples) for epoch, _ in places}
    return [(epoch, int(orders[epoch][i])) for epoch, i in places]


def one_cycle(step: int, recipe: Recipe) -> tuple[float, float]:
    """(learning rate, Adam's beta 1) of a step: rate up from a tenth, then down to nothing; beta 1 the other way.

    Cosine both ways (Smith, arXiv 1708.07120, as CenterPoint uses it).
    """
    top = recipe.warmup_ratio * recipe.steps
    up = step < top
    share = step / top if up else (step - top) / max(recipe.steps - top, 1)
    share = (1 - np.cos(np.pi * share)) / 2
    lr = recipe.lr * (0.1 + 0.9 * share if up else 1 - (1 - 1e-4) * share)
    return float(lr), float(0.95 - 0.1 * share if up else 0.85 + 0.1 * share)


def collate(clouds: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The net's input: all points (N, 5), the sample (N,) int64 that each belongs to, and the number of samples."""
    sample = np.repeat(np.arange(len(clouds)), [len(cloud) for cloud in clouds])
    return torch.from_numpy(np.concatenate(clouds)), torch.from_numpy(sample), len(clouds)


def fit(arch: Architecture, recipe: Recipe, num_samples: int, read: Read) -> tuple[Net, list[dict[str, float]]]:
    """(net ready for use, one row a step: step, lr, loss and its parts). Prints ten lines of progress to stderr."""
    with reproducible(recipe.threads, recipe.seed):
        net, curves = Net(arch), []
        optimiser = torch.optim.AdamW(net.parameters(), weight_decay=recipe.weight_decay)
        for step in range(recipe.steps):
            clouds, batch = [], []
            for epoch, index in draw(recipe.seed, num_samples, recipe.batch_size, step):
                points, wanted = _augmented(recipe, epoch, index, read)
                clouds.append(arch.crop(points))
                batch.append(targets.make(wanted, len(arch.classes), arch.grid))
            parts = targets.losses(*net.train()(*collate(clouds)), batch)
            lr, loss = _update(net, optimiser, recipe, step, parts)
            curves.append({"step": step, "lr": lr, "loss": loss} | {k: float(v.detach()) for k, v in parts.items()})
            if (step + 1) * 10 // recipe.steps > step * 10 // recipe.steps:
                print(f"train: step {step + 1} of {recipe.steps}, loss {loss:.3f}", file=sys.stderr, flush=True)

        def plain(number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
            chosen = draw(recipe.seed, num_samples, recipe.batch_size, recipe.steps + number)
            return collate([arch.crop(read(index)[0]) for _, index in chosen])

        recalibrate_bn(net, map(plain, range(recipe.bn_batches)))
    return net, curves


def _augmented(recipe: Recipe, epoch: int, index: int, read: Read) -> tuple[np.ndarray, Wanted]:
    points, wanted = read(index)
    rng = np.random.default_rng([recipe.seed, epoch, index])
    motion = augment.draw(rng, recipe.flip, recipe.max_yaw_rad, recipe.max_scale_ratio)
    points, boxes = augment.move(motion, points, wanted.boxes)
    return points, dataclasses.replace(wanted, boxes=boxes)


def _update(net: Net, optimiser: torch.optim.Optimizer, recipe: Recipe, step: int,
            parts: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Moves the weights; (learning rate, loss)."""
    lr, beta = one_cycle(step, recipe)
    for group in optimiser.param_groups:
        group["lr"], group["betas"] = lr, (beta, 0.999)
    weights = dict.fromkeys(parts, recipe.code_weight) | {
        "heat": 1.0, "velocity": recipe.code_weight * recipe.velocity_weight}
    loss = sum(weights[part] * value for part, value in parts.items())
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.max_gradient_norm)
    optimiser.step()
    return lr, float(loss.detach())
