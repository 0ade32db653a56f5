"""roadmill check: one thing is spoilt at a time, and exactly its rule says so."""

import json
import shutil

import numpy as np
import pytest

from stages.lib import nuscenes, pack
from stages.lib.errors import ConfigError
from stages.tools.check import check
from stages.tools.export import export
from stages.tools.rules import RULES

from . import dataset_fixture as fixture


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    world = fixture.build(root / "up")
    return world, fixture.run_merge(world, root)[0].data


@pytest.fixture(scope="module")
def exported(merged, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    export(merged[1], out, merged[0].open_pack)
    return out


class Spoilt:
    """A copy of a dataroot whose tables can be changed."""

    def __init__(self, source, root):
        self.root = shutil.copytree(source, root)
        self.folder = root / nuscenes.VERSION

    def rows(self, table):
        return json.loads((self.folder / f"{table}.json").read_text())

    def write(self, table, rows):
        (self.folder / f"{table}.json").write_text(json.dumps(rows))

    def change(self, table, row=0, **values):
        """Sets values of one row; its token."""
        rows = self.rows(table)
        rows[row].update(values)
        self.write(table, rows)
        return rows[row]["token"]

    def first(self, table, **values):
        """Number of the first row that has these values."""
        return next(n for n, row in enumerate(self.rows(table)) if all(row[k] == v for k, v in values.items()))

    def lidar(self, *, key=True):
        """Number of the first lidar row that is (not) a key frame."""
        return next(n for n, row in enumerate(self.rows("sample_data")) if "LIDAR" in row["filename"]
                    and row["is_key_frame"] is key)

    def file_of(self, row):
        return self.root / self.rows("sample_data")[row]["filename"]


def no_map_file(d):
    shutil.rmtree(d.root / "maps")
    return d.rows("map")[0]["token"], "does not exist under the dataroot"


def text_for_bool(d):
    return d.change("sample_data", d.lidar(key=False), is_key_frame="false"), "is_key_frame is 'false'"


def key_frame_missing(d):
    camera = d.first("sample_data", fileformat="jpg", is_key_frame=True)
    sample = d.rows("sample_data")[camera]["sample_token"]
    following = next(row["next"] for row in d.rows("sample") if row["token"] == sample)
    d.change("sample_data", camera, is_key_frame=False, sample_token=following)
    return sample, "0 key frames of CAM_FRONT, expected 1"


def key_frame_twice(d):
    camera = d.first("sample_data", fileformat="jpg", is_key_frame=False)
    d.change("sample_data", camera, is_key_frame=True)
    return d.rows("sample_data")[camera]["sample_token"], "2 key frames of CAM_FRONT, expected 1"


def sample_off_its_key_frame(d):
    stamp = d.rows("sample")[1]["timestamp"]
    return d.change("sample", 1, timestamp=stamp + 1), f"timestamp of the sample is {stamp + 1}, that of its LIDAR_TOP"


def float_stamp(d):
    sample = d.change("sample", 1, timestamp=float(d.rows("sample")[1]["timestamp"]))
    return sample, "expected integer µs since the epoch"


def broken_chain(d):
    row = d.lidar(key=False)
    return d.change("sample_data", row, prev=""), "prev is '', its neighbour in time is"


def second_head(d):
    return d.change("sample", 1, prev=""), "prev is ''"


def sweep_of_the_key_frame_before(d):
    rows = d.rows("sample_data")
    row = d.lidar(key=False)
    before = next(r["prev"] for r in d.rows("sample") if r["token"] == rows[row]["sample_token"])
    return d.change("sample_data", row, sample_token=before or d.rows("sample")[2]["token"]), "that follows it"


def pose_of_another_time(d):
    pose = d.rows("ego_pose")[3]
    d.change("ego_pose", 3, timestamp=pose["timestamp"] + 5)
    row = d.first("sample_data", ego_pose_token=pose["token"])
    return d.rows("sample_data")[row]["token"], "ego_pose is 5 µs later"


def long_quaternion(d):
    return d.change("ego_pose", 3, rotation=[1.0, 0.0, 0.0, 0.5]), "expected a unit quaternion w, x, y, z"


def camera_in_body_axes(d):
    row = next(n for n, r in enumerate(d.rows("calibrated_sensor")) if r["camera_intrinsic"])
    return d.change("calibrated_sensor", row, rotation=[1.0, 0.0, 0.0, 0.0]), "not the optical frame"


def missing_image(d):
    row = d.first("sample_data", fileformat="jpg")
    d.file_of(row).unlink()
    return d.rows("sample_data")[row]["token"], "does not exist"


def wrong_image_size(d):
    row = d.first("sample_data", fileformat="jpg", is_key_frame=True)
    return d.change("sample_data", row, width=17), "is (16, 12), the table says (17, 12)"


def absolute_filename(d):
    row = d.first("sample_data", fileformat="jpg")
    return d.change("sample_data", row, filename="/data/a.jpg"), "expected a relative path under samples/ or sweeps/"


def file_of_two_rows(d):
    row = d.first("sample_data", fileformat="jpg")
    name = d.rows("sample_data")[row + 1]["filename"]
    return d.change("sample_data", row, filename=name), f"{name} is the file of 2 rows"


def five_columns_that_are_none(d):
    row = d.lidar()
    points = pack.read_points(d.file_of(row).read_bytes()).copy()
    points[:, 4] = points[:, 4].astype(np.uint32).view(np.float32) + 1e-40
    d.file_of(row).write_bytes(points.tobytes())
    return d.rows("sample_data")[row]["token"], "the fifth column is no ring"


def cut_cloud(d):
    row = d.lidar(key=False)
    d.file_of(row).write_bytes(d.file_of(row).read_bytes()[:-4])
    return d.rows("sample_data")[row]["token"], "has 236 bytes, expected rows of 5 float32"


def points_that_are_none(d):
    row = d.lidar()
    points = pack.read_points(d.file_of(row).read_bytes()).copy()
    points[-1, 0] = np.nan
    d.file_of(row).write_bytes(points.tobytes())
    return d.rows("sample_data")[row]["token"], "not finite"


def radar_without_fields(d):
    key = d.rows("sample_data")[d.lidar()]
    scene = next(s for s in d.rows("sample") if s["token"] == key["sample_token"])["scene_token"]
    of_scene = [s["token"] for s in d.rows("sample") if s["scene_token"] == scene]
    rows = [r for r in d.rows("sample_data")
            if r["filename"].startswith("samples/LIDAR") and r["sample_token"] in of_scene]
    d.write("sensor", [*d.rows("sensor"), {"token": "radar", "channel": "RADAR_FRONT", "modality": "radar"}])
    mount = {**d.rows("calibrated_sensor")[0], "token": "radar", "sensor_token": "radar", "camera_intrinsic": []}
    d.write("calibrated_sensor", [*d.rows("calibrated_sensor"), mount])
    tokens = ["", *[f"radar{n}" for n in range(len(rows))], ""]
    new, poses = [], []
    for n, row in enumerate(rows):
        name = f"samples/RADAR_FRONT/{n}.pcd"
        (d.root / name).parent.mkdir(exist_ok=True)
        (d.root / name).write_bytes(RADAR if n else RADAR.replace(b" z ", b" "))
        new.append({**row, "token": tokens[n + 1], "calibrated_sensor_token": "radar", "ego_pose_token": f"pose{n}",
                    "filename": name, "prev": tokens[n], "next": tokens[n + 2]})
        poses.append({**d.rows("ego_pose")[0], "token": f"pose{n}", "timestamp": row["timestamp"]})
    d.write("sample_data", d.rows("sample_data") + new)
    d.write("ego_pose", d.rows("ego_pose") + poses)
    return "radar0", "no binary PCD 0.7 with 18 fields"


RADAR_FIELDS = b" ".join([b"x", b"y", b"z", *[b"f%d" % n for n in range(15)]])
RADAR = b"\n".join([b"# .PCD v0.7", b"VERSION 0.7", b"FIELDS " + RADAR_FIELDS, b"SIZE" + b" 4" * 18,
                    b"TYPE" + b" F" * 18, b"COUNT" + b" 1" * 18, b"WIDTH 1", b"HEIGHT 1",
                    b"VIEWPOINT 0 0 0 1 0 0 0", b"POINTS 1", b"DATA binary", bytes(72)])


def intrinsics_of_the_raw_image(d):
    row = next(n for n, r in enumerate(d.rows("calibrated_sensor")) if r["camera_intrinsic"])
    raw = [[20.0, 0.0, 16.0], [0.0, 20.0, 12.0], [0.0, 0.0, 1.0]]
    return d.change("calibrated_sensor", row, camera_intrinsic=raw), "outside the saved image"


def intrinsics_of_a_lidar(d):
    row = next(n for n, r in enumerate(d.rows("calibrated_sensor")) if not r["camera_intrinsic"])
    return d.change("calibrated_sensor", row, camera_intrinsic=[[1.0]]), "of a lidar is [[1.0]], expected []"


def token_twice(d):
    rows = d.rows("log")
    d.write("log", [*rows, rows[0]])
    return rows[0]["token"], "the token stands twice in log"


def dangling_reference(d):
    return d.change("instance", 0, category_token="gone"), "category_token of this instance is 'gone', which no"


def miscounted_instance(d):
    return d.change("instance", 0, nbr_annotations=9), "the instance says 9 annotations and has 4"


def unchained_box(d):
    rows = d.rows("sample_annotation")
    return d.change("sample_annotation", d.first("sample_annotation", token=rows[0]["next"]), prev=""), "prev is ''"


def uncounted_points(d):
    row = d.first("sample_annotation", num_lidar_pts=5)
    return d.change("sample_annotation", row, num_lidar_pts=50), "num_lidar_pts is 50, its key frame has 5 points"


def fractional_points(d):
    return d.change("sample_annotation", 3, num_lidar_pts=4.0), "expected whole numbers"


def visibility_of_nothing(d):
    return d.change("sample_annotation", 3, visibility_token=""), "visibility_token is '', which no visibility has"


def two_attributes(d):
    tokens = [row["token"] for row in d.rows("attribute")][:2]
    return d.change("sample_annotation", 3, attribute_tokens=tokens), "expected one known at most"


def reserved_split(d):
    splits = d.rows("splits")
    splits["val"] = splits.pop("roadmill_val")
    d.write("splits", splits)
    return "val", "the devkit takes val for nuScenes' own split"


def scene_in_two_splits(d):
    splits = d.rows("splits")
    splits["roadmill_val"] += splits["roadmill_train"][:1]
    d.write("splits", splits)
    rows = d.rows("sample_annotation")
    d.write("sample_annotation", [{**row, "automatic_annotation": False, "source": "human"} for row in rows])
    return "scene-0001", "is in the splits roadmill_train and roadmill_val"


def nothing_to_score(d):
    val = next(s["token"] for s in d.rows("scene") if s["name"] == "scene-0003")
    samples = {s["token"] for s in d.rows("sample") if s["scene_token"] == val}
    boxes = [row for row in d.rows("sample_annotation") if row["sample_token"] not in samples]
    d.write("sample_annotation", boxes)
    d.write("instance", [i for i in d.rows("instance") if i["token"] in {row["instance_token"] for row in boxes}])
    return "roadmill_val", "no box of roadmill_val is of a detection class and has points"


def short_category(d):
    used = {row["category_token"] for row in d.rows("instance")}
    row = d.first("category", name="human.pedestrian.adult")
    assert d.rows("category")[row]["token"] in used
    return d.change("category", row, name="pedestrian"), "'pedestrian' is none of nuScenes' 23 long names"


def lidar_by_another_name(d):
    d.change("sensor", d.first("sensor", channel="LIDAR_TOP"), channel="LIDAR_CONCAT")
    return d.rows("scene")[0]["token"], "no channel LIDAR_TOP"


def blocked_scene_name(d):
    scene = d.change("scene", 0, name="scene-0161")
    splits = d.rows("splits")
    splits["roadmill_train"][0] = "scene-0161"
    d.write("splits", splits)
    for path in (d.root / "can_bus").glob("scene-0001_*"):
        path.rename(path.with_name(path.name.replace("0001", "0161")))
    return scene, "the scene is called scene-0161"


def pose_keys_in_another_order(d):
    path = d.root / "can_bus" / "scene-0002_pose.json"
    path.write_text(json.dumps([dict(reversed(row.items())) for row in json.loads(path.read_text())]))
    return path.name, "in this order, which loaders rely on"


def automatic_truth(d):
    val = next(s["token"] for s in d.rows("scene") if s["name"] == "scene-0003")
    samples = {s["token"] for s in d.rows("sample") if s["scene_token"] == val}
    row = next(n for n, r in enumerate(d.rows("sample_annotation")) if r["sample_token"] in samples)
    return d.change("sample_annotation", row, source="geometric"), "a box of roadmill_val comes from geometric"


def trained_truth(d):
    return d.change("sample_annotation", 0, source="truth"), "a box of roadmill_train comes from truth"


CASES = [
    ("T1", no_map_file), ("T2", text_for_bool), ("T3", key_frame_missing), ("T3", key_frame_twice),
    ("T4", sample_off_its_key_frame), ("T4", float_stamp), ("T5", broken_chain), ("T5", second_head),
    ("T6", sweep_of_the_key_frame_before), ("T7", pose_of_another_time), ("T8", long_quaternion),
    ("T8", camera_in_body_axes), ("T9", missing_image), ("T9", wrong_image_size), ("T9", absolute_filename),
    ("T9", file_of_two_rows), ("T10", five_columns_that_are_none), ("T10", cut_cloud), ("T10", points_that_are_none),
    ("T11", radar_without_fields), ("T12", intrinsics_of_the_raw_image), ("T12", intrinsics_of_a_lidar),
    ("T13", token_twice), ("T13", dangling_reference), ("T13", miscounted_instance), ("T14", unchained_box),
    ("T15", uncounted_points), ("T15", fractional_points), ("T16", visibility_of_nothing), ("T16", two_attributes),
    ("E1", reserved_split), ("E1", scene_in_two_splits), ("E2", nothing_to_score), ("E3", short_category),
    ("E4", lidar_by_another_name), ("M1", blocked_scene_name), ("M1", pose_keys_in_another_order),
    ("L1", automatic_truth), ("L1", trained_truth)]


@pytest.mark.parametrize(("rule", "spoil"), CASES, ids=[f"{rule}-{spoil.__name__}" for rule, spoil in CASES])
def test_each_fault_is_found_by_its_rule_alone(exported, tmp_path, rule, spoil):
    spoilt = Spoilt(exported, tmp_path / "out")
    token, words = spoil(spoilt)
    found = {finding.rule: finding for finding in check(spoilt.root) if finding.count}
    assert list(found) == [rule], {r: f.sentence for r, f in found.items()}
    assert found[rule].token == token
    assert words in found[rule].sentence


def test_every_rule_has_a_case():
    assert {rule for rule, _ in CASES} == set(RULES)
    assert list(RULES) == [*[f"T{n}" for n in range(1, 17)], "E1", "E2", "E3", "E4", "M1", "L1"]


def test_rules_are_counted_and_named(exported, tmp_path):
    spoilt = Spoilt(exported, tmp_path / "out")
    rows = spoilt.rows("sample_data")
    spoilt.write("sample_data", [{**row, "is_key_frame": "false"} if not row["is_key_frame"] else row for row in rows])
    found = check(spoilt.root)[1]
    assert (found.rule, found.name, found.count) == ("T2", "key_frame_flag", 87 - 24)


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda d: (d.folder / "visibility.json").unlink(), "visibility.json is missing or no JSON array of objects"),
    (lambda d: (d.folder / "log.json").write_text("{}"), "log.json is missing or no JSON array of objects"),
    (lambda d: d.write("sample", [{"token": "a"}]), "a row of sample.json has no 'next'")])
