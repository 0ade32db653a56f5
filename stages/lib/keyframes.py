"""Which frames of asynchronous sensors make the key frames of a scene, and which stay as sweeps. All on stamps [µs]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class KeyFrames:
    """The key frames of a scene.

    rows      per key frame: channel -> number of its frame, in order of time; a frame belongs to one key frame at most
    num_lost  key frames that were due and lost, for want of a required channel's frame
    missing   required channel -> how many of the frames tried had none of it near enough
    """

    rows: tuple[Mapping[str, int], ...]
    num_lost: int
    missing: Mapping[str, int]


def choose(stamps_us: Mapping[str, np.ndarray], reference: str, required: Sequence[str], period_us: float,
           tolerance_us: Mapping[str, float]) -> KeyFrames:
    """Key frames on the reference channel, one per period from the first complete frame on.

    stamps_us     channel -> (N,) int64, strictly increasing
    tolerance_us  channel -> how far its frame may lie from the reference frame's stamp
    Each is the reference frame nearest to its due time, less than half a period away, for which every required channel
    has a frame within tolerance that no earlier key frame took; of each other channel, the nearest such frame if any.
    """
    frames_us, others = stamps_us[reference], [channel for channel in stamps_us if channel != reference]
    rows: list[dict[str, int]] = []
    taken = dict.fromkeys(stamps_us, -1)
    missing: Counter[str] = Counter()

    def match(frame: int) -> tuple[dict[str, int], list[str]]:
        row, lacking = {reference: frame}, []
        for channel in others:
            number = _nearest(stamps_us[channel], frames_us[frame], taken[channel] + 1, tolerance_us[channel])
            if number is not None:
                row[channel] = number
            elif channel in required:
                lacking.append(channel)
        return row, lacking

    def take(frames: Sequence[int]) -> bool:
        """The first complete one of these frames becomes a key frame; if none is, what the very first lacks counts."""
        first_lacking: list[str] = []
        for turn, frame in enumerate(frames):
            row, lacking = match(frame)
            if not lacking:
                rows.append(row)
                taken.update(row)
                return True
            first_lacking = lacking if turn == 0 else first_lacking
        missing.update(first_lacking)
        return False

    start = next((frame for frame in range(len(frames_us)) if take([frame])), None)
    if start is None:
        return KeyFrames((), len(frames_us), dict(sorted(missing.items())))
    num_lost = int((frames_us[start] - frames_us[0]) / period_us)
    num_due = int((frames_us[-1] + _half_period_us(frames_us) - frames_us[start]) / period_us)
    for due_us in frames_us[start] + np.arange(1, num_due + 1) * period_us:
        low, high = np.searchsorted(frames_us, [due_us - period_us / 2, due_us + period_us / 2])
        near = np.arange(max(low, taken[reference] + 1), high)
        num_lost += not take(near[np.argsort(np.abs(frames_us[near] - due_us), kind="stable")].tolist())
    return KeyFrames(tuple(rows), num_lost, dict(sorted(missing.items())))


def thin(stamps_us: np.ndarray, origin_us: int, rate_hz: float | None) -> np.ndarray:
    """(N,) bool: the frames that stay at rate_hz, the nearest to each of the ticks origin_us + k / rate_hz.

    None keeps all, 0 none.
    """
    keep = np.full(len(stamps_us), rate_hz is None)
    if rate_hz and len(stamps_us):
        period_us, half_us = 1e6 / rate_hz, _half_period_us(stamps_us)
        first, last = (stamps_us[[0, -1]] + [-half_us, half_us] - origin_us) / period_us
        for turn in range(int(np.ceil(first)), int(np.floor(last)) + 1):
            number = _nearest(stamps_us, origin_us + turn * period_us, 0, period_us / 2)
            if number is not None:
                keep[number] = True
    return keep


def following(sample_us: np.ndarray, stamps_us: np.ndarray) -> np.ndarray:
    """(N,) number of the sample at or after each stamp; the last sample for those after it."""
    return np.minimum(np.searchsorted(sample_us, stamps_us), len(sample_us) - 1)


def _half_period_us(stamps_us: np.ndarray) -> float:
    return float(np.median(np.diff(stamps_us))) / 2 if len(stamps_us) > 1 else 0.0


def _nearest(stamps_us: np.ndarray, at_us: float, first: int, tolerance_us: float) -> int | None:
    """Number of the frame from `first` on that is nearest to at_us and within tolerance; the earlier of two."""
    after = max(first, int(np.searchsorted(stamps_us, at_us)))
    near = [number for number in (after - 1, after) if first <= number < len(stamps_us)]
    best = min(near, key=lambda number: abs(stamps_us[number] - at_us), default=None)
    return best if best is not None and abs(stamps_us[best] - at_us) <= tolerance_us else None
