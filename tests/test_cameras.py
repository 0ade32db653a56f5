"""Lenses: what is saved is where a pinhole camera with the saved K sees it."""

import struct

import cv2
import numpy as np
import pytest

from stages.lib import cameras, images
from stages.lib.calibration import CameraModel
from stages.lib.cameras import Rectifier
from stages.lib.errors import DataError

K = np.array([[220.0, 0, 158.5], [0, 221.0, 91.0], [0, 0, 1]])
LENSES = {"plumb_bob": (-0.25, 0.06, 0.001, -0.0008, 0.002),
          "rational_polynomial": (0.3, -0.1, 0.0005, -0.0004, 0.01, 0.55, -0.05, 0.005),
          "equidistant": (0.02, -0.01, 0.004, -0.001)}
UV = np.array([[160.0, 90], [60, 40], [270, 140], [40, 150], [300, 25]])


def camera(model="plumb_bob", D=None):
    return CameraModel(model, 320, 180, K, np.array(LENSES[model] if D is None else D, float))


def dots(uv_px, width=320, height=180):
    """An image with a blurred dot at each place, to be found again to a hundredth of a pixel."""
    v, u = np.mgrid[:height, :width]
    grey = sum(200 * np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * 2.0**2)) for x, y in uv_px)
    return np.repeat(grey[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)


def find(pixels, uv_px, reach=8):
    found = []
    for x, y in np.round(uv_px).astype(int):
        v, u = np.mgrid[max(y - reach, 0):y + reach + 1, max(x - reach, 0):x + reach + 1]
        weight = pixels[v[:, 0][:, None].clip(max=pixels.shape[0] - 1), u[0].clip(max=pixels.shape[1] - 1), 0] / 1.0
        found.append([(weight * u).sum() / weight.sum(), (weight * v).sum() / weight.sum()])
    return np.array(found)


def points_seen_at(uv_px, depth_m=10.0):
    """Points that a pinhole camera with K sees at these pixels."""
    return np.c_[(uv_px - K[:2, 2]) / K[[0, 1], [0, 1]], np.ones(len(uv_px))] * depth_m


def test_a_point_one_metre_aside_at_ten_metres_is_a_tenth_of_the_focal_length_from_the_centre():
    uv, depth = cameras.project(np.array([[1.0, -1.0, 10.0], [0, 0, -2.0]]), K)
    np.testing.assert_allclose(uv[0], [158.5 + 22.0, 91.0 - 22.1])
    np.testing.assert_array_equal(depth, [10.0, -2.0])


@pytest.mark.parametrize("model", LENSES)
def test_a_point_seen_through_the_lens_lies_after_undistortion_where_the_saved_k_projects_it(model):
    xyz = points_seen_at(UV)
    raw_uv, _ = cameras.project(xyz, K, LENSES[model], model)
    inside = np.all((raw_uv > 8) & (raw_uv < [312, 172]), axis=1)
    assert inside.sum() >= 3
    assert np.abs(raw_uv - UV)[inside].max() > 3, "the lens must matter, or the test proves nothing"
    rectifier = Rectifier(camera(model), undistort=True, width_max_px=None)
    saved = rectifier.apply(dots(raw_uv))
    expected, _ = cameras.project(xyz, rectifier.K)
    assert np.abs(find(saved, expected) - expected)[inside].max() < 0.15
    assert rectifier.D.size == 0


def test_a_resized_image_shows_a_point_where_the_scaled_k_projects_it():
    rectifier = Rectifier(camera(D=()), undistort=True, width_max_px=160)
    expected, _ = cameras.project(points_seen_at(UV), rectifier.K)
    saved = rectifier.apply(dots(UV))
    assert saved.shape == (90, 160, 3)
    assert (rectifier.width_px, rectifier.height_px) == (160, 90)
    assert np.abs(find(saved, expected, reach=5) - expected).max() < 0.05


@pytest.mark.parametrize("width_px", [240, 160, 100, 80, 64], ids=[
    "straight", "half", "half, then straight", "half, then by areas", "by areas"])
def test_an_undistorted_image_of_any_smaller_width_shows_a_point_where_its_k_projects_it(width_px):
    xyz = points_seen_at(UV)
    raw_uv, _ = cameras.project(xyz, K, LENSES["plumb_bob"], "plumb_bob")
    rectifier = Rectifier(camera(), undistort=True, width_max_px=width_px)
    assert rectifier.halves == (80 <= width_px <= 160)
    jpeg = images.encode_jpeg(dots(raw_uv), 98)
    expected, _ = cameras.project(xyz, rectifier.K)
    for saved in (rectifier.apply(images.decode(jpeg, halved=rectifier.halves), rectifier.halves),
                  rectifier.apply(images.decode(jpeg))):
        assert saved.shape == (round(180 * width_px / 320), width_px, 3)
        assert np.abs(find(saved, expected, reach=round(8 * width_px / 320)) - expected).max() < 0.1


def test_stripes_too_narrow_for_a_quarter_of_the_size_become_grey_and_no_pattern():
    stripes = np.where(np.arange(320) % 4 < 2, 60, 196).astype(np.uint8)
    saved = Rectifier(camera(), undistort=True, width_max_px=80).apply(np.tile(stripes[None, :, None], (180, 1, 3)))
    assert np.abs(saved[8:-8, 8:-8].astype(int) - 128).max() < 40


def test_scaling_keeps_the_corners_of_the_image_in_its_corners():
    half = cameras.scaled(K, 0.5, 0.5)
    np.testing.assert_allclose(half @ [0, 0, 1], [79.0, 45.25, 1])  # (158.5 + 0.5) / 2 - 0.5, (91 + 0.5) / 2 - 0.5
    np.testing.assert_allclose([half[0, 0], half[1, 1]], [110.0, 110.5])


def test_an_image_is_never_scaled_up():
    rectifier = Rectifier(camera(D=()), undistort=True, width_max_px=1000)
    assert (rectifier.width_px, rectifier.changes) == (320, False)


@pytest.mark.parametrize(("model", "D", "undistort", "changes", "left"), [
    ("plumb_bob", (0, 0, 0, 0, 0), True, False, 0), ("plumb_bob", (), True, False, 0),
    ("plumb_bob", LENSES["plumb_bob"], True, True, 0), ("plumb_bob", LENSES["plumb_bob"], False, False, 5),
    ("equidistant", (0, 0, 0, 0), True, True, 0), ("equidistant", (0, 0, 0, 0), False, False, 4)])
def test_an_image_changes_only_where_a_lens_is_taken_out_and_a_fisheye_is_one_even_without_coefficients(
        model, D, undistort, changes, left):
    rectifier = Rectifier(camera(model, D), undistort, None)
    assert (rectifier.changes, rectifier.D.size) == (changes, left)
    np.testing.assert_array_equal(rectifier.K, K)
    pixels = dots(UV)
    assert np.array_equal(rectifier.apply(pixels), pixels) is not changes


def test_an_image_of_another_size_than_its_calibration_is_refused():
    with pytest.raises(DataError, match="the image is 100x50, its CameraInfo is for 320x180"):
        Rectifier(camera(), True, None).apply(np.zeros((50, 100, 3), np.uint8))


def test_unknown_lenses_are_refused():
    with pytest.raises(DataError, match="distortion model 'mirror' is not one of plumb_bob, rational_polynomial"):
        Rectifier(CameraModel("mirror", 320, 180, K, np.zeros(5)), True, None)
    with pytest.raises(DataError, match="3 distortion coefficients for plumb_bob, expected one of 0, 4, 5, 8, 12, 14"):
        Rectifier(camera(D=(1, 2, 3)), True, None)


class Raw:
    def __init__(self, encoding, pixels, step=None):
        self.encoding, (self.height, self.width) = encoding, pixels.shape[:2]
        rows = np.ascontiguousarray(pixels).reshape(self.height, -1)
        self.step = step or rows.shape[1]
        self.data = np.pad(rows, ((0, 0), (0, self.step - rows.shape[1]))).reshape(-1)


RGB = np.array([[[250, 10, 20], [30, 240, 40]], [[50, 60, 230], [70, 80, 90]]], np.uint8)


def test_raw_images_become_rgb_whatever_their_channel_order_and_row_padding():
    alpha = np.full((2, 2, 1), 7, np.uint8)
    for encoding, pixels in (("rgb8", RGB), ("bgr8", RGB[..., ::-1]), ("rgba8", np.dstack([RGB, alpha])),
                             ("bgra8", np.dstack([RGB[..., ::-1], alpha]))):
        np.testing.assert_array_equal(images.from_message(Raw(encoding, pixels, step=16)), RGB)
    np.testing.assert_array_equal(images.from_message(Raw("mono8", RGB[..., 0]))[..., 1], RGB[..., 0])


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_bayer_mosaic_of_one_colour_becomes_that_colour(pattern):
    colour = {"r": 200, "g": 100, "b": 50}
    tile = np.array([colour[c] for c in pattern], np.uint8).reshape(2, 2)
    pixels = images.from_message(Raw(f"bayer_{pattern}8", np.tile(tile, (8, 8))))
    np.testing.assert_array_equal(pixels[8, 8], [200, 100, 50])


@pytest.mark.parametrize("encoding", ["uyvy", "yuv422_yuy2"])
def test_yuv_grey_is_grey(encoding):
    luma, chroma = np.full((4, 4), 145, np.uint8), np.full((4, 4), 128, np.uint8)
    pair = (chroma, luma) if encoding == "uyvy" else (luma, chroma)
    expected = (145 - 16) * 255 / 219
    np.testing.assert_allclose(images.from_message(Raw(encoding, np.dstack(pair))), expected, atol=1)


def test_raw_images_that_do_not_fit_their_declaration_are_refused():
    short = Raw("rgb8", RGB)
    short.data = short.data[:-1]
    with pytest.raises(DataError, match="11 bytes, but 2x2 rgb8 with rows of 6 bytes was declared"):
        images.from_message(short)
    with pytest.raises(DataError, match="encoding 'mono12' is not one of rgb8, bgr8"):
        images.from_message(Raw("mono12", RGB))


def test_cut_off_and_foreign_image_files_are_refused():
    jpeg = images.encode_jpeg(dots(UV), 90)
    png = cv2.imencode(".png", dots(UV))[1].tobytes()
    np.testing.assert_array_equal(images.decode(png), dots(UV))
    for content, name in ((jpeg[:len(jpeg) // 2], "JPEG"), (png[:-30], "PNG"), (jpeg[:-2], "JPEG")):
        with pytest.raises(DataError, match=f"a damaged or cut-off {name} of {len(content)} bytes"):
            images.decode(content)
    with pytest.raises(DataError, match=r"begin with '00 00 00 01' \(format 'h264'\) are neither JPEG nor PNG"):
        images.decode(b"\0\0\0\1", "h264")
    with pytest.raises(DataError, match="0 bytes that begin with ''"):
        images.decode(b"")


def test_a_jpegs_size_is_read_off_its_header_and_only_where_it_has_an_end():
    jpeg = images.encode_jpeg(dots(UV), 90)
    progressive = cv2.imencode(".jpg", dots(UV), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    comment = jpeg[:2] + b"\xff\xfe\0\x07\xff\xc0\0\0\0" + jpeg[2:]
    for content in (jpeg, progressive, comment, jpeg[:2] + b"\xff" + jpeg[2:]):
        assert images.jpeg_size_px(memoryview(content)) == (320, 180)
        assert images.decode(content).shape == (180, 320, 3)
    for content in (jpeg[:-2], jpeg[:200], jpeg + bytes(3), jpeg[:100] + jpeg[-2:], jpeg[:3]):
        assert images.jpeg_size_px(memoryview(content)) is None


def test_an_exif_orientation_does_not_turn_the_image_as_its_intrinsics_would_not_follow():
    jpeg = images.encode_jpeg(dots(UV), 95)
    turned_right = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + turned_right + struct.pack(">I", 0)
    tagged = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR).shape == (320, 180, 3)
    np.testing.assert_array_equal(images.decode(tagged), images.decode(jpeg))


def test_drawn_points_are_red_near_and_blue_far_and_those_behind_or_outside_are_not_drawn():
    black = np.zeros((20, 40, 3), np.uint8)
    uv = np.array([[10.0, 10], [30, 10], [20, 5], [-5, 5], [39.9, 19.9]])
    drawn = images.draw_points(black, uv, np.array([1.0, 39, -1, 5, 5]), far_m=40)
    near, far = drawn[10, 10].astype(int), drawn[10, 30].astype(int)
    assert near[0] > near[2]
    assert far[2] > far[0]
    assert (drawn.any(axis=2)).sum() == 8, "two dots of 2 x 2 pixels"
