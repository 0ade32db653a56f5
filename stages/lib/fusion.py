"""Ego motion from satellite positions and a gyroscope, for recordings without localization."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.lib.geometry import wrap_rad

ACCEL_DENSITY = 2.0**2  # (m/s2)^2 s: speed changes by some 2 m/s within 1 s
YAW_ACCEL_DENSITY = 0.3**2  # (rad/s2)^2 s
GRADE_DENSITY = 0.01**2  # 1/s: the road's grade changes by some 1 % within 1 s
GYRO_SIGMA_RADPS, BIAS_SIGMA_RADPS = 0.01, 0.002
CORRELATION_S = 1.0  # a receiver's errors within this time are one error
MIN_WAY_M = 2.0  # a shorter way shows no heading
STUDENT_DOF, NUM_REWEIGHTINGS = 3.0, 6
AXES = {"x": (0, 1), "y": (1, 1), "z": (2, 1), "-x": (0, -1), "-y": (1, -1), "-z": (2, -1)}


@dataclass(frozen=True)
class Fixes:
    """Positions of the antenna: stamps_us (N,) int64 strictly increasing; xyz_m (N, 3) on a grid, z up;
    sigma_m (N, 2): horizontal and vertical standard deviation."""

    stamps_us: np.ndarray
    xyz_m: np.ndarray
    sigma_m: np.ndarray


@dataclass(frozen=True)
class Turns:
    """Yaw rates about z up: stamps_us (M,) int64 strictly increasing, yaw_rate_radps (M,); empty without a gyro."""

    stamps_us: np.ndarray
    yaw_rate_radps: np.ndarray


@dataclass(frozen=True)
class Track:
    """The motion of the ego frame: stamps_us (N,) int64; xyz_m (N, 3); yaw_rad, pitch_rad, speed_mps,
    yaw_rate_radps (N,).

    Pitch is about +y, so that a climb is negative; roll is not observed and taken as 0.
    weights  (number of fixes,) 1 where a fix agrees with the others, towards 0 where it contradicts them
    """

    stamps_us: np.ndarray
    xyz_m: np.ndarray
    yaw_rad: np.ndarray
    pitch_rad: np.ndarray
    speed_mps: np.ndarray
    yaw_rate_radps: np.ndarray
    weights: np.ndarray


def yaw_axis(fixes: Fixes, imu_us: np.ndarray, gyro_radps: np.ndarray) -> str | None:
    """The gyro's axis and sign ("x" to "-z") that turns as the course over ground does; None where none does.

    gyro_radps (M, 3) at imu_us (M,), axes as the sensor has them. The course is that of chords of 1 s of at least 2 m;
    medians bear with chords that a bad fix spoils. An axis counts where it halves the course's spread.
    """
    ahead = np.searchsorted(fixes.stamps_us, fixes.stamps_us + 1_000_000)
    behind = np.flatnonzero(ahead < len(fixes.stamps_us))
    chord = fixes.xyz_m[ahead[behind], :2] - fixes.xyz_m[behind, :2]
    middle_us = (fixes.stamps_us[ahead[behind]] + fixes.stamps_us[behind]) // 2
    use = np.hypot(*chord.T) >= MIN_WAY_M
    if len(imu_us):
        use &= (middle_us >= imu_us[0]) & (middle_us <= imu_us[-1])
    if use.sum() < 3 or len(imu_us) < 2:
        return None
    course = np.unwrap(np.arctan2(chord[use, 1], chord[use, 0]))
    step_s = np.diff(imu_us) / 1e6
    turned = np.vstack([np.zeros(3), np.cumsum((gyro_radps[1:] + gyro_radps[:-1]) / 2 * step_s[:, None], axis=0)])
    since_us = (imu_us - imu_us[0]).astype(float)
    left = {name: _spread(course - sign * np.interp(middle_us[use] - imu_us[0], since_us, turned[:, axis]))
            for name, (axis, sign) in AXES.items()}
    name = min(left, key=left.__getitem__)
    return name if left[name] < 0.5 * _spread(course) else None


def fuse(fixes: Fixes, turns: Turns, antenna_m: np.ndarray) -> Track | None:
    """The smoothed motion over one unbroken run of fixes, at the stamps of fixes and gyro between first and last fix.

    antenna_m (3,): where the antenna is in the ego frame. The ego frame's origin moves along its x axis (its place is
    the rear axle). The car is taken to start forwards; None where it moves less than 2 m or three standard deviations,
    which shows no heading.
    Source: a constant turn rate and velocity model in an extended Kalman filter with Rauch-Tung-Striebel smoothing
    (Särkkä, Bayesian Filtering and Smoothing, 2013, algorithms 5.4 and 9.1); Student-t weights of the fixes by
    iterated reweighting, so that fixes which contradict the others (a clock that was set back) lose their say;
    height and grade likewise, over the way driven.
    """
    way_m = np.hypot(*(fixes.xyz_m[:, :2] - fixes.xyz_m[0, :2]).T)
    min_way_m = max(MIN_WAY_M, 3 * float(np.median(fixes.sigma_m[:, 0])))
    if way_m.max() < min_way_m:
        return None
    inside = (turns.stamps_us >= fixes.stamps_us[0]) & (turns.stamps_us <= fixes.stamps_us[-1])
    stamps_us = np.union1d(fixes.stamps_us, turns.stamps_us[inside])
    fix_at = np.searchsorted(stamps_us, fixes.stamps_us)
    turn_at = dict(zip(np.searchsorted(stamps_us, turns.stamps_us[inside]).tolist(), turns.yaw_rate_radps[inside]))
    dt_s = np.diff(stamps_us, prepend=stamps_us[0]) / 1e6
    rate_hz = 1e6 / np.median(np.diff(fixes.stamps_us))
    sigma_m = fixes.sigma_m * np.sqrt(max(1.0, CORRELATION_S * rate_hz))
    start = _start(fixes, int(np.argmax(way_m >= min_way_m)))
    xy_m = fixes.xyz_m[:, :2] - fixes.xyz_m[0, :2]
    weights = np.ones(len(xy_m))
    for _ in range(NUM_REWEIGHTINGS):
        seen = dict(zip(fix_at.tolist(), zip(xy_m, sigma_m[:, 0] / np.sqrt(weights))))
        plane = _plane(dt_s, start, seen, turn_at, antenna_m)
        antenna_xy_m = plane[fix_at, :2] + _turned(plane[fix_at, 2], antenna_m)
        miss = np.hypot(*(antenna_xy_m - xy_m).T) / fixes.sigma_m[:, 0]
        weights = (STUDENT_DOF + 2) / (STUDENT_DOF + np.maximum(miss**2, 2))
    x, y, yaw, speed, yaw_rate, _ = plane.T
    heights = dict(zip(fix_at.tolist(), zip(fixes.xyz_m[:, 2] - antenna_m[2], sigma_m[:, 1] / np.sqrt(weights))))
    height, grade = _height(dt_s, speed, heights, antenna_m[0]).T
    xyz_m = np.stack([x + fixes.xyz_m[0, 0], y + fixes.xyz_m[0, 1], height], -1)
    return Track(stamps_us, xyz_m, wrap_rad(yaw), -np.arctan(grade), speed, yaw_rate, weights)


def _start(fixes: Fixes, away: int) -> np.ndarray:
    """(6,) the first state: at the origin, heading for fix number `away`, at the median speed of all steps."""
    dx, dy, _ = fixes.xyz_m[away] - fixes.xyz_m[0]
    steps_m = np.hypot(*np.diff(fixes.xyz_m[:, :2], axis=0).T)
    return np.array([0, 0, np.arctan2(dy, dx), np.median(steps_m / (np.diff(fixes.stamps_us) / 1e6)), 0, 0])


def _plane(dt_s: np.ndarray, start: np.ndarray, seen: dict[int, tuple[np.ndarray, float]], turn_at: dict[int, float],
           antenna_m: np.ndarray) -> np.ndarray:
    """(N, 6) smoothed x, y, yaw, speed, yaw rate and gyro bias."""
    reach_m = 5 + np.hypot(*antenna_m[:2])
    m, P = start, np.diag([reach_m, reach_m, 0.5, 5.0, 0.3, BIAS_SIGMA_RADPS])**2
    gyro_row = np.array([[0, 0, 0, 0, 1.0, 1.0]])
    steps = []
    for k, dt in enumerate(dt_s):
        F, m_, Q = _ctrv(m, dt)
        P_ = F @ P @ F.T + Q
        m, P = m_, P_
        if k in seen:
            xy_m, sigma_m = seen[k]
            arm_x, arm_y = _turned(m[2], antenna_m)
            H = np.array([[1, 0, -arm_y, 0, 0, 0], [0, 1, arm_x, 0, 0, 0]])
            m, P = _update(m, P, H, xy_m - m[:2] - (arm_x, arm_y), np.eye(2) * sigma_m**2)
        if k in turn_at:
            m, P = _update(m, P, gyro_row, np.array([turn_at[k] - m[4] - m[5]]), np.array([[GYRO_SIGMA_RADPS**2]]))
        steps.append((m, P, F, m_, P_))
    return _smooth(steps)


def _ctrv(m: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Jacobian, predicted state, noise) over dt [s] of x, y, yaw, speed, yaw rate, bias: the chord of the arc."""
    _, _, yaw, speed, yaw_rate, _ = m
    c, s = np.cos(yaw + yaw_rate * dt / 2), np.sin(yaw + yaw_rate * dt / 2)
    F = np.eye(6)
    F[0, 2:5] = -speed * s * dt, c * dt, -speed * s * dt**2 / 2
    F[1, 2:5] = speed * c * dt, s * dt, speed * c * dt**2 / 2
    F[2, 4] = dt
    accel = np.array([c * dt / 2, s * dt / 2, 0, 1, 0, 0])
    yaw_accel = np.array([0, 0, dt / 2, 0, 1, 0])
    Q = dt * (ACCEL_DENSITY * np.outer(accel, accel) + YAW_ACCEL_DENSITY * np.outer(yaw_accel, yaw_accel))
    return F, m + np.array([speed * c * dt, speed * s * dt, yaw_rate * dt, 0, 0, 0]), Q


