"""Positions over time: which detections are one thing, and its smoothed motion.

The motion model is constant velocity with white acceleration. Both axes share one covariance, so a state is (2, 2):
rows position [m] and velocity [m/s], columns x and y; a covariance is (2, 2) over position and velocity. All functions
of states take leading axes. The frame must not move: the map frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from stages.lib.knobs import knob

UNKNOWN_SPEED_MPS = 20.0  # deviation of a newborn track's velocity
CHI2 = 13.8  # 99.9 % of a Gaussian in the plane
UNLIKE_M = 0.5  # a track and a detection of e times its points count as this much further apart


@dataclass(frozen=True)
class Detections:
    """What one sweep shows: middles xy (N, 2) [m] and longer sides long_m (N,) of what was seen, num_points (N,)."""

    xy: np.ndarray
    long_m: np.ndarray
    num_points: np.ndarray


@dataclass(frozen=True)
class Tracking:
    """Knobs of the tracker."""

    position_m: float = knob("deviation of a detection's position", above=0)
    accel_mps2: float = knob("deviation of the acceleration over one second", above=0)
    gate_m: float = knob("a detection further than this from where a track is expected is not its", above=0)
    gap_s: float = knob("a track ends after this long without a detection; shorter gaps are bridged", above=0)
    min_hits: int = knob("tracks of fewer detections are dropped, with all of them", low=2)


def predict(state: np.ndarray, cov: np.ndarray, dt_s: float, accel_mps2: float) -> tuple[np.ndarray, np.ndarray]:
    """State and covariance dt_s later than the ones given, which are those of the last predict or update."""
    F = np.array([[1, dt_s], [0, 1]])
    Q = np.array([[dt_s**3 / 3, dt_s**2 / 2], [dt_s**2 / 2, dt_s]]) * accel_mps2**2
    return F @ state, F @ cov @ F.T + Q


def update(state: np.ndarray, cov: np.ndarray, xy: np.ndarray,
           position_m: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """State and covariance after positions xy (…, 2) were measured with the deviation position_m (…,)."""
    gain = cov[..., :, :1] / (cov[..., :1, :1] + np.square(position_m)[..., None, None])
    return state + gain * (xy[..., None, :] - state[..., :1, :]), cov - gain * cov[..., :1, :]


def born(xy: np.ndarray, position_m: float) -> tuple[np.ndarray, np.ndarray]:
    """State and covariance of tracks first seen at xy (…, 2)."""
    state = np.stack([xy, np.zeros_like(xy)], -2)
    cov = np.broadcast_to(np.diag([position_m**2, UNKNOWN_SPEED_MPS**2]), (*xy.shape[:-1], 2, 2))
    return state, cov


def associate(times_s: np.ndarray, detections: Sequence[Detections], cfg: Tracking) -> list[np.ndarray]:
    """Tracks in order of birth, each (H, 2) int: the sweep and the detection in it, in order of time.

    times_s (S,) increasing, of the sweeps. Hungarian assignment sweep by sweep, on distances and on how alike track and
    detection are, so that a splinter does not take over the track of the whole; gated by cfg.gate_m and by the state's
    own uncertainty, but a thing that shows more of itself may have its middle elsewhere.
    """
    state, cov = np.zeros((0, 2, 2)), np.zeros((0, 2, 2))
    live: list[list[tuple[int, int]]] = []
    ended: list[list[tuple[int, int]]] = []
    for sweep, (now_s, found) in enumerate(zip(times_s, detections)):
        alive = np.array([now_s - times_s[track[-1][0]] < cfg.gap_s + 1e-6 for track in live], bool)
        ended += [track for track, stays in zip(live, alive) if not stays]
        live = [track for track, stays in zip(live, alive) if stays]
        state, cov = predict(state[alive], cov[alive], now_s - times_s[max(sweep - 1, 0)], cfg.accel_mps2)
        tracks, hits, grown_m = _assign(state, cov, _last(live, detections), found, cfg)
        cov[tracks, 0, 0] += grown_m**2
        state[tracks], cov[tracks] = update(state[tracks], cov[tracks], found.xy[hits], cfg.position_m)
        for track, hit in zip(tracks, hits):
            live[track].append((sweep, int(hit)))
        new = np.setdiff1d(np.arange(len(found.xy)), hits)
        live += [[(sweep, int(hit))] for hit in new]
        state, cov = (np.concatenate(pair) for pair in zip((state, cov), born(found.xy[new], cfg.position_m)))
    return [np.array(track) for track in sorted(ended + live) if len(track) >= cfg.min_hits]


def _last(live: list[list[tuple[int, int]]], detections: Sequence[Detections]) -> Detections:
    """The latest detection of each track."""
    last = [(detections[sweep], hit) for sweep, hit in (track[-1] for track in live)]
    return Detections(*(np.array([getattr(found, name)[hit] for found, hit in last])
                        for name in ("xy", "long_m", "num_points")))


def _assign(state: np.ndarray, cov: np.ndarray, last: Detections, found: Detections,
            cfg: Tracking) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of tracks, of the detections they take, and how far a middle may be off for showing more or less."""
    if not len(state) or not len(found.xy):
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    distance = np.hypot(*np.moveaxis(state[:, None, 0] - found.xy, -1, 0))
    reach = np.minimum(cfg.gate_m, np.sqrt(CHI2 * (cov[:, 0, 0] + cfg.position_m**2)))
    grown_m = np.abs(found.long_m - last.long_m[:, None]) / 2
    unlike_m = UNLIKE_M * np.abs(np.log(found.num_points / last.num_points[:, None]))
    # To be left alone costs a gate: two bad pairs are not better than a good one.
    outside = distance > reach[:, None] + grown_m
    tracks, hits = linear_sum_assignment(np.where(outside, cfg.gate_m, distance + unlike_m))
    inside = ~outside[tracks, hits]
    return tracks[inside], hits[inside], grown_m[tracks[inside], hits[inside]]


