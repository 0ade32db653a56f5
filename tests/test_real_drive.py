"""A real car's recording from scan through merge, and broken ones beside it, by the commands that people type.

RADIATE fog_6: two cameras, a lidar without times of its points, GNSS and IMU whose clock runs 65.8 s ahead.
"""

import re
import shutil
from pathlib import Path

import pytest
from nuscenes import NuScenes

from stages.store.store import Store
from tests import clones, oracle
from tests.clones import counters, num_rows, run

KNOBS = """
curate: {scene_s: 2.0, min_scene_s: 1.0}
split: {quotas: {train: 1.0, val: 0.0, test: 0.0}}
"""
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT")
NEAR_US = 40_000
BROKEN = {
    "derived/radiate_mcap_truncated": "radiate_fog6_ros2_mcap.mcap: ends early, at byte 3000000.*`mcap recover ",
    "real/lfs_pointer.mcap": "is a Git-LFS pointer of 128 bytes.*`git lfs pull`",
    "real/ros2_1_of_13_splits_soccer_goal": "metadata.yaml names 13 .*, 12 of them missing, first soccer_goal_0.mcap.*"
                                            "`ros2 bag reindex ",
    "real/ros2_mcap_service_events": "/sensing/camera/left/image_raw/compressed of CAM_FRONT is not in the recording"
                                     ".*/test_topic1.*channels.CAM_FRONT.topic",
    "real/ros2_no_metadata_mcap": "/sensing/camera/left/image_raw/compressed of CAM_FRONT is not in the recording"
                                  ".*/chatter.*channels.CAM_FRONT.topic",
    "real/ros2_wrong_rmw_mcap": "serialization_format of /array_topic is 'wrong_format'.*`ros2 bag convert`",
}
"""Recording in bad_inputs -> what is said of it: where, what, and what to do."""


@pytest.fixture(scope="module")
def clone(real_data, tmp_path_factory) -> Path:
    """A clone that has made its dataset of the drive, and exported it to `dataroot`."""
    folder = clones.new_clone(tmp_path_factory.mktemp("radiate") / "clone", KNOBS)
    shutil.copytree(real_data / "drives/radiate_fog6", folder / "data/raw/van/fog_6")
    assert "1 recordings" in run(folder, "roadmill", "scan", "data/raw/van", "--rig", "radiate")
    run(folder, "dvc", "repro", "merge")
    run(folder, "roadmill", "export", "dataroot")
    return folder


@pytest.fixture(scope="module")
def frames(clone) -> list[oracle.Frame]:
    return oracle.frames(clone / "data/merge/tables", Store.in_folder(clone / "data/store").need)


def test_a_real_drive_becomes_scenes_of_2_s_that_pass_every_check(clone):
    assert num_rows(clone) == 2
    for dataroot in ("data/merge", "dataroot"):
        verdicts = dict(re.findall(r"^([A-Z]\d+) +\w+ +(\w+)", run(clone, "roadmill", "check", dataroot), re.MULTILINE))
        assert set(verdicts.values()) == {"ok"}
        assert {*(f"T{n}" for n in range(1, 17)), *(f"E{n}" for n in range(1, 5)), "M1"} <= verdicts.keys()


def test_the_devkit_loads_the_real_drive_and_walks_every_chain(clone):
    nusc = NuScenes("v1.0-roadmill", str(clone / "dataroot"), verbose=False)
    assert {sensor["channel"] for sensor in nusc.sensor} == {*CAMERAS, "LIDAR_TOP"}
    for scene in nusc.scene:
        first, last = scene["first_sample_token"], scene["last_sample_token"]
        assert walk(nusc, "sample", first) == walk(nusc, "sample", last, "prev")[::-1]
        assert len(walk(nusc, "sample", first)) == scene["nbr_samples"] >= 2
    for table in ("sample_data", "sample_annotation"):
        begins = [row["token"] for row in getattr(nusc, table) if not row["prev"]]
        chains = [walk(nusc, table, token) for token in begins]
        assert sum(map(len, chains)) == len(getattr(nusc, table)) > 0
        assert all(walk(nusc, table, chain[-1], "prev") == chain[::-1] for chain in chains)
    assert len([row for row in nusc.sample_data if not row["prev"]]) == 3 * len(nusc.scene)
    for row in nusc.sample_data:
        assert Path(nusc.get_sample_data_path(row["token"])).is_file()


