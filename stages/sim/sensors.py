"""The simulated vehicle: where its sensors sit, how they see, and when they fire."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from stages.lib import geometry

WHEELBASE_M = 2.75
CAMERA_HZ = 5
LIDAR_HZ = 10
ODOMETRY_HZ = 50
VELOCITY_HZ = 40
STEERING_HZ = 40
OPTICAL_FROM_BODY = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])


@dataclass(frozen=True)
class Spec:
    """How finely the sensors see."""

    width_px: int = 320
    height_px: int = 180
    num_beams: int = 32
    num_azimuths: int = 720


@dataclass(frozen=True)
class Camera:
    """A camera on the sensor kit.

    position_m  in the kit's frame
    angles_deg  yaw to the left, pitch down, roll
    focal       focal length over image width; centre: principal point over image size
    phase_us    its first exposure after the drive's start
    """

    position_m: tuple[float, float, float]
    angles_deg: tuple[float, float, float]
    focal: float
    centre: tuple[float, float]
    distortion: tuple[float, float, float, float, float]
    phase_us: int

    @property
    def T_kit_cam(self) -> np.ndarray:
        yaw, pitch, roll = self.angles_deg
        T = np.eye(4)
        T[:3, :3] = Rotation.from_euler("ZYX", (yaw, pitch, roll), degrees=True).as_matrix() @ OPTICAL_FROM_BODY.T
        T[:3, 3] = self.position_m
        return T

    def K(self, spec: Spec) -> np.ndarray:
        """Intrinsics (3, 3) [px]."""
        f, (u, v) = self.focal * spec.width_px, self.centre
        return np.array([[f, 0, u * spec.width_px], [0, 1.002 * f, v * spec.height_px], [0, 0, 1]])


CAMERAS = {
    "CAM_FRONT": Camera((0.80, 0.00, -0.10), (0.3, 1.0, 0.4), 0.68, (0.503, 0.492),
                        (-0.21, 0.052, 0.0006, -0.0004, 0.001), 112_000),
    "CAM_FRONT_LEFT": Camera((0.62, 0.52, -0.13), (55.2, 1.2, -0.5), 0.69, (0.496, 0.505),
                             (-0.23, 0.061, -0.0005, 0.0003, -0.002), 67_000),
    "CAM_FRONT_RIGHT": Camera((0.62, -0.51, -0.12), (-54.6, 0.8, 0.6), 0.685, (0.498, 0.497),
                              (-0.22, 0.055, 0.0004, 0.0006, 0.000), 151_000),
    "CAM_BACK": Camera((-1.20, 0.01, -0.08), (180.4, 1.5, 0.3), 0.60, (0.501, 0.503),
                       (-0.25, 0.070, 0.0003, -0.0005, -0.003), 9_000),
    "CAM_BACK_LEFT": Camera((0.10, 0.53, -0.11), (109.5, 1.1, -0.4), 0.69, (0.505, 0.498),
                            (-0.22, 0.058, -0.0006, -0.0003, 0.001), 38_000),
    "CAM_BACK_RIGHT": Camera((0.10, -0.52, -0.12), (-110.6, 0.9, 0.5), 0.685, (0.494, 0.501),
                             (-0.24, 0.064, 0.0005, 0.0004, -0.001), 183_000),
}

BASE_FRAME, KIT_FRAME, LIDAR_FRAME = "base_link", "sensor_kit", "lidar_top"
T_BASE_KIT = geometry.transform(np.array([0.90, 0.02, 1.62]), geometry.yaw_wxyz(0.01))
# x to the right, y forward. The kit and the lidar stand upright: the beams' cones stay upright with them.
T_KIT_LIDAR = geometry.transform(np.array([0.05, -0.02, 0.28]), geometry.yaw_wxyz(-np.pi / 2 + 0.015))
LIDAR_TURN_US = 1_000_000 // LIDAR_HZ
LIDAR_RANGE_M = 75.0


def camera_frame(channel: str) -> str:
    """The tf frame of a camera."""
    return f"{channel.lower()}_optical"


def T_base_sensor(channel: str) -> np.ndarray:
    """T_ego_sensor, (4, 4), of CAM_… or LIDAR_TOP."""
    return T_BASE_KIT @ (CAMERAS[channel].T_kit_cam if channel in CAMERAS else T_KIT_LIDAR)


def elevations_rad(spec: Spec) -> np.ndarray:
    """Beam elevations (num_beams,), from the lowest up; denser where the street is."""
    return np.radians(np.interp(np.linspace(0, 1, spec.num_beams), [0, 0.25, 0.85, 1], [-25.0, -12.0, 1.35, 8.0]))


def azimuths_rad(spec: Spec) -> np.ndarray:
    """Azimuths (num_azimuths,) in the lidar's frame in the order of firing: clockwise, seam behind the car."""
    return -np.pi / 2 - (np.arange(spec.num_azimuths) + 0.5) * 2 * np.pi / spec.num_azimuths