def smooth(times_s: np.ndarray, xy: np.ndarray, position_m: np.ndarray, accel_mps2: float,
           at_s: np.ndarray) -> np.ndarray:
    """States (M, 2, 2) at at_s (M,), given all measurements: Rauch-Tung-Striebel.

    times_s (H,) increasing, H >= 1; xy (H, 2) [m]; position_m (H,) their deviations. at_s lie in [times_s[0],
    times_s[-1]]: nothing is extrapolated. Raises ValueError where they do not.
    """
    if len(at_s) and (at_s.min() < times_s[0] or at_s.max() > times_s[-1]):
        raise ValueError(f"state wanted at {at_s.min()}..{at_s.max()} s, measured {times_s[0]}..{times_s[-1]} s")
    grid = np.union1d(times_s, at_s)
    measured = dict(zip(np.searchsorted(grid, times_s), range(len(times_s))))
    states, covs, ahead = [], [], []
    for k, now_s in enumerate(grid):
        if k == 0:
            state, cov = born(xy[0], position_m[0])
        else:
            state, cov = predict(states[-1], covs[-1], now_s - grid[k - 1], accel_mps2)
            ahead.append((state, cov))
            if k in measured:
                state, cov = update(state, cov, xy[measured[k]], position_m[measured[k]])
        states.append(state)
        covs.append(cov)
    for k in range(len(grid) - 2, -1, -1):
        F = np.array([[1, grid[k + 1] - grid[k]], [0, 1]])
        state_ahead, cov_ahead = ahead[k]
        gain = covs[k] @ F.T @ np.linalg.inv(cov_ahead)
        states[k] = states[k] + gain @ (states[k + 1] - state_ahead)
        covs[k] = covs[k] + gain @ (covs[k + 1] - cov_ahead) @ gain.T
    return np.array(states)[np.searchsorted(grid, at_s)]
