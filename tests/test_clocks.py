"""Stamps: twins, steps back, missing frames, silences, clocks that disagree; and chains of frames."""

from __future__ import annotations

import numpy as np
import pytest

from stages.lib import clocks, geometry
from stages.lib.errors import DataError
from stages.lib.frames import Frames
from tests.tinybags import tf

QUARTER_LEFT = (np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5))
NO_TURN = (1.0, 0.0, 0.0, 0.0)

CASES = {  # stamps -> which stay, duplicates, backward
    "all good": ([1, 2, 3], [1, 1, 1], 0, 0),
    "a twin: the first stays": ([1, 2, 2, 3], [1, 1, 0, 1], 1, 0),
    "a step back costs the fewer": ([1, 2, 3, 2, 4], [1, 1, 1, 0, 1], 1, 0),
    "one stamp far ahead costs itself": ([1, 99, 2, 3, 4], [1, 0, 1, 1, 1], 0, 1),
    "one stamp far behind costs itself": ([5, 6, 1, 7], [1, 1, 0, 1], 0, 1),
    "a clock set back by 2": ([10, 20, 30, 15, 25, 35, 45], [1, 0, 0, 1, 1, 1, 1], 0, 2),
    "nothing": ([], [], 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_kept_stamps_increase_and_the_fewest_are_lost(case):
    stamps, keep, num_duplicate, num_backward = CASES[case]
    kept = clocks.increasing(np.array(stamps, np.int64))
    assert kept.keep.tolist() == [bool(k) for k in keep]
    assert (kept.num_duplicate, kept.num_backward) == (num_duplicate, num_backward)


def test_kept_stamps_are_as_many_as_the_longest_increasing_run_can_have():
    dice = np.random.default_rng(0)
    for _ in range(50):
        stamps = dice.permutation(8)
        best = max(bin(mask).count("1") for mask in range(1, 256)
                   if np.all(np.diff(stamps[[k for k in range(8) if mask >> k & 1]]) > 0))
        kept = clocks.increasing(stamps.astype(np.int64))
        assert kept.keep.sum() == best
        assert np.all(np.diff(stamps[kept.keep]) > 0)


def test_dropped_messages_are_counted_by_the_nominal_rate():
    at_10_hz = np.array([0, 100, 205, 500, 600]) * 1000  # 300 and 400 are missing
    assert clocks.num_dropped(at_10_hz, 10.0) == 2
    assert clocks.rate_hz(at_10_hz) == pytest.approx(1e6 / 102_500, rel=0.03)
    assert clocks.silences(at_10_hz, 250_000) == [(205_000, 500_000)]
    assert clocks.silences(at_10_hz, 295_000) == []


def test_an_offset_is_wanted_only_where_pose_and_sensors_never_meet():
    assert clocks.offsets_to_cover((0, 100), (100, 200)) is None
    assert clocks.offsets_to_cover((64_000, 70_000), (0, 4_000)) == (-66_000, -64_000)
    assert clocks.offsets_to_cover((0, 1_000), (5_000, 9_000)) == (5_000, 8_000)


def test_a_chain_is_pieced_together_from_several_messages_in_any_order():
    """Sensor at (1, 0, 0) of a bracket that sits at (0, 2, 0) of base_link, turned left by 90 degrees."""
    frames = Frames()
    frames.add_message(tf([("bracket", "lidar", (1, 0, 0), NO_TURN)]))
    frames.add_message(tf([("/base_link", "/bracket", (0, 2, 0), QUARTER_LEFT)]))
    assert frames.T("base_link", "lidar")[:3, 3] == pytest.approx([0, 3, 0])
    assert geometry.apply(frames.T("lidar", "base_link"), np.array([[0.0, 3, 0]])) == pytest.approx(np.zeros((1, 3)))


def test_siblings_are_joined_through_their_common_parent():
    frames = Frames()
    frames.add_message(tf([("roof", "a", (1, 0, 0), NO_TURN), ("roof", "b", (0, 0, 2), NO_TURN)]))
    assert frames.T("a", "b")[:3, 3] == pytest.approx([-1, 0, 2])
    assert frames.T("a", "elsewhere") is None
    assert frames.T("elsewhere", "elsewhere") == pytest.approx(np.eye(4))


def test_a_frame_that_comes_again_is_replaced_and_counted_if_it_moved():
    frames = Frames()
    for x in (1, 1, 2):
        frames.add_message(tf([("base_link", "lidar", (x, 0, 0), NO_TURN)]))
    assert frames.T("base_link", "lidar")[0, 3] == 2
    assert frames.num_replaced == 1


def test_frames_that_go_round_and_rotations_that_are_none_are_errors():
    frames = Frames()
    frames.add_message(tf([("a", "b", (0, 0, 0), NO_TURN), ("b", "a", (0, 0, 0), NO_TURN)]))
    with pytest.raises(DataError, match=r"/tf_static: the frames a, b go round in a circle; .*mounts"):
        frames.T("a", "elsewhere")
    with pytest.raises(DataError, match=r"a -> b has the rotation \(w x y z\) \[0.0, 0.0, 0.0, 0.0\], expected a unit"):
        frames.add_message(tf([("a", "b", (0, 0, 0), (0, 0, 0, 0))]))


def test_a_missing_link_is_named_with_the_knob_that_states_it():
    frames = Frames()
    frames.add_message(tf([("base_link", "lidar", (0, 0, 0), NO_TURN)]))
    with pytest.raises(DataError) as caught:
        frames.T_ego("base_link", "/gps", "/fix", "drive_7")
    assert str(caught.value) == ("drive_7: no transform joins base_link and 'gps', the frame of /fix; "
                                 "frames: base_link, lidar\n"
                                 "  state T_ego_gps in conf/rig: mounts.gps, or correct ego_frame there")
