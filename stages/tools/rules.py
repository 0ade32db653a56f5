"""The rules of `roadmill check`: each yields (token, what is wrong there) for every row that offends it.

T1 to T16 are what nuscenes-devkit 1.2.0 and the loaders built on it take for granted and seldom check, E1 to E4 what
its detection evaluation needs, M1 its CAN bus expansion, and L1 keeps ground truth apart from what is learned from. A
rule passes over rows that it can't find; T13 names those.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.splits import create_splits_scenes
from PIL import Image, UnidentifiedImageError

from stages.lib import canbus, geometry
from stages.lib.boxes import count_inside
from stages.lib.nuscenes import BLOCKED_NUMBERS, CATEGORIES
from stages.tools.view import View, is_key, read_json

Offences = Iterator[tuple[str, str]]
CAN_MESSAGES = {"ms_imu", "pose", "steeranglefeedback", "vehicle_monitor", "zoesensors", "zoe_veh_info", "meta",
                "route", "signals"}
RADAR_HEADER = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")
REFERENCES = (
    ("sample", "scene_token", "scene"), ("sample_data", "sample_token", "sample"), ("scene", "log_token", "log"),
    ("sample_data", "ego_pose_token", "ego_pose"), ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
    ("calibrated_sensor", "sensor_token", "sensor"), ("sample_annotation", "sample_token", "sample"),
    ("sample_annotation", "instance_token", "instance"), ("instance", "category_token", "category"),
    ("instance", "first_annotation_token", "sample_annotation"), ("scene", "first_sample_token", "sample"),
    ("instance", "last_annotation_token", "sample_annotation"), ("scene", "last_sample_token", "sample"))


def tables_complete(view: View) -> Offences:
    if not view.rows("map"):
        yield "map", "map.json is empty, the devkit reads its first record"
    for row in view.rows("map"):
        if not row["filename"] or not (view.root / row["filename"]).is_file():
            yield row["token"], f"map {row['filename']!r} does not exist under the dataroot"
    maps = Counter(log for row in view.rows("map") for log in row["log_tokens"])
    for log in view.rows("log"):
        if maps[log["token"]] != 1:
            yield log["token"], f"the log is in {maps[log['token']]} maps, expected one"


def key_frame_flag(view: View) -> Offences:
    for data in view.rows("sample_data"):
        if not isinstance(data["is_key_frame"], bool):
            yield data["token"], f"is_key_frame is {data['is_key_frame']!r}, expected true or false"


def one_key_frame(view: View) -> Offences:
    keys = Counter((data["sample_token"], channel) for (_, channel), rows in view.by_chain.items() for data in rows
                   if is_key(data))
    for scene, channel in view.by_chain:
        for sample in view.samples_of.get(scene, []):
            num = keys[sample["token"], channel]
            if num != 1:
                yield sample["token"], f"the sample has {num} key frames of {channel}, expected 1"


def stamps(view: View) -> Offences:
    for table in ("sample", "sample_data", "ego_pose"):
        for row in view.rows(table):
            value = row["timestamp"]
            if type(value) is not int or not 10**15 <= value < 10**16:
                yield row["token"], f"timestamp of this {table} is {value!r}, expected integer µs since the epoch"
    for scene in view.samples_of:
        for data in filter(is_key, view.by_chain.get((scene, "LIDAR_TOP"), [])):
            sample = view.find("sample", data["sample_token"])
            if sample["timestamp"] != data["timestamp"]:
                yield sample["token"], (f"timestamp of the sample is {sample['timestamp']}, that of its LIDAR_TOP key "
                                        f"frame {data['timestamp']}")


def chains(view: View) -> Offences:
    for rows in [*view.samples_of.values(), *view.by_chain.values()]:
        yield from _chain_faults(rows, [row["timestamp"] for row in rows])


def _chain_faults(rows: list[dict], times: list[int]) -> Offences:
    """Rows in order of time: prev and next are their neighbours' tokens, '' at the ends, and times grow."""
    tokens = ["", *[row["token"] for row in rows], ""]
    for n, row in enumerate(rows):
        if n and times[n] <= times[n - 1]:
            yield row["token"], f"has the timestamp {times[n]}, the one before it {times[n - 1]}"
        elif row["prev"] != tokens[n] or row["next"] != tokens[n + 2]:
            side, wanted = ("prev", tokens[n]) if row["prev"] != tokens[n] else ("next", tokens[n + 2])
            yield row["token"], f"{side} is {row[side]!r}, its neighbour in time is {wanted!r}"


