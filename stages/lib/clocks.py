"""What a topic's stamps are worth: twins, steps back, missing frames, silences, and clocks that disagree."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kept:
    """Which messages stay: keep (N,) bool; the stamps kept strictly increase."""

    keep: np.ndarray
    num_duplicate: int
    num_backward: int


def increasing(stamps_us: np.ndarray) -> Kept:
    """The longest strictly increasing run of stamps (N,) int64, in the order received.

    A stamp seen before is a duplicate: the first one stays. Of the others, those outside the longest increasing
    subsequence are backward: one stamp far ahead costs itself, not all that follow it.
    """
    first = np.zeros(len(stamps_us), bool)
    first[np.unique(stamps_us, return_index=True)[1]] = True
    keep = first.copy()
    unique_us = stamps_us[first]
    if np.any(np.diff(unique_us) < 0):
        keep[np.flatnonzero(first)] = _longest_increasing(unique_us)
    return Kept(keep, int((~first).sum()), int(first.sum() - keep.sum()))


def rate_hz(stamps_us: np.ndarray) -> float:
    """The native rate of increasing stamps: that of the median distance; 0 for fewer than two."""
    return float(1e6 / np.median(np.diff(stamps_us))) if len(stamps_us) > 1 else 0.0


def num_dropped(stamps_us: np.ndarray, nominal_hz: float) -> int:
    """How many messages are missing between the first and the last of increasing stamps, by the nominal rate."""
    periods = np.rint(np.diff(stamps_us) * nominal_hz / 1e6).astype(int)
    return int(np.maximum(periods - 1, 0).sum())


def silences(stamps_us: np.ndarray, max_gap_us: int) -> list[tuple[int, int]]:
    """(last stamp before, first stamp after) of each distance between increasing stamps above max_gap_us."""
    at = np.flatnonzero(np.diff(stamps_us) > max_gap_us)
    return [(int(stamps_us[i]), int(stamps_us[i + 1])) for i in at]


def offsets_to_cover(pose_us: tuple[int, int], sensors_us: tuple[int, int]) -> tuple[int, int] | None:
    """(least, greatest) offset [µs] to add to the pose's stamps so that they cover the sensors'; None where they meet.

    pose_us, sensors_us  (first, last) stamp; where the pose's span is the shorter one, the offsets that it fits in.
    """
    if pose_us[0] <= sensors_us[1] and sensors_us[0] <= pose_us[1]:
        return None
    return tuple(sorted((sensors_us[0] - pose_us[0], sensors_us[1] - pose_us[1])))


def _longest_increasing(values: np.ndarray) -> np.ndarray:
    """(N,) bool: the longest strictly increasing subsequence, by patience sorting in N log N."""
    tails: list[int] = []
    tops: list[int] = []
    below = np.full(len(values), -1)
    for i, value in enumerate(values.tolist()):
        pile = bisect_left(tails, value)
        below[i] = tops[pile - 1] if pile else -1
        tails[pile:pile + 1], tops[pile:pile + 1] = [value], [i]
    keep, i = np.zeros(len(values), bool), tops[-1]
    while i >= 0:
        keep[i], i = True, below[i]
    return keep
