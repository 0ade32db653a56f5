"""The local runner: worker processes of this machine, a timeout per task, a crash costs one task."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, as_completed
from typing import Any

import pebble

from stages.lib.orphans import die_with_parent
from stages.lib.secrets import redacted

# A worker computes with one thread; joblib must not leave semaphores for a killed worker's tracker to complain about.
# glibc keeps the memory of a freed image for the next one: to give it back and fault it in anew costs a third of an
# undistorted scene's CPU seconds.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
               "POLARS_MAX_THREADS": "1", "JOBLIB_MULTIPROCESSING": "0",
               "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}


class TaskFailedError(Exception):
    """A task timed out or its process died; the text says which."""


def perform(function: Callable[[Any], Any], tasks: Sequence[Any], *, workers: int,
            timeout_s: float) -> Iterator[tuple[int, Any]]:
    """(index, what `function(task)` returned, or the exception it ended with), as they end.

    `function` must be importable in a fresh process. Worker processes are spawned, compute with one thread each, and
    die with this process, however it ends.
    """
    if not tasks:
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    signal.siginterrupt(signal.SIGINT, True)  # polars has waits taken up again: Ctrl-C would be heard at their end
    context = multiprocessing.get_context("spawn")
    with pebble.ProcessPool(max_workers=min(workers, len(tasks)), context=context,
                            initializer=die_with_parent, initargs=(os.getpid(),)) as pool:
        try:
            futures = {pool.schedule(_attempt, args=(function, task), timeout=timeout_s): i
                       for i, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], _outcome(future, timeout_s)
        except BaseException:
            pool.stop()
            raise


def _attempt(function: Callable[[Any], Any], task: Any) -> Any:
    """What the function returns. An exit, or an exception that cannot travel between processes, would end the pool."""
    try:
        return function(task)
    except BaseException as error:
        if isinstance(error, Exception) and _travels(error):
            raise
        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr)
        raise TaskFailedError(f"{type(error).__name__}: {error}") from None


def _travels(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _outcome(future: pebble.ProcessFuture, timeout_s: float) -> Any:
    try:
        return future.result()
    except TimeoutError:
        return TaskFailedError(f"took more than {timeout_s:g} s and was stopped")
    except (pebble.ProcessExpired, CancelledError) as error:
        code = getattr(error, "exitcode", None)
        return TaskFailedError(f"was cancelled: {error}" if code is None else f"its process died (exit code {code})")
    except Exception as error:  # what the task itself raised: judged and reported by the caller
        return error
