"""The simulator: what its sensors say is what its truth says, and the same seed gives the same bytes."""

import dataclasses
import hashlib
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import yaml
from rosbags.highlevel import AnyReader
from scipy.spatial.transform import Rotation, Slerp

from stages.lib import geometry, openlabel, rig
from stages.lib.errors import ConfigError
from stages.sim import camera, lidar, sensors, shapes, truth
from stages.sim.kinematics import STEP_M, from_curvature, trip
from stages.sim.sensors import Spec
from stages.sim.simulate import simulate
from stages.sim.street import paint_ground
from stages.sim.world import CAR, CONE, EGO_START_M, World, make_world
from tests.world import SPEC, tiny_world

COARSE = Spec(width_px=64, height_px=36, num_beams=8, num_azimuths=60)
RIG = rig.load(yaml.safe_load((Path(__file__).parents[1] / "conf/rig/sim.yaml").read_text())["sim"], "sim")
DURATION_S = 20.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("sim"))


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    return [make_world(0, number, DURATION_S) for number in range(12)]


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# Bytes ---------------------------------------------------------------------------------------------------------------

def test_same_seed_same_bytes_with_one_worker_or_two(tmp_path: Path) -> None:
    simulate(tmp_path / "one", 2, 1.0, 7, 1, spec=COARSE)
    simulate(tmp_path / "two", 2, 1.0, 7, 2, spec=COARSE)
    simulate(tmp_path / "other", 1, 1.0, 8, 1, spec=COARSE)
    one = digests(tmp_path / "one")
    assert one == digests(tmp_path / "two")
    assert sorted(one) == ["drive_0000.labels.json", "drive_0000.truth.json", "drive_0000/drive_0000.mcap",
                           "drive_0000/metadata.yaml", "drive_0001.truth.json", "drive_0001/drive_0001.mcap",
                           "drive_0001/metadata.yaml"]
    assert not set(digests(tmp_path / "other").values()) & set(one.values())


def test_a_later_drive_leaves_the_earlier_ones_alone(tmp_path: Path) -> None:
    calls = []
    simulate(tmp_path, 1, 1.0, 7, 1, spec=COARSE)
    before, written = digests(tmp_path), (tmp_path / "drive_0000/metadata.yaml").stat().st_mtime_ns
    (tmp_path / "drive_0001.part").mkdir()
    (tmp_path / "drive_0001.part/torn").write_text("by an earlier run")
    folders = simulate(tmp_path, 2, 1.0, 7, 1, spec=COARSE, progress=lambda *call: calls.append(call))
    assert calls == [("drive_0001", 2, 2)]
    assert folders == [tmp_path / "drive_0000", tmp_path / "drive_0001"]
    assert (tmp_path / "drive_0000/metadata.yaml").stat().st_mtime_ns == written
    assert before.items() < digests(tmp_path).items()
    assert not list(tmp_path.glob("*.part"))


def test_a_drive_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    simulate(tmp_path, 1, 1.0, 7, 1, spec=COARSE)
    with pytest.raises(ConfigError, match=r'holds .*"seed": 7.*\n.*"seed": 8.*\n.*or `rm -r .*drive_0000`'):
        simulate(tmp_path, 1, 1.0, 8, 1, spec=COARSE)
    (tmp_path / "drive_0000/metadata.yaml").unlink()
    with pytest.raises(ConfigError, match="holds something else"):
        simulate(tmp_path, 1, 1.0, 7, 1, spec=COARSE)
    with pytest.raises(ConfigError, match="cannot simulate 0 drives of 20 s with 1 workers: all must be at least 1"):
        simulate(tmp_path, 0, 20.0, 7, 1)