def sweeps_follow(view: View) -> Offences:
    for (scene, channel), rows in view.by_chain.items():
        samples = view.samples_of.get(scene, [])
        following = samples[-1]["token"] if samples else ""
        by_chain = [""] * len(rows)
        for n in range(len(rows) - 1, -1, -1):
            following = rows[n]["sample_token"] if is_key(rows[n]) else following
            by_chain[n] = following
        for data, wanted in zip(rows, by_chain):
            by_time = view.following(scene, data["timestamp"])
            if not is_key(data) and data["sample_token"] not in (wanted, by_time):
                yield data["token"], (f"a sweep of {channel} belongs to the sample {data['sample_token']}, the key "
                                      f"frame that follows it to {wanted}")


def ego_poses(view: View) -> Offences:
    uses = Counter(data["ego_pose_token"] for data in view.rows("sample_data"))
    for data in view.rows("sample_data"):
        pose = view.find("ego_pose", data["ego_pose_token"])
        late_us = pose["timestamp"] - data["timestamp"] if pose else 0
        if abs(late_us) > 1:
            yield data["token"], f"its ego_pose is {late_us} µs later, expected its own stamp"
        elif uses[data["ego_pose_token"]] > 1:
            yield data["token"], f"shares its ego_pose with {uses[data['ego_pose_token']] - 1} others"


def rotations(view: View) -> Offences:
    for table in ("ego_pose", "calibrated_sensor", "sample_annotation"):
        for row in view.rows(table):
            q = row["rotation"]
            if len(q) != 4 or not abs(math.hypot(*q) - 1) < 1e-3:
                yield row["token"], f"rotation of this {table} is {q}, expected a unit quaternion w, x, y, z"
    for row in view.rows("calibrated_sensor"):
        if view.find("sensor", row["sensor_token"]).get("modality") == "camera" and len(row["rotation"]) == 4:
            R_ego_cam = geometry.rotation(np.array(row["rotation"])).as_matrix()
            if abs(R_ego_cam[2, 2]) > 0.8 or R_ego_cam[2, 1] > -0.5:
                yield row["token"], "the camera's z axis does not look ahead with y down: not the optical frame"


def filenames(view: View) -> Offences:
    uses = Counter(data["filename"] for data in view.rows("sample_data"))
    for data in view.rows("sample_data"):
        name, modality = data["filename"], view.sensor(data).get("modality")
        if not re.match(r"(samples|sweeps)/[^\\]+$", name) or ".." in name.split("/"):
            yield data["token"], f"filename is {name!r}, expected a relative path under samples/ or sweeps/"
        elif uses[name] > 1:
            yield data["token"], f"{name} is the file of {uses[name]} rows"
        elif data["fileformat"] not in ("jpg", "png", "pcd"):
            yield data["token"], f"fileformat is {data['fileformat']!r}, expected jpg, png or pcd"
        elif view.files.size(name) is None:
            yield data["token"], f"{name} does not exist"
        elif modality == "camera" and is_key(data):
            is_px = _image_size_px(view.files.read(name))
            if is_px != (data["width"], data["height"]):
                yield data["token"], f"{name} is {is_px or 'no image'}, the table says {data['width'], data['height']}"


