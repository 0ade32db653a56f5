"""Clouds of any layout, and the motion of a turn."""

from types import SimpleNamespace

import numpy as np
import pytest

from stages.lib import geometry, pointcloud
from stages.lib.errors import DataError
from stages.lib.poses import Poses

KINDS = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 8}
HEADER_US = 1_700_000_000_000_000
XYZ = [("x", "f4", 0), ("y", "f4", 4), ("z", "f4", 8)]


def cloud(columns, fields, step, *, big=False, height=1, row_padding=0, counts=None):
    """A PointCloud2 message with fields (name, kind, offset) and the columns' values."""
    num = len(next(iter(columns.values())))
    order = ">" if big else "<"
    layout = np.dtype({"names": [f[0] for f in fields], "formats": [order + f[1] for f in fields],
                       "offsets": [f[2] for f in fields], "itemsize": step})
    rows = np.zeros(num, layout)
    for name, values in columns.items():
        rows[name] = values
    width = num // height
    data = np.frombuffer(rows.tobytes(), np.uint8).reshape(height, width * step)
    data = np.pad(data, ((0, 0), (0, row_padding)), constant_values=255)
    named = [SimpleNamespace(name=name, offset=offset, datatype=KINDS[kind], count=(counts or {}).get(name, 1))
             for name, kind, offset in fields]
    return SimpleNamespace(height=height, width=width, fields=named, is_bigendian=big, point_step=step,
                           row_step=width * step + row_padding, data=data.reshape(-1), is_dense=True)


BASE = {"x": [1.5, 2, 3, 4], "y": [0, -1, -2.25, -3], "z": [0.5, 0, 0, 0], "intensity": [10, 20, 30, 40],
        "ring": [0, 1, 2, 3]}