# The recording -------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Bag:
    """All messages of a bag, by topic: (receive time [ns], message)."""

    messages: dict[str, list]
    types: dict[str, str]

    def stamps_us(self, topic: str) -> np.ndarray:
        stamps = [getattr(message, "header", message).stamp for _, message in self.messages[topic]]
        return np.array([stamp.sec * 1_000_000 + stamp.nanosec // 1000 for stamp in stamps])

    def T_base(self, frame: str) -> np.ndarray:
        """T_base_frame by the chain in /tf_static."""
        links = {tf.child_frame_id: tf for _, message in self.messages["/tf_static"] for tf in message.transforms}
        T = np.eye(4)
        while frame != "base_link":
            tf = links[frame].transform
            step = geometry.transform([tf.translation.x, tf.translation.y, tf.translation.z],
                                      [tf.rotation.w, tf.rotation.x, tf.rotation.y, tf.rotation.z])
            T, frame = step @ T, links[frame].header.frame_id
        return T

    def T_map_base(self, at_us: np.ndarray) -> np.ndarray:
        """Odometry's poses (N, 4, 4), interpolated."""
        poses = [message.pose.pose for _, message in self.messages["/localization/kinematic_state"]]
        stamps = self.stamps_us("/localization/kinematic_state")
        start = stamps[0]
        T = np.tile(np.eye(4), (len(at_us), 1, 1))
        for axis, name in enumerate("xyz"):
            T[:, axis, 3] = np.interp(at_us - start, stamps - start, [getattr(pose.position, name) for pose in poses])
        turns = Rotation.from_quat([[getattr(pose.orientation, name) for name in "xyzw"] for pose in poses])
        T[:, :3, :3] = Slerp(stamps - start, turns)(at_us - start).as_matrix()
        return T


def load(folder: Path) -> Bag:
    messages, types = {}, {}
    with AnyReader([folder]) as reader:
        for link, receive_ns, raw in reader.messages():
            types[link.topic] = link.msgtype
            messages.setdefault(link.topic, []).append((receive_ns, reader.deserialize(raw, link.msgtype)))
    return Bag(messages, types)


@pytest.fixture(scope="module")
def bag(tiny: Path) -> Bag:
    return load(tiny / "drive_0000")


def test_the_bag_has_the_topics_and_rates_of_its_rig(bag: Bag) -> None:
    for channel in RIG.channels.values():
        stamps = bag.stamps_us(channel.topic)
        assert len(stamps) == 4 * channel.rate_hz
        steps = np.diff(stamps)
        assert abs(steps.mean() - 1e6 / channel.rate_hz) < 1500
        assert steps.min() > 0
        assert len(set(steps)) > 3, "a sensor without jitter"
        assert steps.max() < channel.max_gap_us
        if channel.modality == "camera":
            assert bag.stamps_us(channel.info_topic).tolist() == stamps.tolist()
    assert RIG.channels["LIDAR_TOP"].stamp == "begin"
    assert RIG.channels["LIDAR_TOP"].duration_us == sensors.LIDAR_TURN_US
    odometry = np.diff(bag.stamps_us(RIG.ego_pose.topic))
    assert odometry.max() < 25_000 < RIG.ego_pose.max_gap_us
    for signal in RIG.signals.values():
        assert all(np.isfinite(getattr(message, signal.field)) for _, message in bag.messages[signal.topic])


def test_messages_are_received_after_their_stamps_and_at_no_common_time(bag: Bag) -> None:
    for topic in bag.messages:
        lag_us = np.array([receive_ns // 1000 for receive_ns, _ in bag.messages[topic]]) - bag.stamps_us(topic) \
            if topic != "/tf_static" else np.array([1])
        assert lag_us.min() > 0
        assert lag_us.max() < 130_000
    firsts = [int(bag.stamps_us(channel.topic)[0]) % 100_000 for channel in RIG.channels.values()]
    assert min(b - a for a, b in itertools.pairwise(sorted(firsts))) > 1000


def test_the_pose_is_known_during_every_exposure_and_turn(bag: Bag) -> None:
    poses = bag.stamps_us(RIG.ego_pose.topic)
    for channel in RIG.channels.values():
        stamps = bag.stamps_us(channel.topic)
        assert poses[0] < stamps[0]
        assert stamps[-1] + channel.duration_us < poses[-1]


def test_sensors_hang_on_the_car_by_a_chain_of_two(bag: Bag) -> None:
    assert len(bag.messages["/tf_static"]) == 2
    parents = {tf.child_frame_id: tf.header.frame_id for _, m in bag.messages["/tf_static"] for tf in m.transforms}
    for channel in RIG.channels:
        frame = "lidar_top" if channel == "LIDAR_TOP" else f"{channel.lower()}_optical"
        assert (parents[frame], parents[parents[frame]]) == ("sensor_kit", "base_link")
        assert bag.T_base(frame) == pytest.approx(sensors.T_base_sensor(channel), abs=1e-9)
    # Optical frames: z forward. The front camera looks along the car's x, the left one to its left.
    assert bag.T_base("cam_front_optical")[0, 2] > 0.99
    assert bag.T_base("cam_front_left_optical")[1, 2] > 0.7


def test_speed_and_steering_agree_with_the_odometry(bag: Bag) -> None:
    stamps = bag.stamps_us(RIG.ego_pose.topic)
    T = bag.T_map_base(stamps)
    moved = np.linalg.norm(np.diff(T[:, :3, 3], axis=0), axis=1) / np.diff(stamps) * 1e6
    told = [m.twist.twist.linear.x for _, m in bag.messages[RIG.ego_pose.topic]]
    assert np.abs(moved - np.array(told)[1:]).max() < 0.05
    speed = [m.longitudinal_velocity for _, m in bag.messages["/vehicle/status/velocity_status"]]
    at = bag.stamps_us("/vehicle/status/velocity_status")
    assert np.abs(np.array(speed) - np.interp(at, stamps, told)).max() < 0.08


def test_a_picture_s_cones_are_where_truth_and_calibration_put_them(tiny: Path, bag: Bag) -> None:
    """By OpenCV and the recording alone; and any wrong stamp, pose, frame or lens would show."""
    cones = openlabel.read(tiny / "drive_0000.truth.json").boxes.filter(category=CONE).unique("object_id")
    error_px = picture_error_px(bag, cones)
    assert len(error_px) >= 12
    assert np.median(error_px) < 0.3
    assert error_px.max() < 0.6
    for wrong in ({"late_us": 50_000}, {"yaw_rad": 0.02}, {"lens": 0.0}):
        assert picture_error_px(bag, cones, **wrong).max() > 1.2


def picture_error_px(bag: Bag, cones: object, late_us: int = 0, lens: float = 1.0, yaw_rad: float = 0.0) -> np.ndarray:
    """Distance between the middle of each free-standing orange blob and of the cone's projection."""
    errors = []
    for channel in sensors.CAMERAS:
        topic = RIG.channels[channel].topic
        facts = bag.messages[RIG.channels[channel].info_topic][0][1]
        K, D = facts.k.reshape(3, 3), facts.d * lens
        T_cam_base = geometry.invert(bag.T_base(facts.header.frame_id))
        T_cam_base[:3, :3] = Rotation.from_euler("y", yaw_rad).as_matrix() @ T_cam_base[:3, :3]
        stamps = bag.stamps_us(topic)
        for (_, message), T_map_base in zip(bag.messages[topic], bag.T_map_base(stamps + late_us)):
            red, green, blue = cv2.imdecode(message.data, cv2.IMREAD_COLOR)[..., ::-1].astype(int).transpose(2, 0, 1)
            orange = ((red > 200) & (green < 150) & (blue < 80)).astype(np.uint8)
            _, _, boxes, middles = cv2.connectedComponentsWithStats(orange)
            for cone in cones.iter_rows(named=True):
                turn = np.linspace(0, 2 * np.pi, 24)
                rim = 0.18 * np.stack([np.cos(turn), np.sin(turn), 0 * turn], -1)
                points = np.concatenate([rim + np.array([cone["x_m"], cone["y_m"], z]) for z in (0, 0.9)])
                points = geometry.apply(T_cam_base @ geometry.invert(T_map_base), points)
                if points[:, 2].min() < 1 or points[:, 2].max() > 14:
                    continue
                seen = cv2.projectPoints(points, np.zeros(3), np.zeros(3), K, D)[0][:, 0]
                low, high = seen.min(axis=0), seen.max(axis=0)
                whole = (low > 2).all() and (high < [SPEC.width_px - 3, SPEC.height_px - 3]).all()
                hull = cv2.moments(cv2.convexHull(seen.astype(np.float32)))
                middle = np.array([hull["m10"], hull["m01"]]) / hull["m00"]
                nearest = np.linalg.norm(middles[1:] - middle, axis=1).argmin() + 1 if len(middles) > 1 else 0
                if whole and nearest and abs(boxes[nearest, 4] / hull["m00"] - 1) < 0.12:
                    errors.append(np.linalg.norm(middles[nearest] - middle))
    return np.array(errors)


def test_the_cloud_is_uncorrected_in_the_sensor_frame(tiny: Path, bag: Bag) -> None:
    """Each point by the pose at its own time lies on the ground or in a box; by the pose at the stamp it does not."""
    labels = openlabel.read(tiny / "drive_0000.truth.json")
    parked = labels.boxes.filter((labels.boxes["vx_mps"] == 0) & (labels.boxes["category"] == CAR))
    _, message = bag.messages["/sensing/lidar/top/points"][20]
    kinds = {7: "<f4", 4: "<u2", 6: "<u4"}
    dtype = np.dtype({"names": [f.name for f in message.fields], "formats": [kinds[f.datatype] for f in message.fields],
                      "offsets": [f.offset for f in message.fields], "itemsize": message.point_step})
    points = message.data.view(dtype)
    xyz = np.stack([points["x"], points["y"], points["z"]], -1).astype(float)
    assert points["ring"].max() == SPEC.num_beams - 1
    assert 0 < points["t"].max() < 100_000_000
    assert (np.diff(points["t"].astype(int)) >= 0).all()
    stamp = bag.stamps_us("/sensing/lidar/top/points")[20]

    def deep(at_us: np.ndarray) -> int:
        """How many points lie in the lower body of a parked car, 10 cm or more below its surface."""
        T = bag.T_map_base(at_us) @ bag.T_base("lidar_top")
        on_map = np.einsum("nij,nj->ni", T[:, :3, :3], xyz) + T[:, :3, 3]
        assert abs(on_map[:, 2].min()) < 0.02
        count = 0
        for box in parked.unique("object_id").iter_rows(named=True):
            c, s = np.cos(box["yaw_rad"]), np.sin(box["yaw_rad"])
            dx, dy = on_map[:, 0] - box["x_m"], on_map[:, 1] - box["y_m"]
            inside = (np.abs(c * dx + s * dy) < box["length_m"] / 2 - 0.1) \
                & (np.abs(c * dy - s * dx) < box["width_m"] / 2 - 0.1)
            count += (inside & (on_map[:, 2] > 0.3) & (on_map[:, 2] < 0.5 * box["height_m"])).sum()
        return count

    assert deep(stamp + points["t"] // 1000) == 0
    assert deep(np.full(len(points), stamp)) > 10


# What sensors see ----------------------------------------------------------------------------------------------------

def surface_gap_m(solids: shapes.Solids, pose: np.ndarray, point: np.ndarray) -> float:
    """Distance from a point to the nearest surface of an owner's solids; a solid's inside counts as off its surface."""
    gaps = []
    for i in range(len(solids.owner)):
        if solids.material[i] == shapes.SHADOW:
            continue
        c, s = np.cos(pose[2]), np.sin(pose[2])
        dx, dy = point[0] - pose[0], point[1] - pose[1]
        x, y = c * dx + s * dy - solids.x_m[i], c * dy - s * dx - solids.y_m[i]
        c, s = np.cos(solids.yaw_rad[i]), np.sin(solids.yaw_rad[i])
        x, y = c * x + s * y, c * y - s * x
        upright = max(solids.low_m[i] - point[2], point[2] - solids.high_m[i])
        if solids.round[i]:
            outside = np.array([np.hypot(x, y) - solids.half_x_m[i], upright])
        else:
            outside = np.array([abs(x) - solids.half_x_m[i], abs(y) - solids.half_y_m[i], upright])
        gaps.append(np.linalg.norm(np.maximum(outside, 0)) if outside.max() > 0 else -outside.max())
    return min(gaps)


def test_lidar_returns_lie_on_surfaces_at_each_point_s_own_time(worlds: list[World]) -> None:
    world, begin_s = worlds[1], 9.0
    turn = lidar.sweep(world, Spec(num_beams=16, num_azimuths=240), begin_s, np.random.default_rng(0))
    t_s = begin_s + turn.offset_ns * 1e-9
    ego = world.ego.pose(t_s)
    T = sensors.T_base_sensor("LIDAR_TOP")
    base = geometry.apply(T, turn.xyz_m.astype(float))
    c, s = np.cos(ego[:, 2]), np.sin(ego[:, 2])
    on_map = np.stack([ego[:, 0] + c * base[:, 0] - s * base[:, 1], ego[:, 1] + s * base[:, 0] + c * base[:, 1],
                       base[:, 2]], -1)
    assert np.abs(on_map[turn.owner == -1, 2]).max() < 0.01
    states, _ = world.states(t_s)
    by_owner = {owner: world.solids.take(world.solids.owner == owner) for owner in set(turn.owner.tolist()) - {-1}}
    on_things = np.flatnonzero(turn.owner >= 0)
    gaps = np.array([surface_gap_m(by_owner[turn.owner[i]], states[turn.owner[i], i], on_map[i]) for i in on_things])
    assert len(gaps) > 300
    assert gaps.max() < 0.02
    moving = on_things[np.hypot(*states[turn.owner[on_things], on_things, 3:].T) > 5]
    late = [surface_gap_m(by_owner[turn.owner[i]], states[turn.owner[i], 0], on_map[i]) for i in moving]
    assert max(late) > 0.2, "traffic stands still during a turn"


def test_a_solid_behind_another_gets_no_return(worlds: list[World]) -> None:
    """A wall 6 m ahead hides the car behind it, from the lidar and from the camera."""
    world = worlds[0]
    x, y, yaw = world.ego.pose(1.0)
    wall = shapes.Solid(x + 6 * np.cos(yaw), y + 6 * np.sin(yaw), 0.2, 30.0, 0.0, 9.0, (0, 0, 0), yaw_rad=yaw)
    hidden = shapes.Solid(x + 9 * np.cos(yaw), y + 9 * np.sin(yaw), 1.0, 1.0, 0.0, 2.0, (255, 0, 0), yaw_rad=yaw)
    for solids, seen in (((hidden,), True), ((hidden, wall), False)):
        groups = [()] * (len(world.actors) - 1) + [solids[:1], solids[1:]]
        alone = dataclasses.replace(world, solids=shapes.columns(groups), movers=world.movers[:0],
                                    moving=world.moving[:0], presence=world.presence[:0],
                                    resting=np.zeros_like(world.resting))
        turn = lidar.sweep(alone, Spec(), 1.0, np.random.default_rng(0))
        picture = camera.expose(alone, paint_ground(world.street, 0), "CAM_FRONT", Spec(), 1.0)
        assert (turn.owner == len(world.actors) - 1).any() == seen
        assert (picture.owner == len(world.actors) - 1).any() == seen


def test_no_solid_reaches_below_the_ground(worlds: list[World]) -> None:
    assert all(world.solids.low_m.min() >= 0 for world in worlds)


@pytest.mark.parametrize(("channel", "ahead_m", "left_m"), [
    ("CAM_FRONT", 9.0, 1.0), ("CAM_FRONT_LEFT", 5.5, 8.0), ("CAM_BACK", -8.0, 2.0), ("CAM_BACK_RIGHT", -2.0, -7.0)])
def test_a_box_covers_the_pixels_that_opencv_projects_it_to(worlds: list[World], channel: str, ahead_m: float,
                                                            left_m: float) -> None:
    """Against cv2.projectPoints through K, D and T, edges subdivided as the lens bends them: to 0.1 px and 2 %."""
    world, spec, t_s = worlds[3], Spec(), 3.0
    x, y, yaw = world.ego.pose(t_s)
    c, s = np.cos(yaw), np.sin(yaw)
    box = shapes.Solid(x + c * ahead_m - s * left_m, y + s * ahead_m + c * left_m, 1.2, 0.7, 0.4, 1.9, (255, 0, 255),
                       yaw_rad=yaw + 0.6)
    alone = dataclasses.replace(world, solids=shapes.columns([*[()] * len(world.actors), (box,)]))
    picture = camera.expose(alone, paint_ground(world.street, 0), channel, spec, t_s)
    v, u = np.nonzero(picture.owner == len(world.actors))

    corners = np.array(list(itertools.product((-1, 1), (-1, 1), (0.4, 1.9))))
    edges = [np.linspace(a, b, 40) for a, b in itertools.combinations(corners, 2)]
    local = np.concatenate(edges) * [1.2, 0.7, 1.0]
    turned = geometry.apply(geometry.transform([box.x_m, box.y_m, 0], geometry.yaw_wxyz(box.yaw_rad)), local)
    T_map_base = geometry.transform([x, y, 0], geometry.yaw_wxyz(yaw))
    T_cam_map = geometry.invert(T_map_base @ sensors.T_base_sensor(channel))
    mount = sensors.CAMERAS[channel]
    projected = cv2.projectPoints(geometry.apply(T_cam_map, turned), np.zeros(3), np.zeros(3), mount.K(spec),
                                  np.array(mount.distortion))[0][:, 0]
    outline = shapely.concave_hull(shapely.MultiPoint(projected), 0.15)
    assert len(u) > 300
    assert abs(len(u) / outline.area - 1) < 0.02
    assert np.hypot(u.mean() - outline.centroid.x, v.mean() - outline.centroid.y) < 0.1


def test_every_pixel_ray_goes_back_to_its_pixel() -> None:
    for channel, mount in sensors.CAMERAS.items():
        seen = camera.view(channel, Spec())
        rays = np.einsum("ij,ihw->hwj", seen.T_base_cam[:3, :3], seen.ray.astype(float)).reshape(-1, 3)
        back = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), mount.K(Spec()), np.array(mount.distortion))[0][:, 0]
        v, u = np.divmod(np.arange(len(rays)), 320)
        assert np.abs(back - np.stack([u, v], -1)).max() < 0.001
        assert np.abs(back - rays[:, :2] * [mount.K(Spec())[0, 0], mount.K(Spec())[1, 1]]
                      - mount.K(Spec())[:2, 2]).max() > 5, "no distortion"


# The world -----------------------------------------------------------------------------------------------------------

def test_streets_are_apart_and_some_are_driven_again(worlds: list[World]) -> None:
    ways = [shapely.LineString(world.ego.pose(np.arange(0, DURATION_S, 0.5))[:, :2]) for world in worlds]
    gaps = np.array([[a.distance(b) for b in ways] for a in ways])
    again = [(i, j) for i, j in itertools.combinations(range(12), 2) if gaps[i, j] < 1]
    assert again == [(0, 5), (1, 9), (2, 8)]
    assert gaps[gaps > 1].min() > 150
    areas = [world.street.area for world in worlds]
    across = [gaps[i, j] for i, j in itertools.combinations(range(12), 2) if areas[i] != areas[j]]
    assert min(across) > 1000
    stamps = [world.start_us for world in worlds]
    assert stamps == sorted(stamps)
    assert all(10**15 <= stamp < 10**16 for stamp in stamps)


def test_traffic_drives_as_traffic_does(worlds: list[World]) -> None:
    t_s = np.arange(0, DURATION_S, 0.1)
    stopped, braked, turned, cornered = 0, 0, 0, 0
    for world in worlds:
        _, speed = world.ego.trip.at(t_s)
        assert 4 < (speed[speed > 0.5]).mean() < 13
        stopped += speed.min() < 0.05
        braked += np.diff(speed).min() < -0.15
        cornered += abs(np.ptp(world.ego.pose(t_s)[:, 2])) > np.radians(30)
        states, present = world.states(t_s)
        turned += sum(np.ptp(states[i, present[i], 2]) > np.radians(60) for i in world.movers if present[i].any()
                      and world.actors[i].category.startswith("vehicle.") and np.hypot(*states[i, :, 3:].T).max() > 4)
    assert stopped >= 3
    assert braked >= 3
    assert turned >= 12
    assert cornered >= 3


def test_nobody_drives_or_walks_through_anybody(worlds: list[World]) -> None:
    for world in worlds:
        for t_s in np.arange(0, DURATION_S, 1.0):
            states, present = world.states(t_s)
            x, y, yaw = world.ego.pose(t_s)
            places = [(x + 1.37 * np.cos(yaw), y + 1.37 * np.sin(yaw), yaw, 4.7, 1.9)]
            places += [(*states[i, :3], *actor.size_lwh_m[:2]) for i, actor in enumerate(world.actors) if present[i]]
            x, y, yaw, length, width = np.array(places).T[..., None]
            along, left = np.array([1, 1, -1, -1]) * length / 2, np.array([1, -1, -1, 1]) * width / 2
            c, s = np.cos(yaw), np.sin(yaw)
            prints = shapely.polygons(np.stack([x + c * along - s * left, y + s * along + c * left], -1))
            a, b = shapely.STRtree(prints).query(prints, predicate="intersects")
            assert (a == b).all()


def test_motion_is_smooth_and_velocity_is_its_derivative(worlds: list[World]) -> None:
    t_s = np.arange(0, DURATION_S, 0.1)
    for world in worlds[:4]:
        states, present = world.states(t_s)
        moved = np.diff(states[..., :2], axis=1) / 0.1
        mean = (states[:, 1:, 3:] + states[:, :-1, 3:]) / 2
        both = present[:, 1:] & present[:, :-1]
        assert np.abs(moved - mean)[both].max() < 0.15


def test_a_trip_obeys_bends_and_stops() -> None:
    path = from_curvature(np.where(np.abs(np.arange(0, 200, STEP_M) - 120) < 15, 1 / 20, 0.0))
    way = trip(path, np.full(len(path.yaw_rad), 10.0), {60.0: 2.0})
    assert way.at(way.time_at(120.0))[1] == pytest.approx(np.sqrt(2.2 * 20), abs=0.05)
    at_stop = (np.abs(way.s_m - 60.0) < 1e-6) & (way.speed_mps < 1e-6)
    assert at_stop.sum() * 0.01 == pytest.approx(2.0, abs=0.03)
    accel = np.diff(way.speed_mps) / 0.01
    assert -2.5 < accel.min() < -2.3
    assert 1.7 < accel.max() < 1.9


def test_front_and_back_of_vehicles_differ() -> None:
    """The cabin sits behind the middle: of the lidar's view of a car, the rear half is the higher one."""
    for parts in (shapes.car((4.5, 1.8, 1.5), (0, 0, 0), (-0.42, 0.13)), shapes.bus((11.0, 2.5, 3.2), (0, 0, 0))):
        top = max(parts, key=lambda solid: solid.high_m)
        assert top.x_m < -0.1 * parts[0].half_x_m
    cab, load, *_ = shapes.truck((7.0, 2.2, 3.0), (0, 0, 0))
    assert cab.x_m > load.x_m
    assert cab.high_m < load.high_m


def test_solids_stay_within_their_labelled_box(worlds: list[World]) -> None:
    solids = worlds[0].solids
    for owner, actor in enumerate(worlds[0].actors):
        length, width, height = actor.size_lwh_m
        parts = solids.take((solids.owner == owner) & (solids.material != shapes.SHADOW))
        assert (np.abs(parts.x_m) + parts.half_x_m).max() <= length / 2 + 1e-9
        assert (np.abs(parts.y_m) + parts.half_y_m).max() <= width / 2 + 1e-9
        assert parts.high_m.max() == pytest.approx(height)
        assert parts.low_m.min() < 0.41


def test_there_are_cars_enough_to_learn_from_and_to_judge(worlds: list[World]) -> None:
    """Within 30 m and with 5 points or more: at least 300 in 3 drives of 39 key frames, in any drives."""
    for number in (1, 6, 9):
        world, cars = worlds[number], []
        for t_s in (2.0, 8.0, 14.0, 19.0):
            turn = lidar.sweep(world, Spec(), t_s, np.random.default_rng(0))
            points = np.bincount(turn.owner[turn.owner >= 0], minlength=len(world.actors) + 1)
            states, present = world.states(t_s)
            near = np.hypot(*(states[:, :2] - world.ego.pose(t_s)[:2]).T) < 30
            cars.append(sum(near[i] and present[i] and points[i] >= 5 and actor.category == CAR
                            for i, actor in enumerate(world.actors)))
        assert np.mean(cars) > 5, "300 / (3 * 39) is 2.6"


# Truth and labels ----------------------------------------------------------------------------------------------------

def test_truth_covers_the_whole_drive_and_all_that_a_sensor_can_see(tiny: Path) -> None:
    world = make_world(0, 0, 4.0)
    labels = openlabel.read(tiny / "drive_0000.truth.json")
    assert labels.reviewed_us == ((world.start_us, world.start_us + 4_000_000),)
    stamps = labels.boxes["stamp_us"].unique().sort().to_numpy() - world.start_us
    assert stamps.tolist() == list(range(0, 4_000_001, 100_000))
    states, present = world.states(2.0)
    near = np.hypot(*(states[:, :2] - world.ego.pose(2.0)[:2]).T) < sensors.LIDAR_RANGE_M
    wanted = {str(i + 1) for i in np.flatnonzero(present & near) if i < len(world.actors)}
    at_two = labels.boxes.filter(stamp_us=world.start_us + 2_000_000)
    assert wanted <= set(at_two["object_id"])
    for row in at_two.iter_rows(named=True):
        state, actor = states[int(row["object_id"]) - 1], world.actors[int(row["object_id"]) - 1]
        assert (row["x_m"], row["y_m"], row["vx_mps"], row["vy_mps"]) == pytest.approx(state[[0, 1, 3, 4]], abs=1e-4)
        assert (row["length_m"], row["width_m"], row["height_m"]) == pytest.approx(actor.size_lwh_m, abs=1e-4)
        assert row["z_m"] == pytest.approx(actor.size_lwh_m[2] / 2, abs=1e-4)
        assert geometry.wrap_rad(row["yaw_rad"] - state[2]) == pytest.approx(0, abs=1e-5)


def test_truth_forgets_who_has_left(worlds: list[World]) -> None:
    gone = 0
    for world in worlds:
        t_s = np.arange(0, 20_000_001, 100_000) * 1e-6
        states, present = world.states(t_s)
        near = np.hypot(*np.moveaxis(states[..., :2] - world.ego.pose(t_s)[:, :2], -1, 0)) < truth.REACH_M
        boxes = truth.truth(world, DURATION_S).boxes
        assert boxes.height == (near & present)[:-1].sum()
        gone += (near & ~present).sum()
    assert gone > 100


def test_human_labels_are_near_the_truth_and_only_where_somebody_looked(tiny: Path) -> None:
    start_us = make_world(0, 0, 4.0).start_us
    assert openlabel.read(tiny / "drive_0000.labels.json").reviewed_us == ((start_us, start_us + 2_000_000),)
    assert not (tiny / "drive_0001.labels.json").exists()
    labels, full = (openlabel.read(tiny / f"drive_0002.{kind}.json") for kind in ("labels", "truth"))
    assert labels.reviewed_us == full.reviewed_us
    pairs = labels.boxes.join(full.boxes, on=("stamp_us", "object_id", "category"), how="left", suffix="_true")
    off = np.stack([(pairs[f"{name}_m"] - pairs[f"{name}_m_true"]).to_numpy() for name in "xyz"])
    assert pairs.height > 300
    assert off.std() == pytest.approx(truth.NOISE_M, rel=0.1)
    yaw = geometry.wrap_rad((pairs["yaw_rad"] - pairs["yaw_rad_true"]).to_numpy())
    assert np.std(yaw) == pytest.approx(truth.NOISE_RAD, rel=0.15)
    # A car that the lidar hits is labelled.
    ids = set(labels.boxes.filter(stamp_us=labels.reviewed_us[0][0] + 2_000_000)["object_id"])
    world = make_world(0, 2, 4.0)
    turn = lidar.sweep(world, SPEC, 2.0, np.random.default_rng(0))
    points = np.bincount(turn.owner[turn.owner >= 0], minlength=len(world.actors) + 1)[:-1]
    states, _ = world.states(2.0)
    near = np.hypot(*(states[:-1, :2] - world.ego.pose(2.0)[:2]).T) < truth.LABEL_REACH_M - 1
    assert {str(i + 1) for i in np.flatnonzero((points >= 10) & near)} <= ids
    assert len(ids) < full.boxes.filter(stamp_us=world.start_us + 2_000_000).height


def test_the_ego_begins_where_the_street_allows_a_view_both_ways(worlds: list[World]) -> None:
    for world in worlds:
        s_m, _ = world.ego.trip.at(np.array([0.0, DURATION_S]))
        assert s_m[0] == pytest.approx(EGO_START_M, abs=0.2)
        assert s_m[1] < world.ego.path.length_m - 75