def _image_size_px(content: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None


def lidar_files(view: View) -> Offences:
    for data in _of_modality(view, "lidar"):
        name, size = data["filename"], view.files.size(data["filename"])
        if not name.endswith(".bin"):
            yield data["token"], f"filename is {name}, the devkit reads lidar from .bin alone"
        elif size is None:
            continue
        elif size == 0 or size % 20:
            yield data["token"], f"{name} has {size} bytes, expected rows of 5 float32"
        elif is_key(data):
            points = _points(view, data)
            ring = points[:, 4]
            if not np.isfinite(points).all() or np.abs(points[:, :3]).max() > 1000:
                yield data["token"], f"{name} has points that are not finite or more than 1 km away"
            elif (ring != np.round(ring)).any() or ring.min() < 0 or ring.max() > 1024:
                yield data["token"], f"{name}: the fifth column is no ring: it is not x, y, z, intensity, ring"


def _of_modality(view: View, modality: str) -> Iterable[dict]:
    return (data for data in view.rows("sample_data") if view.sensor(data).get("modality") == modality)


def _points(view: View, data: dict) -> np.ndarray:
    return np.frombuffer(view.files.read(data["filename"]), "<f4").reshape(-1, 5)


def radar_files(view: View) -> Offences:
    for data in _of_modality(view, "radar"):
        if view.files.size(data["filename"]) is None:
            continue
        head = view.files.read(data["filename"])[:4096].decode("ascii", "replace")
        lines = [line.split() for line in head.split("\n")[:16]]
        header = {line[0]: line[1:] for line in lines if line and line[0] in RADAR_HEADER}
        right = (tuple(header) == RADAR_HEADER and header["VERSION"] == ["0.7"] and len(header["FIELDS"]) == 18
                 and header["WIDTH"] > ["0"] and header["DATA"] == ["binary"])
        if not right:
            yield data["token"], f"{data['filename']} is no binary PCD 0.7 with 18 fields and points in it"


def intrinsics(view: View) -> Offences:
    size_px = {data["calibrated_sensor_token"]: (data["width"], data["height"]) for data in view.rows("sample_data")}
    for row in view.rows("calibrated_sensor"):
        K, (width, height) = row["camera_intrinsic"], size_px.get(row["token"], (math.inf, math.inf))
        modality = view.find("sensor", row["sensor_token"]).get("modality")
        if modality != "camera":
            if K:
                yield row["token"], f"camera_intrinsic of a {modality} is {K}, expected []"
        elif np.shape(K) != (3, 3) or K[2] != [0, 0, 1] or min(K[0][0], K[1][1]) <= 0:
            yield row["token"], f"camera_intrinsic is {K}, expected 3 x 3 with f > 0 and the last row 0, 0, 1"
        elif not (0 < K[0][2] < width and 0 < K[1][2] < height):
            yield row["token"], f"the principal point {K[0][2], K[1][2]} is outside the saved image, {width, height} px"


def references(view: View) -> Offences:
    for table, rows in view.tables.items():
        seen = set()
        for row in rows:
            if row["token"] in seen:
                yield row["token"], f"the token stands twice in {table}"
            seen.add(row["token"])
    for table, key, target in REFERENCES:
        for row in view.rows(table):
            if row[key] not in view.by_token[target]:
                yield row["token"], f"{key} of this {table} is {row[key]!r}, which no {target} has"
    for scene in view.rows("scene"):
        tokens = [sample["token"] for sample in view.samples_of.get(scene["token"], [])]
        ends = [scene["first_sample_token"], scene["last_sample_token"]]
        if len(tokens) != scene["nbr_samples"] or tokens[:1] + tokens[-1:] != ends:
            yield scene["token"], (f"the scene says {scene['nbr_samples']} samples and has {len(tokens)}, or its first "
                                   "or last is another")
    for instance, boxes in view.by_instance.items():
        row = view.find("instance", instance)
        if row and (len(boxes) != row["nbr_annotations"] or boxes[0]["token"] != row["first_annotation_token"]
                    or boxes[-1]["token"] != row["last_annotation_token"]):
            yield instance, (f"the instance says {row['nbr_annotations']} annotations and has {len(boxes)}, or its "
                             "first or last is another")
    for instance in sorted(view.by_token["instance"].keys() - view.by_instance.keys()):
        yield instance, "the instance has no annotation"


def annotation_chains(view: View) -> Offences:
    for boxes in view.by_instance.values():
        yield from _chain_faults(boxes, [view.time(box) for box in boxes])


def point_counts(view: View) -> Offences:
    for box in view.rows("sample_annotation"):
        nums = box["num_lidar_pts"], box["num_radar_pts"]
        if any(type(num) is not int or num < 0 for num in nums):
            yield box["token"], f"num_lidar_pts and num_radar_pts are {nums}, expected whole numbers"
    for (_, channel), rows in view.by_chain.items():
        labelled = [data for data in rows if is_key(data) and view.boxes_of.get(data["sample_token"])]
        if channel == "LIDAR_TOP" and labelled and view.files.size(labelled[0]["filename"]):
            yield from _miscounted(view, labelled[0])


def _miscounted(view: View, data: dict) -> Offences:
    """Boxes of a lidar key frame whose num_lidar_pts is off by more than 10 % and 3 points."""
    sensor = view.find("calibrated_sensor", data["calibrated_sensor_token"])
    pose = view.find("ego_pose", data["ego_pose_token"])
    if not pose or view.files.size(data["filename"]) % 20:
        return
    T_map_sensor = (geometry.transform(pose["translation"], pose["rotation"])
                    @ geometry.transform(sensor["translation"], sensor["rotation"]))
    xyz = geometry.apply(T_map_sensor, _points(view, data)[:, :3].astype(float))
    boxes = view.boxes_of[data["sample_token"]]
    arrays = np.array([[*box["translation"], box["size"][1], box["size"][0], box["size"][2],
                        geometry.yaw_rad(np.array(box["rotation"]))] for box in boxes])
    for box, num in zip(boxes, count_inside(xyz, arrays).tolist()):
        said = box["num_lidar_pts"]
        if type(said) is int and abs(said - num) > max(3, 0.1 * num):
            yield box["token"], f"num_lidar_pts is {said}, its key frame has {num} points in the box"


def visibility_and_attributes(view: View) -> Offences:
    for box in view.rows("sample_annotation"):
        unknown = [token for token in box["attribute_tokens"] if token not in view.by_token["attribute"]]
        if box["visibility_token"] not in view.by_token["visibility"]:
            yield box["token"], f"visibility_token is {box['visibility_token']!r}, which no visibility has"
        elif len(box["attribute_tokens"]) > 1 or unknown:
            yield box["token"], f"attribute_tokens are {box['attribute_tokens']}, expected one known at most"


def splits_file(view: View) -> Offences:
    if not isinstance(view.splits, dict) or not view.splits:
        yield "splits.json", "splits.json is missing or no JSON object of split names"
        return
    names = Counter(scene["name"] for scene in view.rows("scene"))
    owner: dict[str, str] = {}
    for split, scenes in view.splits.items():
        if split in create_splits_scenes():
            yield split, f"the devkit takes {split} for nuScenes' own split; a name like roadmill_{split} is free"
        if not isinstance(scenes, list):
            yield split, f"the split is {scenes!r}, expected a list of scene names"
            continue
        for scene in scenes:
            if names[scene] != 1:
                yield scene, f"{names[scene]} scenes are called {scene}, as split {split} does"
            elif owner.setdefault(scene, split) != split:
                yield scene, f"{scene} is in the splits {owner[scene]} and {split}"


def evaluable(view: View) -> Offences:
    for split, scenes in view.scenes_of_splits.items():
        samples = [sample for scene in scenes for sample in view.samples_of.get(scene["token"], [])]
        if not split.endswith("train"):
            counted = any(box["num_lidar_pts"] and category_to_detection_name(view.category(box))
                          for sample in samples for box in view.boxes_of.get(sample["token"], []))
            if not counted:
                yield split, f"no box of {split} is of a detection class and has points: the devkit's evaluation raises"
        results = (view.results or {}).get("results", {})
        missing = [sample["token"] for sample in samples if sample["token"] not in results]
        if len(missing) < len(samples):
            yield from ((token, f"the results have other samples of {split} but not this one") for token in missing)


def category_names(view: View) -> Offences:
    for token in sorted({row["category_token"] for row in view.rows("instance")}):
        name = view.find("category", token).get("name")
        if name is not None and name not in CATEGORIES:
            yield token, f"the category {name!r} is none of nuScenes' 23 long names: evaluation drops its boxes"


def lidar_top(view: View) -> Offences:
    for scene in view.rows("scene"):
        if (scene["token"], "LIDAR_TOP") not in view.by_chain:
            yield scene["token"], "the scene has no channel LIDAR_TOP, from which evaluation measures ranges"


def can_bus(view: View) -> Offences:
    names = {scene["name"]: scene["token"] for scene in view.rows("scene")}
    for name, token in names.items():
        if not re.fullmatch(r"scene-\d{4}", name) or int(name[-4:]) in BLOCKED_NUMBERS:
            yield token, f"the scene is called {name}, NuScenesCanBus takes scene-NNNN without its blacklist"
    for path in sorted((view.root / "can_bus").glob("*.json")):
        scene, _, message = path.stem.partition("_")
        if scene not in names or message not in CAN_MESSAGES:
            yield path.name, f"can_bus/{path.name} is of no scene here, or no message of nuScenes"
        elif message == "pose":
            yield from _pose_faults(path)


def _pose_faults(path: Path) -> Offences:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        yield path.name, "it is no JSON array of objects"
        return
    if any(tuple(row) != canbus.POSE_KEYS for row in rows):
        yield path.name, f"keys of the poses are not {', '.join(canbus.POSE_KEYS)} in this order, which loaders rely on"
    times = [row.get("utime") for row in rows]
    if not all(type(t) is int and 10**15 <= t < 10**16 for t in times) or times != sorted(set(times)):
        yield path.name, "utime of the poses is not integer µs in strict order"


def label_sources(view: View) -> Offences:
    for split, scenes in view.scenes_of_splits.items():
        for scene in scenes:
            for sample in view.samples_of.get(scene["token"], []):
                for box in view.boxes_of.get(sample["token"], []):
                    source = box.get("source", "human")
                    automatic = box.get("automatic_annotation", False) or source not in ("human", "truth")
                    if source == "truth" if split.endswith("train") else automatic:
                        yield box["token"], f"a box of {split} comes from {source}"


RULES: dict[str, Callable[[View], Offences]] = {
    "T1": tables_complete, "T2": key_frame_flag, "T3": one_key_frame, "T4": stamps, "T5": chains, "T6": sweeps_follow,
    "T7": ego_poses, "T8": rotations, "T9": filenames, "T10": lidar_files, "T11": radar_files, "T12": intrinsics,
    "T13": references, "T14": annotation_chains, "T15": point_counts, "T16": visibility_and_attributes,
    "E1": splits_file, "E2": evaluable, "E3": category_names, "E4": lidar_top, "M1": can_bus, "L1": label_sources}
