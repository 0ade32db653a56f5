"""A detector fitted to samples: the same bits for the same samples, recipe and kind of machine.

Nothing is remembered between steps but the weights and the optimiser: which samples a step sees follows from the seed
and the step, and each sample's augmentation from the seed, its epoch and its index. So a training that goes on from a
checkpoint ends in the bits of one that was never interrupted.

On CUDA an operator that torch knows to vary from run to run is an error (`reproducible`), and sums over parts of a
batch are taken in one order whatever NCCL does; other GPUs, and other versions of CUDA, give other bits.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.lib import augment, targets
from stages.lib.checkpoints import NOTHING
from stages.lib.detector import Architecture, Net, recalibrate_bn, reproducible
from stages.lib.knobs import knob
from stages.lib.ranks import ALONE, Ranks
from stages.lib.targets import Wanted

Read = Callable[[int], tuple[np.ndarray, Wanted]]
"""Index of a sample -> its points (N, 5) float32 and what its labels say, both in the ego frame."""


@dataclass(frozen=True)
class Recipe:
    """How a model learns."""

    seed: int = knob("of the first weights, the order of samples and their augmentation", low=0)
    device: str = knob("where it computes; another one gives other bits", choices=("cpu", "cuda"))
    num_devices: int = knob("processes or GPUs that share each batch; another count learns slightly differently",
                            low=1, high=64)
    threads: int = knob("CPU threads of each process; another count gives other bits", low=1, high=256)
    steps: int = knob("optimiser steps", low=1)
    batch_size: int = knob("samples a step, a multiple of num_devices", low=1)
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


def collate(clouds: list[np.ndarray],
            device: str | torch.device = "cpu") -> tuple[torch.Tensor, torch.Tensor, int]:
    """The net's input: all points (N, 5), the sample (N,) int64 that each belongs to, and the number of samples."""
    sample = np.repeat(np.arange(len(clouds)), [len(cloud) for cloud in clouds])
    return torch.from_numpy(np.concatenate(clouds)).to(device), torch.from_numpy(sample).to(device), len(clouds)


