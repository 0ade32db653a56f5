"""Cameras: projection through a lens, and images freed from it with the intrinsics following.

Pixel centres are at integer coordinates, as in OpenCV and ROS. Models are named as in sensor_msgs/CameraInfo.
"""

from __future__ import annotations

from functools import cached_property

import cv2
import numpy as np

from stages.lib.calibration import CameraModel
from stages.lib.errors import DataError
from stages.lib.images import MAX_PIXELS

POLYNOMIAL, FISHEYE = ("plumb_bob", "rational_polynomial"), "equidistant"
NUM_COEFFICIENTS = {**dict.fromkeys(POLYNOMIAL, (0, 4, 5, 8, 12, 14)), FISHEYE: (4,)}


def project(xyz_cam: np.ndarray, K: np.ndarray, D: np.ndarray | tuple = (), model: str = "plumb_bob"
            ) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2) and depth (N,) [m] of points xyz_cam (N, 3) [m]; pixels mean nothing where depth <= 0.

    K (3, 3) [px]; D (n,) in OpenCV's order, empty for an undistorted image.
    """
    xyz_cam = np.asarray(xyz_cam, float)
    depth = xyz_cam[:, 2]
    if not len(D) or not len(xyz_cam):
        uvw = xyz_cam @ np.asarray(K, float).T
        with np.errstate(divide="ignore", invalid="ignore"):
            return uvw[:, :2] / uvw[:, 2:], depth
    lens = cv2.fisheye.projectPoints if model == FISHEYE else cv2.projectPoints
    zero = np.zeros(3)
    uv, _ = lens(xyz_cam[:, None], zero, zero, np.asarray(K, float), np.asarray(D, float))
    return uv[:, 0], depth


class Rectifier:
    """What a camera's images become when they are saved, and the calibration that then holds.

    K (3, 3) [px], D (n,) of the saved image (empty: no distortion left), width_px, height_px
    changes  False where every saved image equals the recorded one
    halves   whether the saved image is made of a recorded one decoded to half its size: where it is half to a quarter
             as large; smaller ones would lose by it

    undistort  takes the lens distortion out, keeping K
    width_max_px  wider images are scaled down to this width, the height in proportion and K with them; None: never
    Raises DataError for a distortion that is not known.
    """

    def __init__(self, camera: CameraModel, undistort: bool, width_max_px: int | None) -> None:
        _check(camera)
        is_distorted = camera.model == FISHEYE or bool(np.any(camera.D))
        self._camera = camera
        self._undistorts = undistort and is_distorted
        scale = min(1.0, (width_max_px or camera.width_px) / camera.width_px)
        self.width_px, self.height_px = round(camera.width_px * scale), max(1, round(camera.height_px * scale))
        self.D = camera.D.copy() if is_distorted and not undistort else np.zeros(0)
        self.K = scaled(camera.K, self.width_px / camera.width_px, self.height_px / camera.height_px)
        self.changes = self._undistorts or self.width_px != camera.width_px
        self.halves = all(whole % 2 == 0 and 2 * saved <= whole <= 4 * saved for whole, saved in (
            (camera.width_px, self.width_px), (camera.height_px, self.height_px)))
        self._source_px = (camera.width_px // 2, camera.height_px // 2) if self.halves else (
            camera.width_px, camera.height_px)

    def check(self, size_px: tuple[int, int]) -> None:
        """Raises DataError where the recorded image, (width, height), has not the size that the calibration is for."""
        if tuple(size_px) != (self._camera.width_px, self._camera.height_px):
            raise DataError(f"the image is {size_px[0]}x{size_px[1]}, its CameraInfo is for "
                            f"{self._camera.width_px}x{self._camera.height_px}")

    def apply(self, pixels: np.ndarray, halved: bool = False) -> np.ndarray:
        """The image to be saved, (height_px, width_px, 3) uint8, of a recorded one (H, W, 3) uint8.

        halved  it was decoded to half its size, and `check` has seen the whole one's
        One that `halves` allows is halved first. Undistortion goes straight to the saved size where that is more than
        half of what is left: bilinear interpolation passes over no pixel. Else means over areas follow.
        Raises DataError as `check` does.
        """
        if not halved:
            self.check(pixels.shape[1::-1])
            if self.halves:
                pixels = cv2.resize(pixels, self._source_px, interpolation=cv2.INTER_AREA)
        if self._undistorts:
            pixels = cv2.remap(pixels, *self._maps, cv2.INTER_LINEAR)
        if pixels.shape[1::-1] != (self.width_px, self.height_px):
            pixels = cv2.resize(pixels, (self.width_px, self.height_px), interpolation=cv2.INTER_AREA)
        return pixels

    @cached_property
    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each pixel of the undistorted image comes from, in cv2.remap's fixed-point form (1/32 px)."""
        camera, source_px, saved_px = self._camera, self._source_px, (self.width_px, self.height_px)
        lens = cv2.fisheye if camera.model == FISHEYE else cv2
        K_source = scaled(camera.K, source_px[0] / camera.width_px, source_px[1] / camera.height_px)
        straight = all(source < 2 * saved for source, saved in zip(source_px, saved_px))
        K_to, to_px = (self.K, saved_px) if straight else (K_source, source_px)
        return lens.initUndistortRectifyMap(K_source, camera.D, np.eye(3), K_to, to_px, cv2.CV_16SC2)


def scaled(K: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    """K (3, 3) [px] of the image resized by these factors: image edges stay edges, so pixel centres shift by half."""
    S = np.array([[scale_x, 0, scale_x / 2 - 0.5], [0, scale_y, scale_y / 2 - 0.5], [0, 0, 1]])
    return S @ K


def _check(camera: CameraModel) -> None:
    if not 0 < camera.width_px * camera.height_px <= MAX_PIXELS:
        raise DataError(f"the camera's images are {camera.width_px}x{camera.height_px}, expected 1 to {MAX_PIXELS} "
                        "pixels")
    if camera.model not in NUM_COEFFICIENTS:
        raise DataError(f"distortion model {camera.model!r} is not one of {', '.join(NUM_COEFFICIENTS)}")
    if len(camera.D) not in NUM_COEFFICIENTS[camera.model]:
        raise DataError(f"{len(camera.D)} distortion coefficients for {camera.model}, expected one of "
                        f"{', '.join(map(str, NUM_COEFFICIENTS[camera.model]))}")