def _height(dt_s: np.ndarray, speed_mps: np.ndarray, seen: dict[int, tuple[float, float]], antenna_x_m: float
            ) -> np.ndarray:
    """(N, 2) smoothed height and grade (height over way) of the road."""
    z_m, sigma_m = seen[0]
    m, P = np.array([z_m, 0.0]), np.diag([sigma_m, 0.1])**2
    H = np.array([[1.0, antenna_x_m]])
    steps = []
    for k, dt in enumerate(dt_s):
        F = np.array([[1, speed_mps[k] * dt], [0, 1]])
        m_, P_ = F @ m, F @ P @ F.T + np.diag([1e-8, GRADE_DENSITY * dt])
        m, P = m_, P_
        if k in seen:
            z_m, sigma_m = seen[k]
            m, P = _update(m, P, H, z_m - H @ m, np.array([[sigma_m**2]]))
        steps.append((m, P, F, m_, P_))
    return _smooth(steps)


def _update(m: np.ndarray, P: np.ndarray, H: np.ndarray, miss: np.ndarray, R: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
    gain = np.linalg.solve(H @ P @ H.T + R, H @ P).T
    keep = np.eye(len(m)) - gain @ H
    return m + gain @ miss, keep @ P @ keep.T + gain @ R @ gain.T


def _smooth(steps: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """(N, n) Rauch-Tung-Striebel means of steps (mean, covariance, Jacobian into it, predicted mean, covariance)."""
    mean = steps[-1][0]
    smoothed = [mean]
    for (m, P, *_), (_, _, F, m_, P_) in zip(steps[-2::-1], steps[:0:-1]):
        mean = m + np.linalg.solve(P_, F @ P).T @ (mean - m_)
        smoothed.append(mean)
    return np.array(smoothed[::-1])


def _turned(yaw_rad: np.ndarray | float, arm_m: np.ndarray) -> np.ndarray:
    """(…, 2) the arm's horizontal part in the map frame."""
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return np.stack([c * arm_m[0] - s * arm_m[1], s * arm_m[0] + c * arm_m[1]], -1)


def _spread(values: np.ndarray) -> float:
    return float(np.median(np.abs(values - np.median(values))))
