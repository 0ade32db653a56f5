"""roadmill export: a plain dataroot that nuscenes-devkit reads."""

import json

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from nuscenes.eval.common.loaders import get_samples_of_custom_split, load_gt_of_sample_tokens
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.splits import get_scenes_of_split

from stages.lib import nuscenes
from stages.lib.errors import ConfigError
from stages.tools.check import check
from stages.tools.export import export

from . import dataset_fixture as fixture


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    world = fixture.build(root / "up")
    return world, fixture.run_merge(world, root)[0].data


@pytest.fixture(scope="module")
def dataroot(merged, tmp_path_factory):
    world, dataset = merged
    out = tmp_path_factory.mktemp("export") / "out"
    export(dataset, out, world.open_pack)
    return out


@pytest.fixture(scope="module")
def nusc(dataroot):
    return NuScenes(nuscenes.VERSION, str(dataroot), verbose=False)


def test_devkit_loads_the_export_and_walks_every_chain_from_both_ends(nusc):
    assert len(nusc.scene) == 3
    walked = 0
    for table in ("sample", "sample_data", "sample_annotation"):
        rows = getattr(nusc, table)
        for there, back in (("next", "prev"), ("prev", "next")):
            seen = set()
            for head in (row for row in rows if row[back] == ""):
                row = head
                while row["token"] not in seen:
                    seen.add(row["token"])
                    if not row[there]:
                        break
                    assert nusc.get(table, row[there])[back] == row["token"]
                    row = nusc.get(table, row[there])
            assert seen == {row["token"] for row in rows}
            walked += len(seen)
    assert walked == 2 * (12 + 87 + 24)


def test_every_sample_has_its_channels_and_every_file_is_there(nusc, dataroot):
    for sample in nusc.sample:
        assert set(sample["data"]) == {"LIDAR_TOP", "CAM_FRONT"}
    assert all((dataroot / row["filename"]).is_file() for row in nusc.sample_data)
    assert len([p for p in dataroot.rglob("*") if p.suffix in (".jpg", ".bin")]) == len(nusc.sample_data) == 87


def test_devkit_finds_the_points_of_the_car_in_its_box(nusc):
    sample = nusc.sample[0]
    path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
    points = LidarPointCloud.from_file(path).points[:3]
    counts = {}
    for box in boxes:
        in_box = np.abs(box.rotation_matrix.T @ (points - box.center[:, None])) <= box.wlh[[1, 0, 2], None] / 2
        counts[box.name] = int(in_box.all(0).sum())
    assert counts == {"vehicle.car": 5, "human.pedestrian.adult": 3}
    yaws = {box.name: box.orientation.yaw_pitch_roll[0] for box in boxes}
    assert yaws == pytest.approx({"vehicle.car": fixture.CAR_YAW_RAD, "human.pedestrian.adult": 0.0})


def test_devkit_takes_velocity_and_attributes_from_the_export(nusc):
    truth = load_gt_of_sample_tokens(nusc, get_samples_of_custom_split("roadmill_val", nusc), DetectionBox)
    boxes = [box for token in truth.sample_tokens for box in truth[token]]
    assert {(b.detection_name, b.attribute_name, b.num_pts) for b in boxes} == {
        ("car", "vehicle.moving", 5), ("pedestrian", "pedestrian.standing", 3)}
    assert [b.velocity[0] for b in boxes if b.detection_name == "car"] == pytest.approx([fixture.CAR_MPS] * 4)


def test_splits_and_can_bus_are_found_by_the_devkit(nusc, dataroot):
    assert get_scenes_of_split("roadmill_train", nusc) == ["scene-0001", "scene-0002"]
    assert get_scenes_of_split("roadmill_val", nusc) == ["scene-0003"]
    can = NuScenesCanBus(str(dataroot))
    pose = can.get_messages("scene-0003", "pose")
    assert len(pose) == 100
    assert list(pose[0]) == ["accel", "orientation", "pos", "rotation_rate", "utime", "vel"]
    assert pose[50]["pos"][0] == pytest.approx(5.0)
    assert {m["vehicle_speed"] for m in can.get_messages("scene-0003", "vehicle_monitor")} == {18.0}
    signals = json.loads((dataroot / "can_bus" / "scene-0003_signals.json").read_text())
    assert signals["steering_tire_angle_rad"]["value"][:2] == [0.1, 0.1]
    assert not list((dataroot / "can_bus").glob("*steeranglefeedback*")), "a tyre's angle is not the steering wheel's"


def test_export_is_clean_by_every_rule(dataroot):
    assert [(f.rule, f.token, f.sentence) for f in check(dataroot) if f.count] == []


def test_a_selection_holds_its_scenes_and_nothing_else(merged, tmp_path):
    world, dataset = merged
    done = export(dataset, tmp_path / "out", world.open_pack, splits=["val"])
    nusc = NuScenes(nuscenes.VERSION, str(tmp_path / "out"), verbose=False)
    assert (done.num_scenes, done.num_files) == (1, 29)
    assert [(s["name"], s["description"]) for s in nusc.scene] == [("scene-0001", "drive_b-1700000060000000")]
    assert len(nusc.log) == 1
    assert len(nusc.map[0]["log_tokens"]) == 1
    assert len(nusc.sample_annotation) == 8
    assert check(tmp_path / "out")[0].count == 0
    named = export(dataset, tmp_path / "named", world.open_pack, scenes=["drive_a-1700000002000000"])
    assert named.num_scenes == 1
    assert not any(f.count for f in check(tmp_path / "named"))


def test_export_into_a_used_folder_is_refused(merged, tmp_path):
    world, dataset = merged
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"is not an empty folder\n  name another, or remove it first"):
        export(dataset, tmp_path, world.open_pack)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_scenes_and_splits_are_named_with_what_there_is(merged, tmp_path):
    world, dataset = merged
    with pytest.raises(ConfigError, match=r"no scene 'drive_b-17000000600', did you mean drive_b-1700000060000000\?"):
        export(dataset, tmp_path / "out", world.open_pack, scenes=["drive_b-17000000600"])
    with pytest.raises(ConfigError, match=r"no split 'test'; splits: train, val\n  data/merge/splits.json"):
        export(dataset, tmp_path / "out", world.open_pack, splits=["test"])
    with pytest.raises(ConfigError, match="has no merged dataset\n  `dvc repro merge` makes it"):
        export(tmp_path, tmp_path / "out", world.open_pack)


def test_export_twice_gives_the_same_bytes(merged, dataroot, tmp_path):
    world, dataset = merged
    export(dataset, tmp_path / "out", world.open_pack)
    for path in sorted(p for p in dataroot.rglob("*") if p.is_file()):
        assert (tmp_path / "out" / path.relative_to(dataroot)).read_bytes() == path.read_bytes(), path


def test_scene_numbers_that_the_can_bus_api_refuses_are_never_given():
    names = nuscenes.scene_names(nuscenes.MAX_SCENES)
    assert names[0] == "scene-0001"
    assert names[160] == "scene-0169"
    assert names[-1] == "scene-9999"
    assert not {int(name[-4:]) for name in names} & nuscenes.BLOCKED_NUMBERS
    with pytest.raises(ConfigError, match=r"9979 scenes are more than the 9978 .*\n  select fewer: `roadmill export"):
        nuscenes.scene_names(nuscenes.MAX_SCENES + 1)
