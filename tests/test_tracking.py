"""Tracks with numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stages.lib import tracking
from stages.lib.tracking import Detections, Tracking

CFG = Tracking(position_m=0.3, accel_mps2=2.0, gate_m=3.0, gap_s=1.0, min_hits=3)
TIMES_S = np.arange(0, 5, 0.1)


def straight(times_s: np.ndarray, begin: tuple[float, float], speed: tuple[float, float]) -> np.ndarray:
    return np.array(begin) + times_s[:, None] * speed


def associate(*paths: np.ndarray, num_points: tuple[int, ...] = (),
              long_m: np.ndarray | None = None) -> list[np.ndarray]:
    """Tracks through detections that stand in each sweep in the order of `paths`; NaN where one is not seen."""
    xy = np.stack(paths, 1)
    long_m = np.full(xy.shape[:2], 4.0) if long_m is None else long_m
    points = np.array(num_points or [20] * len(paths))
    seen = ~np.isnan(xy).any(-1)
    sweeps = [Detections(xy[s][seen[s]], long_m[s][seen[s]], points[seen[s]]) for s in range(len(TIMES_S))]
    return tracking.associate(TIMES_S, sweeps, CFG)


def test_one_thing_that_moves_evenly_is_one_track():
    tracks = associate(straight(TIMES_S, (0, 0), (10, 0)))
    assert len(tracks) == 1
    assert tracks[0].tolist() == [[sweep, 0] for sweep in range(50)]


def test_prediction_moves_by_speed_times_time_and_no_more_however_often_it_is_asked():
    state, cov = tracking.born(np.array([0.0, 0.0]), 0.3)
    state[1] = 10, 0
    for _ in range(10):
        state, cov = tracking.predict(state, cov, 0.1, 2.0)
    once, cov_once = tracking.predict(*_moving(10), 1.0, 2.0)
    np.testing.assert_allclose(state[0], [10, 0], atol=1e-9)
    np.testing.assert_allclose(state, once, atol=1e-9)
    np.testing.assert_allclose(cov, cov_once, atol=1e-9)


def _moving(speed_mps: float) -> tuple[np.ndarray, np.ndarray]:
    state, cov = tracking.born(np.array([0.0, 0.0]), 0.3)
    state[1, 0] = speed_mps
    return state, cov


def test_a_gap_as_long_as_allowed_is_bridged_and_a_longer_one_ends_the_track():
    path = straight(TIMES_S, (0, 0), (10, 0))
    path[20:29] = np.nan  # last seen at 1.9 s, again at 2.9 s
    assert [len(t) for t in associate(path)] == [41]
    path[29] = np.nan
    assert [len(t) for t in associate(path)] == [20, 20]


def test_the_path_through_a_gap_follows_the_motion():
    seen = np.r_[0:20, 29:50]
    path = straight(TIMES_S, (0, 0), (10, 2))
    states = tracking.smooth(TIMES_S[seen], path[seen], np.full(41, 0.1), 2.0, TIMES_S)
    np.testing.assert_allclose(states[:, 0], path, atol=0.02)
    np.testing.assert_allclose(states[20:29, 1], [[10, 2]] * 9, atol=0.05)


def test_smoothing_is_better_than_what_was_measured_and_better_than_filtering_alone():
    rng = np.random.default_rng(7)
    truth = straight(TIMES_S, (3, 4), (8, -3))
    measured = truth + rng.normal(0, 0.3, truth.shape)
    states = tracking.smooth(TIMES_S, measured, np.full(50, 0.3), 2.0, TIMES_S)
    state, cov = tracking.born(measured[0], 0.3)
    filtered = [state[0]]
    for xy in measured[1:]:
        state, cov = tracking.update(*tracking.predict(state, cov, 0.1, 2.0), xy, 0.3)
        filtered.append(state[0])
    raw, causal, smooth = (np.hypot(*(xy - truth).T).mean() for xy in (measured, np.array(filtered), states[:, 0]))
    assert smooth < 0.7 * causal < 0.7 * raw
    assert np.hypot(*(states[:, 1] - (8, -3)).T).mean() < 0.5


def test_two_that_cross_keep_their_tracks():
    one, other = straight(TIMES_S, (0, 0), (10, 4)), straight(TIMES_S, (0, 20), (10, -4))  # they meet at 2.5 s
    tracks = associate(one, other)
    assert [set(track[:, 1]) for track in tracks] == [{0}, {1}]
    assert [len(track) for track in tracks] == [50, 50]


def test_a_splinter_does_not_take_over_the_track_of_the_whole():
    whole = straight(TIMES_S, (0, 0), (8, 0))
    splinter = straight(TIMES_S, (1.5, 0), (8, 0))
    whole[20:, 0] += 1.2  # from here on the whole includes the splinter's place, and its middle moves there
    splinter[20:] = np.nan
    tracks = associate(whole, splinter, num_points=(100, 4))
    assert [len(track) for track in tracks] == [50, 20]


def test_tracks_of_few_detections_are_dropped_and_others_keep_their_first_ones():
    blink = np.full((50, 2), np.nan)
    blink[10:12] = 30, 30
    brief = np.full((50, 2), np.nan)
    brief[10:13] = 60, 60
    tracks = associate(blink, brief)
    assert [track.tolist() for track in tracks] == [[[10, 1], [11, 1], [12, 0]]]


def test_what_is_further_than_the_gate_is_another_thing():
    path = straight(TIMES_S, (0, 0), (0, 0))
    path[25:] += 3.5, 0
    assert [len(t) for t in associate(path)] == [25, 25]


def test_what_shows_more_of_itself_may_have_its_middle_further_away():
    front_then_side = straight(TIMES_S, (0, 0), (0, 0))
    front_then_side[25:] += 5.0, 0
    long_m = np.full((50, 1), 1.0)
    assert [len(t) for t in associate(front_then_side, long_m=long_m)] == [25, 25]
    long_m[25:] = 11.0
    assert [len(t) for t in associate(front_then_side, long_m=long_m)] == [50]


def test_nothing_is_extrapolated():
    with pytest.raises(ValueError, match=r"state wanted at 0.0..2.1 s, measured 0.0..2.0 s"):
        tracking.smooth(np.array([0.0, 1.0, 2.0]), np.zeros((3, 2)), np.full(3, 0.3), 2.0, np.array([0.0, 2.1]))


def test_sweeps_without_detections_are_no_tracks():
    nothing = Detections(np.zeros((0, 2)), np.zeros(0), np.zeros(0))
    assert tracking.associate(TIMES_S, [nothing] * 50, CFG) == []