EXPECTED = np.array([BASE[name] for name in ("x", "y", "z", "intensity", "ring")], np.float32).T
LAYOUTS = {
    "18 bytes, packed": ([*XYZ, ("intensity", "f4", 12), ("ring", "u2", 16)], 18, {}),
    "pcl's 32 bytes": ([*XYZ, ("intensity", "f4", 16), ("ring", "u2", 20)], 32, {}),
    "doubles, reversed": ([("ring", "u4", 0), ("intensity", "u1", 4), ("z", "f8", 8), ("y", "f8", 16), ("x", "f8", 24)],
                          40, {}),
    "big-endian": ([*XYZ, ("intensity", "u2", 12), ("ring", "i2", 14)], 16, {"big": True}),
    "organised, padded rows": ([*XYZ, ("intensity", "f4", 12), ("ring", "u1", 16)], 17,
                               {"height": 2, "row_padding": 5}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_rows_in_the_messages_order(layout):
    fields, step, how = LAYOUTS[layout]
    decoded = pointcloud.decode(cloud(BASE, fields, step, **how), HEADER_US)
    assert decoded.points.dtype == np.float32
    np.testing.assert_array_equal(decoded.points, EXPECTED)
    assert (decoded.missing, decoded.num_dropped) == (("time",), 0)


def test_intensity_and_ring_have_second_names():
    columns = {"x": BASE["x"], "y": BASE["y"], "z": BASE["z"], "i": BASE["intensity"], "channel": BASE["ring"]}
    decoded = pointcloud.decode(cloud(columns, [*XYZ, ("i", "u1", 12), ("channel", "u1", 13)], 14), HEADER_US)
    np.testing.assert_array_equal(decoded.points, EXPECTED)


def test_what_is_missing_is_zero_and_named():
    decoded = pointcloud.decode(cloud({k: BASE[k] for k in "xyz"}, XYZ, 12), HEADER_US)
    np.testing.assert_array_equal(decoded.points[:, 3:], 0)
    assert decoded.missing == ("intensity", "ring", "time")


def test_rows_that_are_not_finite_or_no_return_are_left_out_and_counted():
    columns = {"x": [np.nan, 1, 0, 2, 3], "y": [0, np.inf, 0, 0, 0], "z": [0.0] * 5, "intensity": [1, 2, 3, np.nan, 5]}
    decoded = pointcloud.decode(cloud(columns, [*XYZ, ("intensity", "f4", 12)], 16), HEADER_US)
    np.testing.assert_array_equal(decoded.points, [[3, 0, 0, 5, 0]])
    assert decoded.num_dropped == 4


def test_an_empty_cloud_is_no_points():
    decoded = pointcloud.decode(cloud({k: [] for k in "xyz"}, XYZ, 12), HEADER_US)
    assert decoded.points.shape == (0, 5)


@pytest.mark.parametrize(("kind", "values"), [
    ("u4", [0, 50_000_000, 99_000_000, 25_000_000]),                                    # ns after the stamp
    ("f4", [0, 0.05, 0.099, 0.025]),                                                    # s after the stamp
    ("f8", 1_700_000_000 + np.array([0, 0.05, 0.099, 0.025])),                          # s since the epoch
    ("f8", 1e15 * 1.7 + np.array([0, 50_000, 99_000, 25_000])),                         # us since the epoch
    ("f8", 1e18 * 1.7 + np.array([0, 50_000_000, 99_000_000, 25_000_000]))])            # ns since the epoch
@pytest.mark.parametrize("name", pointcloud.TIMES)
def test_point_times_are_microseconds_after_the_stamp_in_any_unit(name, kind, values):
    message = cloud({**{k: BASE[k] for k in "xyz"}, name: values}, [*XYZ, (name, kind, 16)], 24)
    decoded = pointcloud.decode(message, HEADER_US)
    np.testing.assert_allclose(decoded.after_us, [0, 50_000, 99_000, 25_000], atol=0.3)
    assert "time" not in decoded.missing


def test_times_that_are_all_equal_say_nothing():
    message = cloud({**{k: BASE[k] for k in "xyz"}, "t": [0, 0, 0, 0]}, [*XYZ, ("t", "u4", 12)], 16)
    assert pointcloud.decode(message, HEADER_US).after_us is None


def test_point_times_stay_with_their_points_when_rows_are_left_out():
    columns = {"x": [1, np.nan, 3, 4], "y": [1] * 4, "z": [0] * 4, "t": [0, 1000, 2000, 3000]}
    decoded = pointcloud.decode(cloud(columns, [*XYZ, ("t", "u4", 12)], 16), HEADER_US)
    np.testing.assert_array_equal(decoded.after_us, [0, 2, 3])


def broken(**changes):
    message = cloud(BASE, LAYOUTS["18 bytes, packed"][0], 18, height=2)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(("message", "text"), [
    (broken(data=np.zeros(71, np.uint8)), r"71 bytes, but declares 2 x 2 points of 18 bytes \(row_step 36\)"),
    (broken(data=np.zeros(73, np.uint8)), "73 bytes, but declares 2 x 2 points"),
    (broken(row_step=20), r"72 bytes, but declares 2 x 2 points of 18 bytes \(row_step 20\)"),
    (broken(width=3), "72 bytes, but declares 2 x 3 points"),
    (broken(point_step=17), "field ring of the cloud ends behind point_step, 17 bytes"),
    (broken(fields=[SimpleNamespace(name="x", offset=0, datatype=9, count=1)]), "field x of the cloud has datatype 9"),
    (broken(fields=[SimpleNamespace(name="range", offset=0, datatype=7, count=1)]), "no field x, only range"),
])
def test_a_cloud_that_is_not_as_declared_is_refused(message, text):
    with pytest.raises(DataError, match=text):
        pointcloud.decode(message, HEADER_US)


def test_a_single_rows_row_step_does_not_matter():
    message = cloud(BASE, LAYOUTS["18 bytes, packed"][0], 18)
    message.row_step = 18
    np.testing.assert_array_equal(pointcloud.decode(message, HEADER_US).points, EXPECTED)


def test_a_single_row_with_bytes_left_over_is_refused():
    message = cloud(BASE, LAYOUTS["18 bytes, packed"][0], 18)
    message.data = np.append(message.data, np.uint8(0))
    with pytest.raises(DataError, match="73 bytes, but declares 1 x 4 points of 18 bytes"):
        pointcloud.decode(message, HEADER_US)


def test_a_field_of_several_values_is_skipped():
    message = cloud({k: BASE[k] for k in "xyz"}, [*XYZ, ("rgb", "u1", 12)], 16, counts={"rgb": 3})
    assert pointcloud.decode(message, HEADER_US).points[0, 0] == 1.5


# motion -----------------------------------------------------------------------------------------------------------

STAMPS_US = HEADER_US + np.arange(0, 400_001, 20_000)


def drive(speed_mps=0.0, yaw_rate_radps=0.0):
    time_s = (STAMPS_US - STAMPS_US[0]) * 1e-6
    xyz = np.stack([1000 + speed_mps * time_s, 0 * time_s, 0 * time_s], -1)
    return Poses(STAMPS_US, xyz, geometry.yaw_wxyz(yaw_rate_radps * time_s))


def test_a_wall_ahead_is_where_a_standing_sensor_sees_it_although_the_car_drove_towards_it():
    reference_us, since_us = HEADER_US + 200_000, np.array([-50_000.0, 0, 50_000])
    measured = np.array([[20.5, 0, 0], [20.0, 0, 0], [19.5, 0, 0]])  # at 10 m/s
    xyz = pointcloud.compensate(measured, since_us, reference_us, drive(speed_mps=10), T_ego_sensor=np.eye(4))
    np.testing.assert_allclose(xyz, [[20, 0, 0]] * 3, atol=1e-3)


def test_a_pole_stays_in_one_place_while_the_sensor_turns_with_the_car():
    poses, reference_us = drive(speed_mps=8, yaw_rate_radps=0.6), HEADER_US + 200_000
    T_ego_sensor = geometry.transform([1.0, 0.5, 2.0], geometry.yaw_wxyz(-np.pi / 2))
    pole_map = np.array([1010.0, 7.0, 0.4])
    since_us = np.arange(-50_000, 50_000, 137.0)
    times_us = reference_us + since_us
    T_map_sensor = poses.T_map_ego(times_us.astype(np.int64)) @ T_ego_sensor
    measured = np.array([geometry.apply(T, pole_map[None])[0] for T in geometry.invert(T_map_sensor)])
    still = geometry.invert(poses.T_map_ego(np.array([reference_us]))[0] @ T_ego_sensor)
    expected = geometry.apply(still, pole_map[None])[0]
    assert np.linalg.norm(measured - expected, axis=1).max() > 0.3
    xyz = pointcloud.compensate(measured, since_us, reference_us, poses, T_ego_sensor=T_ego_sensor)
    assert np.linalg.norm(xyz - expected, axis=1).max() < 0.0007


def test_no_points_stay_no_points():
    xyz = pointcloud.compensate(np.zeros((0, 3)), np.zeros(0), HEADER_US + 200_000, drive(), T_ego_sensor=np.eye(4))
    assert xyz.shape == (0, 3)


def test_points_outside_the_trajectory_are_never_extrapolated():
    with pytest.raises(ValueError, match="pose wanted at"):
        pointcloud.compensate(np.ones((1, 3)), np.array([-5e4]), HEADER_US + 40_000, drive(5), T_ego_sensor=np.eye(4))


def test_poses_cover_what_lies_between_them_but_no_silence():
    poses = Poses(np.array([0, 10, 20, 100, 110]), np.zeros((5, 3)), geometry.yaw_wxyz(np.zeros(5)))
    start, end = np.array([[0, 20], [-1, 5], [15, 21], [20, 100], [40, 60], [99, 105], [100, 110], [105, 111], [12, 12],
                           [50, 50]]).T
    np.testing.assert_array_equal(poses.covered(start, end, 30),
                                  [True, False, False, False, False, False, True, False, True, False])
    assert poses.covered(start, end, 80).sum() == 8
    one = Poses(np.array([5]), np.zeros((1, 3)), geometry.yaw_wxyz(np.zeros(1)))
    assert not one.covered(np.array([5]), np.array([5]), 30).any()


def test_a_pose_between_two_is_halfway_and_halfway_turned():
    poses = Poses(np.array([0, 100]), np.array([[0.0, 0, 0], [4, 2, 0]]), geometry.yaw_wxyz(np.array([0, np.pi / 2])))
    xyz, rotation = poses.at(np.array([0, 50, 100]))
    np.testing.assert_allclose(xyz, [[0, 0, 0], [2, 1, 0], [4, 2, 0]])
    np.testing.assert_allclose(geometry.yaw_rad(rotation), [0, np.pi / 4, np.pi / 2])


def test_poses_far_apart_are_all_asked_at_once():
    poses = drive(speed_mps=10)
    xyz, _ = poses.at(np.array([STAMPS_US[-1], STAMPS_US[0], STAMPS_US[3] + 7_000]))
    np.testing.assert_allclose(xyz[:, 0], [1004, 1000, 1000.67])
