"""A contact sheet of a drive: four pictures and the way seen from above."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from stages.lib import images

TILE_PX = (320, 180)
MARGIN_PX = 14
JPEG_QUALITY = 85


def contact_sheet(pictures: Sequence[tuple[str, np.ndarray | None]], xy_m: np.ndarray) -> bytes:
    """JPEG: up to four captioned pictures (H, W, 3) uint8 RGB (None: a grey tile) at the left, two by two, and the way
    xy_m (N, 2), x to the right and y up, with a dot at its start and its extent in words."""
    width, height = TILE_PX
    sheet = np.full((2 * height, 3 * width, 3), 255, np.uint8)
    for number, (caption, pixels) in enumerate(pictures[:4]):
        top, left = height * (number // 2), width * (number % 2)
        sheet[top:top + height, left:left + width] = _tile(pixels)
        _write(sheet, caption, (left + 5, top + height - 7))
    sheet[:, 2 * width:] = _way(xy_m, (width, 2 * height))
    return images.encode_jpeg(sheet, JPEG_QUALITY)


def _tile(pixels: np.ndarray | None) -> np.ndarray:
    width, height = TILE_PX
    tile = np.full((height, width, 3), 90, np.uint8)
    if pixels is not None:
        scale = min(width / pixels.shape[1], height / pixels.shape[0])
        small = cv2.resize(pixels, (max(1, int(pixels.shape[1] * scale)), max(1, int(pixels.shape[0] * scale))),
                           interpolation=cv2.INTER_AREA)
        top, left = (height - small.shape[0]) // 2, (width - small.shape[1]) // 2
        tile[top:top + small.shape[0], left:left + small.shape[1]] = small
    return tile


def _way(xy_m: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    width, height = size_px
    panel = np.full((height, width, 3), 248, np.uint8)
    if not len(xy_m):
        _write(panel, "no ego pose", (MARGIN_PX, height // 2))
        return panel
    low_m, extent_m = xy_m.min(0), np.ptp(xy_m, axis=0)
    scale = min((width - 2 * MARGIN_PX) / max(extent_m[0], 1), (height - 4 * MARGIN_PX) / max(extent_m[1], 1))
    px = np.array([width, height]) / 2 + (xy_m - low_m - extent_m / 2) * scale * (1, -1)
    points = np.rint(px).astype(np.int32)
    cv2.polylines(panel, [points], False, (59, 117, 175), 2)
    cv2.circle(panel, (int(points[0, 0]), int(points[0, 1])), 5, (209, 96, 94), -1)
    _write(panel, f"{extent_m[0]:.0f} x {extent_m[1]:.0f} m, starts at the dot", (MARGIN_PX, height - 7))
    return panel


def _write(canvas: np.ndarray, text: str, at_px: tuple[int, int]) -> None:
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(canvas, text, at_px, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, thickness, cv2.LINE_8)
