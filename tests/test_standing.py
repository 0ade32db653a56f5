"""What stands and what passes, on points that can be placed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stages.lib import standing

TIMES_S = np.arange(0, 8, 0.1)
WINDOW_S = (0.8, 2.0)
PLACE = np.array([[20.1, 20.1], [20.1, 21.1], [21.1, 21.1]])


def shares(paths: list[np.ndarray]) -> np.ndarray:
    """Shares (S, P) of P points that are at paths[p] (S, 2), NaN where not seen."""
    xy = np.stack(paths, 1)
    seen = ~np.isnan(xy).any(-1)
    sweep = np.repeat(np.arange(len(TIMES_S)), seen.sum(1))
    result = np.full(seen.shape, np.nan)
    result[seen] = standing.shares(TIMES_S, sweep, xy[seen], WINDOW_S)
    return result


def test_what_stays_is_seen_again_and_what_passes_is_not():
    stays, passes = np.full((80, 2), 5.1), np.column_stack([10 * TIMES_S, np.full(80, 2.0)])
    share = shares([stays, passes])
    np.testing.assert_allclose(share[:, 0], 1)
    assert (share[:, 1] == 0).all()


def test_what_comes_into_sight_late_is_seen_again_from_then_on():
    late = np.full((80, 2), 5.1)
    late[:50] = np.nan
    assert (shares([late])[50:, 0] > 0.8).all()


def test_what_is_seen_every_third_time_has_a_share_of_a_third():
    seldom = np.full((80, 2), np.nan)
    seldom[::3] = 5.1
    assert shares([seldom, np.full((80, 2), 9.1)])[39, 0] == pytest.approx(1 / 3, abs=0.05)


def test_a_place_is_seen_again_in_a_neighbouring_cell():
    wobbles = np.column_stack([5.1 + 0.02 * (-1.0) ** np.arange(80), np.full(80, 5.2)])  # over a cell's edge
    np.testing.assert_allclose(shares([wobbles])[:, 0], 1)


def test_at_the_scenes_end_few_sweeps_do_not_count_as_many():
    ends = np.full((80, 2), np.nan)
    ends[[71, 79]] = 5.1  # of what follows the first, the scene has the sweep at 0.8 s alone
    assert shares([ends])[71, 0] == pytest.approx(1 / 6)  # half of the twelve that a whole window has


def stack(x: float, y: float, low_m: float, high_m: float) -> np.ndarray:
    """x, y, height (K, 3) of a column of points."""
    height = np.arange(low_m, high_m + 1e-9, 0.1)
    return np.column_stack([np.full(len(height), x), np.full(len(height), y), height])


def row_of(x_from: float, x_to: float, low_m: float, high_m: float, y: float = 0.05) -> np.ndarray:
    return np.vstack([stack(x, y, low_m, high_m) for x in np.arange(x_from, x_to, 0.1)])


def things(*parts: np.ndarray) -> tuple[list[set[int]], np.ndarray]:
    """Per part the numbers of the things its points are of, and the heights of all things."""
    xyh = np.vstack(parts)
    found = standing.things(xyh[:, :2], xyh[:, 2], 2.2, 0.3)
    return [set(one.tolist()) for one in np.split(found.of_point, np.cumsum([len(p) for p in parts])[:-1])], found.top_m


def test_things_with_half_a_metre_between_them_are_two():
    (car, bin_), top_m = things(row_of(0, 4, 0.3, 1.5), row_of(4.5, 5, 0.3, 1.1))
    assert len(car) == len(bin_) == 1
    assert car != bin_
    assert sorted(top_m.tolist()) == pytest.approx([1.1, 1.5])


def test_a_crown_ties_nothing_together_and_makes_nothing_tall():
    (car, trunk, crown), top_m = things(row_of(0, 4, 0.3, 1.5), stack(5.05, 0.05, 0.3, 2.4), row_of(3, 6, 2.2, 4))
    assert car != trunk
    assert top_m[car.pop()] == pytest.approx(1.5)
    assert -1 in crown


def test_a_roof_seen_from_above_only_gives_the_height():
    (car, _), top_m = things(row_of(0, 4, 0.3, 0.9), row_of(1, 3, 1.5, 1.5, y=0.25))
    assert top_m[car.pop()] == pytest.approx(1.5)


def test_a_wall_is_as_tall_as_it_is():
    (wall,), top_m = things(row_of(0, 4, 0.3, 4.0))
    assert top_m[wall.pop()] == pytest.approx(4.0)


def test_ground_seen_where_a_thing_was_means_that_it_only_stopped():
    ground = np.array([[x, y] for x in np.arange(-3, 3, 0.2) for y in np.arange(-2, 2, 0.2)])
    beside = ground[np.abs(ground[:, 1]) > 1.1]
    thing, size = (np.zeros(2), np.array([4.4, 1.8]), 0.0), np.arange(10, 30)
    stopped = standing.Free([beside if 10 <= sweep < 30 else ground for sweep in range(40)])
    assert stopped.share(*thing, size) == 1.0  # 20 sweeps saw the ground there, 20 the thing
    parked = standing.Free([beside] * 40)
    assert parked.share(*thing, np.arange(40)) == 0.0
    under = standing.Free([ground] * 40)  # rays pass under the car: ground is seen there, but so is the car
    assert under.share(*thing, np.arange(40)) == 0.0


def test_a_thin_thing_has_no_inside_where_ground_could_be_seen():
    free = standing.Free([np.zeros((1, 2))] * 4)
    assert free.share(np.zeros(2), np.array([4.0, 0.2]), 0.0, np.array([0])) == 0.0


def test_beside_is_within_the_distance():
    near = standing.beside(np.array([[0.25, 0.0], [0.4, 0.0], [9.0, 9.0]]), np.zeros((1, 2)), 0.3)
    assert near.tolist() == [True, False, False]
    assert standing.beside(np.zeros((2, 2)), np.zeros((0, 2)), 0.3).tolist() == [False, False]


def test_no_points_make_no_things():
    assert len(standing.shares(TIMES_S, np.zeros(0, int), np.zeros((0, 2)), WINDOW_S)) == 0
    assert len(standing.things(np.zeros((0, 2)), np.zeros(0), 2.2, 0.3).top_m) == 0
