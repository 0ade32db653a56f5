"""Pictures of scenes with boxes: from above and through the cameras. Images are (H, W, 3) uint8 RGB.

Boxes are (M, 7 or more): x, y, z [m], length, width, height [m], yaw [rad], in the frame that the function names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from stages.lib import geometry

GREEN, ORANGE, BLUE = (70, 220, 110), (255, 150, 40), (90, 160, 255)
_PAPER, _GRID, _INK, _FAINT = (18, 22, 28), (48, 56, 66), (220, 226, 233), (120, 132, 145)
_NEAR_M = 0.3
# Corners 0 to 3 are the front face, 4 to 7 the rear one, each from left top over right top to left bottom.
_SIGNS = np.array([[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1], [-1, 1, 1], [-1, -1, 1], [-1, -1, -1], [-1, 1, -1]])
_EDGES = np.array([(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7),
                   (0, 2), (1, 3)])  # the last two cross the front face


@dataclass(frozen=True)
class Layer:
    """Boxes of one kind, in one colour."""

    boxes: np.ndarray
    colour: tuple[int, int, int]


def corners(boxes: np.ndarray) -> np.ndarray:
    """(M, 8, 3) corners [m], in the frame of the boxes: front face, then rear face."""
    local = _SIGNS * boxes[:, None, 3:6] / 2
    cos, sin = np.cos(boxes[:, 6])[:, None], np.sin(boxes[:, 6])[:, None]
    turned = np.stack([local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos,
                       local[..., 2]], -1)
    return turned + boxes[:, None, :3]


def from_above(points_ego: np.ndarray, layers: Sequence[Layer], range_m: float, size_px: int = 720) -> np.ndarray:
    """The car's surroundings from above, ego at the centre, forward up, a ring every 10 m; boxes with their noses.

    points_ego (N, 3 or more) [m]; boxes of the layers in the ego frame.
    """
    scale = size_px / 2 / range_m

    def px(xy_m: np.ndarray) -> np.ndarray:
        return np.stack([size_px / 2 - xy_m[..., 1] * scale, size_px / 2 - xy_m[..., 0] * scale], -1)

    image = np.full((size_px, size_px, 3), _PAPER, np.uint8)
    for ring_m in range(10, int(range_m) + 1, 10):
        cv2.circle(image, (size_px // 2, size_px // 2), round(ring_m * scale), _GRID, 1, cv2.LINE_AA)
        _write(image, f"{ring_m} m", (size_px // 2 + 4, round(size_px / 2 - ring_m * scale) + 12), _FAINT)
    at = np.floor(px(points_ego[:, :2])).astype(int)
    inside = ((at >= 0) & (at < size_px)).all(1)
    height = np.clip((points_ego[inside, 2] + 0.3) / 2.5, 0, 1)[:, None]
    order = np.argsort(height[:, 0], kind="stable")
    shade = np.array(_FAINT) * (1 - height) + np.array(_INK) * height
    image[at[inside][order, 1], at[inside][order, 0]] = shade[order].astype(np.uint8)
    _polyline(image, px(np.array([[2.5, 0], [-1, 0.9], [-1, -0.9]])), _INK, closed=True)
    for layer in layers:
        for outline in corners(layer.boxes)[:, [0, 1, 5, 4], :2]:
            _polyline(image, px(outline), layer.colour, closed=True)
            middle, front = outline.mean(0), outline[:2].mean(0)
            _polyline(image, px(np.stack([middle, front + (front - middle) / 2])), layer.colour, closed=False)
    return image


def through_camera(image: np.ndarray, K: np.ndarray, T_cam_boxes: np.ndarray, layers: Sequence[Layer],
                   width_px: int = 480) -> np.ndarray:
    """The image at width_px with boxes drawn in; a cross marks each box's front face.

    K (3, 3) [px] of the image as given; T_cam_boxes (4, 4) from the frame of the boxes to the optical camera frame.
    """
    scale = width_px / image.shape[1]
    drawn = cv2.resize(image, (width_px, round(image.shape[0] * scale)), interpolation=cv2.INTER_LINEAR)
    for layer in layers:
        xyz = geometry.apply(T_cam_boxes, corners(layer.boxes).reshape(-1, 3)).reshape(-1, 8, 3)
        for ends in xyz[:, _EDGES].reshape(-1, 2, 3):
            if (ends[:, 2] < _NEAR_M).all():
                continue
            uv = _clip_near(ends) @ K.T
            _polyline(drawn, (uv[:, :2] / uv[:, 2:] + 0.5) * scale - 0.5, layer.colour, closed=False)
    return drawn


def side_by_side(images: Sequence[tuple[str, np.ndarray]], columns: int) -> np.ndarray:
    """Named images in rows of `columns`, each with its name in the corner; the gaps are dark."""
    height, width = max(i.shape[0] for _, i in images), max(i.shape[1] for _, i in images)
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, min(columns, len(images)) * width, 3), _PAPER, np.uint8)
    for index, (name, image) in enumerate(images):
        top, left = index // columns * height, index % columns * width
        sheet[top:top + image.shape[0], left:left + image.shape[1]] = image
        _write(sheet, name, (left + 6, top + 16), _INK)
    return sheet


def jpeg(image: np.ndarray, quality: int = 88) -> bytes:
    """The image's bytes as a JPEG file."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _clip_near(ends: np.ndarray) -> np.ndarray:
    """A segment (2, 3) cut at the near plane; at least one end lies beyond it."""
    behind = ends[:, 2] < _NEAR_M
    if not behind.any():
        return ends
    share = (_NEAR_M - ends[behind, 2]) / (ends[~behind, 2] - ends[behind, 2])
    cut = ends.copy()
    cut[behind] = ends[behind] + share[:, None] * (ends[~behind] - ends[behind])
    return cut


def _polyline(image: np.ndarray, uv_px: np.ndarray, colour: tuple[int, int, int], *, closed: bool) -> None:
    fixed = np.round(np.clip(uv_px, -1e4, 1e4) * 16).astype(np.int32)
    cv2.polylines(image, [fixed], closed, colour, 1, cv2.LINE_AA, shift=4)


def _write(image: np.ndarray, text: str, at_px: tuple[int, int], colour: tuple[int, int, int]) -> None:
    for ink, thickness in ((_PAPER, 3), (colour, 1)):
        cv2.putText(image, text, at_px, cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, thickness, cv2.LINE_AA)