def walk(nusc: NuScenes, table: str, token: str, way: str = "next") -> list[str]:
    """Tokens along a chain."""
    tokens = []
    while token:
        tokens.append(token)
        token = nusc.get(table, token)[way]
    return tokens


@pytest.mark.parametrize("channel", CAMERAS)
def test_steps_in_the_lidars_depth_meet_the_edges_of_the_image(frames, channel):
    pairs = together(frames, channel, later_us=0)
    straight = oracle.edge_contrast(pairs)
    turned = {turn: oracle.edge_contrast(pairs, turned_deg=turn) for turn in ((-2, 0), (2, 0), (0, -2), (0, 2))}
    print(f"\n{channel}: {straight:.3f}, turned by 2 degrees {[f'{value:.3f}' for value in turned.values()]}")
    assert straight > 1.05 * max(turned.values())


def test_the_fused_ego_pose_takes_the_lidar_to_a_camera_half_a_second_later(frames):
    pairs = together(frames, "CAM_FRONT", later_us=500_000)
    moved, still = oracle.edge_contrast(pairs), oracle.edge_contrast(pairs, still=True)
    print(f"\nCAM_FRONT 0.5 s later: {moved:.3f}, without the car's motion {still:.3f}")
    assert moved > 1.05 * still


def together(frames: list[oracle.Frame], channel: str, later_us: int) -> list[tuple[oracle.Frame, oracle.Frame]]:
    """(camera frame, lidar frame): to each lidar frame the camera's that comes so much later."""
    cameras = [frame for frame in frames if frame.channel == channel]
    nearest = [(min(cameras, key=lambda camera: abs(camera.stamp_us - lidar.stamp_us - later_us)), lidar)
               for lidar in frames if lidar.channel == "LIDAR_TOP"]
    pairs = [(camera, lidar) for camera, lidar in nearest
             if abs(camera.stamp_us - lidar.stamp_us - later_us) < NEAR_US]
    assert len(pairs) > 20
    return pairs


def test_the_picture_of_the_projection_can_be_made_again(clone, tmp_path):
    height, width = oracle.picture(clone / "dataroot").shape[:2]
    assert (height, width) == (2 * 2 * 376, 2 * 2 * 672)


def test_without_its_clock_offset_the_drive_has_no_time_and_ingest_names_the_offset(clone, tmp_path):
    folder = clones.copy(clone, tmp_path / "clone")
    path = folder / "conf/rig/radiate.yaml"
    stated_us = int(re.search(r"ego_pose:.*?clock_offset_us: (-\d+)", path.read_text(), re.DOTALL)[1])
    path.write_text(path.read_text().replace(f"clock_offset_us: {stated_us}", "clock_offset_us: 0"))
    run(folder, "roadmill", "compose")
    said = run(folder, "python", "-m", "stages", "ingest")
    ahead, low_us, high_us = re.search(
        r"fog_6: the ego pose's stamps run (64\.\d) to 66\.\d s ahead of the sensors.*ego_pose\.clock_offset_us, "
        r"from (-\d+) to (-\d+) \(now 0\)", said).groups()
    assert int(low_us) < stated_us < int(high_us) < -64_000_000
    assert f"{ahead} to " in (folder / "results/ingest/report.html").read_text()
    assert "curate: no scene is left" in run(folder, "dvc", "repro", "curate", code=None)


def test_broken_recordings_are_named_and_the_good_one_is_kept(clone, real_data, tmp_path):
    folder = clones.copy(clone, tmp_path / "clone")
    for name in BROKEN:
        source, target = real_data / "bad_inputs" / name, folder / "data/raw/van" / Path(name).name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    assert "9 recordings" in run(folder, "roadmill", "scan", "data/raw/van", "--rig", "radiate")
    for cached in (0, 1):
        if not cached:
            shutil.rmtree(folder / "data/store")
        said = run(folder, "python", "-m", "stages", "ingest", code=3)
        record = counters(folder)["ingest"]
        assert (record["items"], record["cached"], record["ran"]) == (9, cached, 9 - cached)
        assert "8 of 9 items failed, the others are kept" in said
        assert "Traceback" not in said
        for name, words in BROKEN.items():
            text = said[said.index(f"ingest: {Path(name).name}"):].split("\ningest: ")[0]
            assert re.search(words, text.replace("\n", " "))
            assert len(text.splitlines()) <= 2
