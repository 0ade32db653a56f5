"""The processes that share the batches of one training, on one node: one for each device.

Rank 0 is the process that asks for them; it has the store, the checkpoints and the signals. The others are started
with the environment that torchrun gives its own (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), and end with
it. A process that torchrun itself started joins torchrun's ranks and starts none.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stages.lib.errors import ConfigError
from stages.lib.orphans import die_with_parent

CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it cuBLAS is not deterministic
START_S = 120.0


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the batches: its number, how many they are, its torch device."""

    rank: int
    world: int
    device: str

    def parts(self, num_parts: int) -> range:
        """Which of the parts of a batch this process computes."""
        return range(self.rank, num_parts, self.world)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(parts, n) of all processes in the order of the parts, from each one's (own parts, n)."""
        if self.world == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(gathered, rows)
        return torch.stack(gathered, 1).flatten(0, 1)


ALONE = Ranks(0, 1, "cpu")


@contextlib.contextmanager
def shared(num: int, device: str, assist: Callable[..., None], args: tuple[Any, ...]) -> Iterator[Ranks]:
    """The first of `num` ranks on `device` (cpu or cuda); each other one runs `assist(*args, its ranks)` until then.

    `assist` and `args` travel by pickle. Raises ConfigError where the devices are not there, RuntimeError where
    another rank ends early.
    """
    if device == "cuda":
        if (found := torch.cuda.device_count()) < num:
            raise ConfigError(f"train.num_devices is {num} and train.device cuda, but torch sees {found} GPUs here\n"
                              "  set train.device=cpu, or run it on a machine with GPUs and a CUDA build of torch")
        for name, value in CUBLAS.items():
            os.environ.setdefault(name, value)
    if num == 1:
        yield Ranks(0, 1, _device(device, 0))
    elif dist.is_torchelastic_launched():
        with _joined(device, os.environ) as ranks:
            if ranks.world != num:
                raise ConfigError(f"torchrun started {ranks.world} processes, train.num_devices is {num}\n"
                                  f"  torchrun --standalone --nproc-per-node {num}")
            yield ranks
    else:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        told = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        with _others(num, told, (device, assist, args)) as others:
            _wait_for(others, store)
            with _joined(device, {**told, "RANK": "0", "LOCAL_RANK": "0"}) as ranks:
                yield ranks


@contextlib.contextmanager
def _joined(device: str, environment: Mapping[str, str]) -> Iterator[Ranks]:
    """This process's ranks, as torchrun's environment describes them."""
    with _environment(environment):
        local = _device(device, int(os.environ["LOCAL_RANK"]))
        if device == "cuda":
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method="env://")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _others(num: int, told: Mapping[str, str], task: tuple[Any, ...]) -> Iterator[list[subprocess.Popen]]:
    """The ranks after the first, started with their task; ended at the end, whatever they do."""
    environment = {**os.environ, **told, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    others: list[subprocess.Popen] = []
    try:
        for rank in range(1, num):
            others.append(subprocess.Popen(
                [sys.executable, "-m", "stages.lib.ranks", str(os.getpid())], stdin=subprocess.PIPE,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for one in others:
            with contextlib.suppress(BrokenPipeError), one.stdin as pipe:  # how it ended is said by who waits for it
                pickle.dump(task, pipe)
        yield others
    except (RuntimeError, OSError) as error:  # what a collective raises when a peer is gone
        _raise_for_ended(others, error)
        raise
    finally:
        for one in others:
            one.kill()
            one.wait()


def _wait_for(others: list[subprocess.Popen], store: dist.TCPStore) -> None:
    deadline = time.monotonic() + START_S
    while not all(store.check([f"ready/{rank}"]) for rank in range(1, len(others) + 1)):
        _raise_for_ended(others, None)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the other processes of the training did not start within {START_S:g} s")
        time.sleep(0.05)


def _raise_for_ended(others: list[subprocess.Popen], cause: Exception | None) -> None:
    for rank, one in enumerate(others, 1):
        if one.poll() not in (None, 0):
            raise RuntimeError(f"process {rank} of the training ended with exit code {one.returncode}") from cause


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _device(device: str, number: int) -> str:
    return f"cuda:{number}" if device == "cuda" else device


def main() -> None:
    """A rank after the first: takes its task from stdin and works on it until the first has no more use for it."""
    die_with_parent(int(sys.argv[1]))
    for number in (signal.SIGTERM, signal.SIGINT):  # the first rank decides
        signal.signal(number, signal.SIG_IGN)
    device, assist, args = pickle.load(sys.stdin.buffer)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store.set(f"ready/{os.environ['RANK']}", "")
    with _joined(device, os.environ) as ranks:
        assist(*args, ranks)


if __name__ == "__main__":
    main()
