"""When, within a lidar's turn, each point was measured: read off the order of the points, for clouds without times."""

from __future__ import annotations

import numpy as np

NUM_BLOCKS = 48
MAX_TURN_ERROR = 0.1


def turn_fraction(xy_sensor: np.ndarray) -> np.ndarray:
    """Part of the turn (N,), -0.5 first to 0.5 last, at which each of points xy_sensor (N, 2), in order, was measured.

    Directions of NUM_BLOCKS blocks of neighbours must go round once, one way; any other order (by beam, say) tells
    nothing and gives zeros: all points count as measured in the middle of the turn.
    """
    edges = np.linspace(0, len(xy_sensor), NUM_BLOCKS + 1).astype(int)
    if len(xy_sensor) < 4 * NUM_BLOCKS:
        return np.zeros(len(xy_sensor))
    total = np.add.reduceat(xy_sensor, edges[:-1], axis=0)
    angle = np.unwrap(np.arctan2(total[:, 1], total[:, 0]))
    steps = np.diff(angle)
    turned = (angle[-1] - angle[0]) * NUM_BLOCKS / (NUM_BLOCKS - 1) / (2 * np.pi)
    if abs(abs(turned) - 1) > MAX_TURN_ERROR or not (np.sign(steps) == np.sign(turned)).all():
        return np.zeros(len(xy_sensor))
    fraction = (angle - (angle[0] + angle[-1]) / 2) / (2 * np.pi) * np.sign(turned)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    slope = (fraction[-1] - fraction[0]) / (middles[-1] - middles[0])
    at = np.concatenate([[0], middles, [len(xy_sensor) - 1]])
    begin, end = fraction[0] - slope * middles[0], fraction[-1] + slope * (at[-1] - middles[-1])
    known = np.concatenate([[begin], fraction, [end]])
    return np.clip(np.interp(np.arange(len(xy_sensor)), at, known), -0.5, 0.5)