def test_tables_that_cant_be_read_are_t1_and_no_other_rule_is_asked(exported, tmp_path, spoil, sentence):
    spoilt = Spoilt(exported, tmp_path / "out")
    spoil(spoilt)
    (found,) = check(spoilt.root)
    assert (found.rule, found.sentence) == ("T1", sentence)


def test_results_must_have_every_sample_of_a_split(exported, tmp_path):
    spoilt = Spoilt(exported, tmp_path / "out")
    val = next(s["token"] for s in spoilt.rows("scene") if s["name"] == "scene-0003")
    tokens = [s["token"] for s in spoilt.rows("sample") if s["scene_token"] == val]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"meta": {}, "results": {token: [] for token in tokens}}))
    assert not any(f.count for f in check(spoilt.root, results=path))
    path.write_text(json.dumps({"meta": {}, "results": {token: [] for token in tokens[1:]}}))
    (found,) = [f for f in check(spoilt.root, results=path) if f.count]
    assert (found.rule, found.count, found.token) == ("E2", 1, tokens[0])


def test_a_merged_dataset_is_checked_in_its_packs(merged, tmp_path):
    world, dataset = merged
    assert [f for f in check(dataset, open_pack=world.open_pack) if f.count] == []
    torn = tmp_path / "torn.tar"
    key = next(iter(world.packs))
    torn.write_bytes(world.packs[key].read_bytes().replace(b"samples/CAM_FRONT", b"samples/CAM_FRONX", 1))
    found = check(dataset, open_pack=lambda digest: torn if digest == key else world.packs[digest])
    assert [(f.rule, f.count) for f in found if f.count] == [("T9", 10)], "the torn member and those behind it"


def test_check_says_what_it_needs(merged, exported, tmp_path):
    with pytest.raises(ConfigError, match=r"is a merged dataset.*\n  run `roadmill check` in the checkout"):
        check(merged[1])
    with pytest.raises(ConfigError, match=r"has the versions none, expected one folder with scene.json, like"):
        check(tmp_path)
    shutil.copytree(exported, tmp_path / "out")
    shutil.copytree(exported / nuscenes.VERSION, tmp_path / "out" / "v1.0-mini")
    with pytest.raises(ConfigError, match=r"has the versions v1.0-mini, v1.0-roadmill, expected one"):
        check(tmp_path / "out")