def fit(arch: Architecture, recipe: Recipe, num_samples: int, read: Read, *, ranks: Ranks = ALONE,
        state: bytes | None = None, checkpoints: Any = NOTHING) -> tuple[Net, list[dict[str, float]]]:
    """(net ready for use, one row a step: step, lr, loss and its parts). Prints ten lines of progress to stderr.

    A batch is cut into recipe.num_devices parts, computed one after another or by as many ranks; a step follows the
    mean of their gradients, summed in the order of the parts: the same bits either way. Each part has batch norm
    statistics and a count of boxes of its own, so that another number of parts learns nearly the same, not the same.

    state        where to go on: what an earlier attempt offered to its checkpoints
    checkpoints  `lib.checkpoints`: offered the state after each step, and while the batch norm is recalibrated,
                 which changes nothing that a step follows from
    """
    with reproducible(recipe.threads, recipe.seed):
        net = Net(arch).to(ranks.device)
        optimiser = torch.optim.AdamW(net.parameters(), weight_decay=recipe.weight_decay)
        curves = _restored(net, optimiser, state) if state else []
        for step in range(len(curves), recipe.steps):
            places = draw(recipe.seed, num_samples, recipe.batch_size, step)
            shares = [places[part::recipe.num_devices] for part in ranks.parts(recipe.num_devices)]
            losses = _gradients(net, shares, ranks, lambda share: _losses(net, arch, recipe, share, read))
            lr = _update(net, optimiser, recipe, step)
            curves.append({"step": step, "lr": lr} | losses)
            if ranks.rank == 0 and (step + 1) * 10 // recipe.steps > step * 10 // recipe.steps:
                print(f"train: step {step + 1} of {recipe.steps}, loss {losses['loss']:.3f}", file=sys.stderr,
                      flush=True)
            checkpoints.offer(step + 1, lambda: _state(net, optimiser, curves))

        def plain(number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
            checkpoints.offer(recipe.steps, lambda: _state(net, optimiser, curves))
            chosen = draw(recipe.seed, num_samples, recipe.batch_size, recipe.steps + number)
            return collate([arch.crop(read(index)[0]) for _, index in chosen], net.device)

        recalibrate_bn(net, map(plain, range(recipe.bn_batches)))
    return net.cpu(), curves


def _losses(net: Net, arch: Architecture, recipe: Recipe, share: list[tuple[int, int]],
            read: Read) -> dict[str, torch.Tensor]:
    """The loss of these samples and its parts, as scalars; each part before its weight."""
    clouds, batch = [], []
    for epoch, index in share:
        points, wanted = _augmented(recipe, epoch, index, read)
        clouds.append(arch.crop(points))
        batch.append(targets.make(wanted, len(arch.classes), arch.grid))
    parts = targets.losses(*net.train()(*collate(clouds, net.device)), batch)
    weights = dict.fromkeys(parts, recipe.code_weight) | {
        "heat": 1.0, "velocity": recipe.code_weight * recipe.velocity_weight}
    return {"loss": sum(weights[part] * value for part, value in parts.items())} | parts


def _gradients(net: Net, shares: list[Any], ranks: Ranks,
               losses_of: Callable[[Any], dict[str, torch.Tensor]]) -> dict[str, float]:
    """Leaves the mean of all parts' gradients in the net; the mean of their losses. `shares` are this rank's parts."""
    rows = []
    for share in shares:
        net.zero_grad()
        losses = losses_of(share)
        losses["loss"].backward()
        if ranks.world == len(shares) == 1:
            return {name: float(value.detach()) for name, value in losses.items()}
        rows.append(torch.cat([weight.grad.flatten() for weight in net.parameters()]
                              + [value.detach().reshape(1) for value in losses.values()]))
    rows = ranks.gather(torch.stack(rows))
    mean = rows[0].clone()
    for row in rows[1:]:
        mean += row
    mean /= len(rows)
    *gradients, values = mean.split([weight.numel() for weight in net.parameters()] + [len(losses)])
    for weight, gradient in zip(net.parameters(), gradients):
        weight.grad.copy_(gradient.view_as(weight))
    return dict(zip(losses, values.tolist()))


def _augmented(recipe: Recipe, epoch: int, index: int, read: Read) -> tuple[np.ndarray, Wanted]:
    points, wanted = read(index)
    rng = np.random.default_rng([recipe.seed, epoch, index])
    motion = augment.draw(rng, recipe.flip, recipe.max_yaw_rad, recipe.max_scale_ratio)
    points, boxes = augment.move(motion, points, wanted.boxes)
    return points, dataclasses.replace(wanted, boxes=boxes)


def _update(net: Net, optimiser: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    """Moves the weights along their gradients; the learning rate."""
    lr, beta = one_cycle(step, recipe)
    for group in optimiser.param_groups:
        group["lr"], group["betas"] = lr, (beta, 0.999)
    torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.max_gradient_norm)
    optimiser.step()
    return lr


def _state(net: Net, optimiser: torch.optim.Optimizer, curves: list[dict[str, float]]) -> bytes:
    """All that the next step follows from, for `_restored`: plain values and tensors."""
    content = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimiser": optimiser.state_dict(), "columns": list(curves[0]),
                "rows": torch.tensor([list(row.values()) for row in curves], dtype=torch.float64),
                "machine": _machine()}, content)
    return content.getvalue()


def _restored(net: Net, optimiser: torch.optim.Optimizer, state: bytes) -> list[dict[str, float]]:
    """Puts the net and the optimiser where they were; the rows of the steps until there. Nothing is executed."""
    content = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    net.load_state_dict(content["net"])
    optimiser.load_state_dict(content["optimiser"])
    if content["machine"] != _machine():
        print(f"train: begun on {content['machine']}, goes on on {_machine()}: the last bits may differ from those of "
              "a training on one kind of machine", file=sys.stderr, flush=True)
    rows = [dict(zip(content["columns"], row)) for row in content["rows"].tolist()]
    return [row | {"step": step} for step, row in enumerate(rows)]


def _machine() -> str:
    """What the bits depend on and the knobs don't say."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{torch.backends.cpu.get_cpu_capability()}{gpu}, torch {torch.__version__}"
