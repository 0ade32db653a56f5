"""Choosing key frames and sweeps among asynchronous frames; stamps in ms here, made µs by `us`."""

import numpy as np
import pytest

from stages.lib import keyframes


def us(*stamps_ms):
    return np.array(stamps_ms, np.int64) * 1000


def steady(rate_hz, seconds=20.0, phase_ms=0.0, jitter_ms=0.0, seed=0):
    stamps_ms = phase_ms + np.arange(int(rate_hz * seconds)) * 1000 / rate_hz
    jitter = np.random.default_rng(seed).uniform(-jitter_ms, jitter_ms, len(stamps_ms))
    return np.round(1000 * (stamps_ms + jitter)).astype(int)


def choose(stamps_us, hz, required=None, periods=0.75):
    tolerance = {channel: periods * np.median(np.diff(own)) for channel, own in stamps_us.items()}
    return keyframes.choose(stamps_us, "lidar", stamps_us if required is None else required, 1e6 / hz, tolerance)


@pytest.mark.parametrize(("lidar_hz", "camera_hz", "hz", "num"), [
    (10, 5, 2, 40), (10, 30, 10, 200), (20, 12, 2, 40), (10, 5, 5, 100), (9.97, 15, 3, 60), (30, 30, 30, 600)])
def test_a_scene_of_twenty_seconds_has_twenty_times_the_rate(lidar_hz, camera_hz, hz, num):
    stamps = {"lidar": steady(lidar_hz, jitter_ms=3, seed=1),
              "camera": steady(camera_hz, phase_ms=1, jitter_ms=2, seed=2)}
    chosen = choose(stamps, hz)
    assert abs(len(chosen.rows) - num) <= 1
    assert chosen.num_lost == 0
    for channel in stamps:
        numbers = [row[channel] for row in chosen.rows]
        assert (np.diff(numbers) > 0).all(), "a frame belongs to one key frame at most"
    at = stamps["lidar"][[row["lidar"] for row in chosen.rows]]
    turns = (at - at[0]) / 1e6 * hz
    assert np.abs(turns - np.round(turns)).max() <= (0.5 / lidar_hz + 0.006) * hz, "each is the nearest to its due time"


def test_key_frames_do_not_drift_when_the_rates_do_not_divide():
    chosen = choose({"lidar": us(*range(0, 2000, 100))}, 3)
    assert [100 * row["lidar"] for row in chosen.rows] == [0, 300, 700, 1000, 1300, 1700]


def test_the_first_complete_frame_begins():
    chosen = choose({"lidar": us(0, 100, 200, 300, 400, 500), "camera": us(190, 290, 390, 490)}, 5)
    assert [row["lidar"] for row in chosen.rows] == [2, 4]
    assert (chosen.num_lost, dict(chosen.missing)) == (1, {"camera": 2})


def test_one_frame_is_not_taken_twice():
    """Lidar 0 and 100 both have camera 60 as their nearest; the second one gets 140."""
    stamps = {"lidar": us(0, 100), "camera": us(60, 140)}
    chosen = keyframes.choose(stamps, "lidar", ["camera"], 1e5, {"camera": 75_000})
    assert [dict(row) for row in chosen.rows] == [{"lidar": 0, "camera": 0}, {"lidar": 1, "camera": 1}]


def test_no_reference_frame_is_no_key_frame():
    assert keyframes.choose({"lidar": us(), "camera": us(1, 2)}, "lidar", [], 5e5, {"camera": 500}).rows == ()


def test_thinning_keeps_the_frames_nearest_to_the_ticks():
    np.testing.assert_array_equal(us(*range(5, 1005, 100))[keyframes.thin(us(*range(5, 1005, 100)), 5000, 2.5)],
                                  us(5, 405, 805))
    assert keyframes.thin(us(1, 2, 3), 0, None).all()
    assert not keyframes.thin(us(1, 2, 3), 0, 0).any()
    assert keyframes.thin(us(1, 2, 3), 0, 5000).all()
    assert keyframes.thin(us(), 0, 2).shape == (0,)


def test_the_following_sample_is_at_or_after_the_stamp():
    np.testing.assert_array_equal(keyframes.following(us(10, 20), us(5, 10, 11, 20, 21)), [0, 0, 1, 1, 1])
