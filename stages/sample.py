"""A scene's pack of images, sweeps and poses, and its fragment of the nuScenes tables.

Key frames are frames of the reference channel with one frame of every other channel near them; what lies between them
are sweeps. The recording is read once, in receive order, from the scene's first wanted message to its last.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stages.lib import calibration, fragment, keyframes, packets, preview, report, tables
from stages.lib.bag import Bag, Message, ns_to_us
from stages.lib.calibration import Sensor
from stages.lib.cameras import Rectifier
from stages.lib.errors import ConfigError, DataError
from stages.lib.knobs import knob, near_miss
from stages.lib.pack import PackWriter
from stages.lib.poses import Poses
from stages.lib.sensor_files import TURN_SLACK, CameraFiles, LidarFiles
from stages.lib.stage import Facts, Item, Out, Result, Summary, Upstream
from stages.lib.video_files import VideoFiles
from stages.lib.videodrive import open_drive

INPUTS = ("ingest", "split")
NEAR_US = 1_000_000  # silences of the trajectory so far from a scene may touch its frames
RATE_SLACK = 1.02  # a channel of 10 Hz may be measured as 9.9

# Frames dropped because no ego pose is known around them, key frames lost for want of a channel, points that are none,
# clouds that lack a field, video pictures that were decoded, and those that were wanted and could not be.
COUNTS = ("num_no_pose", "num_lost_key_frames", "num_invalid_points", "num_clouds_without_intensity",
          "num_clouds_without_ring", "num_clouds_without_time", "num_decoded_pictures", "num_lost_pictures")
SCENES = {"scene_token": pl.String, "scene_name": pl.String, "reference_channel": pl.String, "num_samples": pl.Int64,
          "num_sample_data": pl.Int64, "pack_digest": pl.String, "bytes": pl.Int64, **dict.fromkeys(COUNTS, pl.Int64)}


@dataclass(frozen=True)
class Knobs:
    """What is kept of a scene, and what becomes of its images and points."""

    reference_channel: str = knob("the channel whose frames are the key frames")
    fallback_channel: str | None = knob("reference of drives without reference_channel; null: those are an error")
    keyframe_hz: float = knob("key frames a second", above=0)
    tolerance_periods: float = knob("a key frame's frame of another channel is at most so many of that channel's "
                                    "periods away; 0.5 leaves no room for jitter", above=0)
    min_key_frames: int = knob("a scene with fewer is an error", low=1)
    camera_sweep_hz: float | None = knob("camera frames kept a second, key frames aside; null: all, 0: none", low=0)
    lidar_sweep_hz: float | None = knob("lidar frames kept a second, key frames aside; null: all, 0: none", low=0)
    undistort: bool = knob("take the lens distortion out of images; false: it stays, and camera_distortion says so")
    image_width_px: int | None = knob("wider images are scaled down to this width; null: none is", low=16)
    jpeg_quality: int = knob("of images that are encoded anew; a JPEG that stays as it is, is copied", low=1, high=100)
    motion_compensate: bool = knob("points that know their time move to where a sensor at the frame's stamp sees them")
    max_failed_ratio: float = knob("scenes that may fail by the recording's fault", low=0, high=1, in_key=False)
    num_pictures: int = knob("scenes shown in the report", low=0, in_key=False)


Files = CameraFiles | VideoFiles | LidarFiles
"""What a channel's messages become in the pack."""


@dataclass(frozen=True)
class Scene:
    """A stretch [start_us, end_us) of a drive, and what is known of that drive.

    pose_gaps_us  (last stamp before, first stamp after) of silences over which no pose is interpolated
    """

    name: str
    drive_name: str
    start_us: int
    end_us: int
    sensors: Mapping[str, Sensor]
    poses: Poses
    pose_gaps_us: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Selection:
    """The frames that go into a scene's pack.

    frames      INDEX columns and `sample`: number of the key frame that it belongs to, -1 for a sweep
    sample_us   (S,) int64 stamps of the key frames
    periods_us  channel -> median time from frame to frame
    missing     channel -> frames of the reference channel that had none of it near enough
    """

    frames: pl.DataFrame
    sample_us: np.ndarray
    periods_us: Mapping[str, float]
    reference: str
    missing: Mapping[str, int]


def plan(cfg: Knobs, inputs: Mapping[str, Upstream]) -> list[Item]:
    """One item per scene of the split. Raises ConfigError where the reference channel is slower than keyframe_hz."""
    folder = inputs["ingest"].folder
    recordings = dict(tables.read(folder / "drives.parquet", ["drive_name", "recording_digest"]).iter_rows())
    rates = tables.read(folder / "channels.parquet", ["drive_token", "channel", "rate_hz"])
    rates_hz = {token: dict(zip(part["channel"], part["rate_hz"]))
                for (token,), part in rates.partition_by("drive_token", as_dict=True).items()}
    outputs = {result.name: result.outputs for result in inputs["ingest"].results}
    silences_us = defaultdict(list)
    for token, *bounds in tables.read(folder / "gaps.parquet").filter(pl.col("channel") == "ego_pose").select(
            "drive_token", "start_us", "end_us").sort("start_us").iter_rows():
        silences_us[token].append(bounds)
    items = []
    for scene in tables.read(inputs["split"].folder / "scenes.parquet", list(tables.SCENES)).iter_rows(named=True):
        drive, known = scene["drive_name"], rates_hz[scene["drive_token"]]
        near = [bounds for bounds in silences_us[scene["drive_token"]]
                if bounds[1] > scene["start_us"] - NEAR_US and bounds[0] < scene["end_us"] + NEAR_US]
        reference = reference_channel(cfg, known, drive)
        _check_rate(cfg, reference, known[reference], drive)
        items.append(Item(scene["scene_name"], {**scene, "pose_gaps_us": near}, {
            "recording": recordings[drive], "calibration": outputs[drive]["calibration.json"].digest,
            **{role: outputs[drive][f"{role}.parquet"].digest for role in ("trajectory", "index", "signals")}}))
    return items


def run(cfg: Knobs, item: Item, inputs: Mapping[str, Path], out: Path) -> Facts:
    """pack.tar, its tables sample, sample_data, ego_pose and calibrated_sensor, the scene's rows of trajectory and
    signals (all .parquet), and preview.jpg: the middle key frame's points in a camera.

    Raises DataError for fewer key frames than wanted and for an image or cloud that can't be read, ConfigError where a
    channel that key frames need is slower than keyframe_hz.
    """
    token, counts = item.params["scene_token"], Counter(dict.fromkeys(COUNTS, 0))
    sensors, poses = calibration.read(inputs["calibration"]), Poses.read(inputs["trajectory"])
    scene = Scene(**{name: item.params[name] for name in ("drive_name", "start_us", "end_us", "pose_gaps_us")},
                  name=item.params["scene_name"], sensors=sensors, poses=poses)
    rectifiers = {channel: _rectifier(cfg, sensor) for channel, sensor in sensors.items()
                  if sensor.modality == "camera"}
    chosen = select(cfg, scene, tables.read(inputs["index"]), counts)
    files = {channel: _camera_files(cfg, sensor, rectifiers[channel], chosen, counts) if channel in rectifiers else
             LidarFiles(sensor, poses if cfg.motion_compensate else None, chosen.periods_us[channel], counts)
             for channel, sensor in sensors.items()}
    stored, pack = _write_pack(scene, files, chosen, inputs["recording"], out / "pack.tar")

    sample = fragment.samples(token, chosen.sample_us)
    data = fragment.sample_data(stored, sample, sensors, rectifiers, pack.digest)
    pose = fragment.ego_poses(data, poses)
    sensor = fragment.calibrated_sensors(token, sorted(data["channel"].unique()), sensors, rectifiers)
    during = pl.col("stamp_us").is_between(scene.start_us, scene.end_us, closed="left")
    for name, table in (("sample", sample), ("sample_data", data), ("ego_pose", pose), ("calibrated_sensor", sensor),
                        *((name, tables.read(inputs[name]).filter(during)) for name in ("trajectory", "signals"))):
        tables.write(table, out / f"{name}.parquet")
    picture = preview.lidar_in_camera(data, pose, sensor, out / "pack.tar")
    if picture:
        (out / "preview.jpg").write_bytes(picture)
    return {"scene_token": token, "reference_channel": chosen.reference, "num_samples": len(sample),
            "num_sample_data": len(data), "pack_digest": pack.digest, "bytes": pack.bytes,
            "missing": chosen.missing, **counts}


def collect(cfg: Knobs, results: list[Result], out: Out) -> Summary:
    """scenes.parquet SCENES, and report.html with the counts and some previews."""
    scenes = tables.frame([{**{name: result.facts.get(name) for name in SCENES}, "scene_name": result.name}
                           for result in results], SCENES)
    tables.write(scenes, out.data / "scenes.parquet")
    seen = [result for result in results if "preview.jpg" in result.outputs]
    shown = [seen[number * len(seen) // cfg.num_pictures] for number in range(min(cfg.num_pictures, len(seen)))]
    totals = {name: int(scenes[name].sum()) for name in ("num_samples", "num_sample_data", *COUNTS)}
    missing = sum((Counter(result.facts["missing"]) for result in results), Counter())
    report.write(out.results / "report.html", "Samples", [
        report.Section("Scenes", f"{totals['num_samples']} key frames and {totals['num_sample_data']} frames in "
                       f"{len(scenes)} scenes, {scenes['bytes'].sum() / 2**20:.1f} MiB in packs.",
                       scenes.drop("scene_token", "pack_digest")),
        report.Section("Channels that key frames lacked", "Frames of the reference channel that had no frame of the "
                       "channel near enough; one or two at a scene's begin are usual.",
                       pl.DataFrame(sorted(missing.items()), {"channel": pl.String, "frames": pl.Int64}, orient="row")),
        report.Section("Lidar in the camera", "Points of the middle key frame, each sensor's pose taken at its own "
                       f"stamp; red is near, blue is {preview.FAR_M:g} m and beyond. Edges must meet.",
                       pictures=tuple((result.name, result.path("preview.jpg").read_bytes()) for result in shown))])
    without_time = totals["num_clouds_without_time"]
    notes = (f"{without_time} lidar frames do not say when a point was measured: their motion within a turn stays",)
    dropped = {"key frames": totals["num_lost_key_frames"], "frames without a pose": totals["num_no_pose"],
               "pictures of damaged video": totals["num_lost_pictures"]}
    return Summary(len(scenes), totals["num_samples"], "samples", unit_in="scenes",
                   dropped={what: count for what, count in dropped.items() if count},
                   notes=notes if without_time and cfg.motion_compensate else ())


def reference_channel(cfg: Knobs, channels: Mapping[str, Any], drive_name: str) -> str:
    """The channel of the drive that key frames are on. Raises ConfigError."""
    for name in (cfg.reference_channel, cfg.fallback_channel):
        if name in channels:
            return name
    wanted = cfg.reference_channel + (f" or {cfg.fallback_channel}" if cfg.fallback_channel else "")
    hint = near_miss(cfg.reference_channel, channels)
    raise ConfigError(f"sample.reference_channel: {drive_name} has no {wanted}{hint}; it has "
                      f"{', '.join(sorted(channels))}\n  set sample.reference_channel to one of them")


def select(cfg: Knobs, scene: Scene, index: pl.DataFrame, counts: Counter[str]) -> Selection:
    """Which frames of the drive's INDEX go into the pack; `counts` is added to. Raises ConfigError, DataError."""
    sensors = scene.sensors
    reference = reference_channel(cfg, sensors, scene.drive_name)
    required = [channel for channel in sorted(sensors) if sensors[channel].required]
    rows, periods_us = {}, {}
    for channel, sensor in sorted(sensors.items()):
        own = index.filter(pl.col("channel") == channel).sort("stamp_us")
        periods_us[channel] = _period_us(own)
        if channel == reference or channel in required:
            _check_rate(cfg, channel, 1e6 / periods_us[channel], scene.drive_name)
        moves = sensor.modality == "lidar" and cfg.motion_compensate
        reach_us = round(TURN_SLACK * periods_us[channel]) + 1 if moves else 0
        rows[channel], num_no_pose = _usable(own, scene, reach_us)
        counts["num_no_pose"] += num_no_pose
    stamps_us = {channel: own["stamp_us"].to_numpy() for channel, own in rows.items()}
    chosen = keyframes.choose(stamps_us, reference, required, 1e6 / cfg.keyframe_hz,
                              {channel: cfg.tolerance_periods * period for channel, period in periods_us.items()})
    if len(chosen.rows) < cfg.min_key_frames:
        lacking = "".join(f", {count} have none of {channel} near" for channel, count in chosen.missing.items())
        raise DataError(
            f"{scene.name}: {len(chosen.rows)} key frames, sample.min_key_frames wants {cfg.min_key_frames}\n"
            f"  {reference} has {len(stamps_us[reference])} frames with an ego pose{lacking}\n"
            "  say `required: false` of a channel in the rig, or go on without such scenes: sample.max_failed_ratio")
    counts["num_lost_key_frames"] += chosen.num_lost
    sample_us = stamps_us[reference][[row[reference] for row in chosen.rows]]
    parts = []
    for channel, own in rows.items():
        sample = np.full(len(own), -1)
        for number, row in enumerate(chosen.rows):
            if channel in row:
                sample[row[channel]] = number
        rate_hz = cfg.camera_sweep_hz if sensors[channel].modality == "camera" else cfg.lidar_sweep_hz
        keep = (sample >= 0) | keyframes.thin(stamps_us[channel], int(sample_us[0]), rate_hz)
        parts.append(own.with_columns(sample=sample).filter(keep))
    return Selection(pl.concat(parts), sample_us, periods_us, reference, chosen.missing)


def _usable(own: pl.DataFrame, scene: Scene, reach_us: int) -> tuple[pl.DataFrame, int]:
    """A channel's frames in the scene with poses known up to reach_us before and after, and how many have not."""
    own = own.filter(pl.col("stamp_us").is_between(scene.start_us, scene.end_us, closed="left"))
    at_us = own["stamp_us"].to_numpy()
    first_us, last_us = at_us - reach_us, at_us + reach_us
    covered = scene.poses.covered(first_us, last_us, np.inf)
    for silent_us, again_us in scene.pose_gaps_us:
        covered &= (last_us <= silent_us) | (first_us >= again_us)
    return own.filter(covered), int((~covered).sum())


def _period_us(own: pl.DataFrame) -> float:
    """The median time from one frame of a channel to the next, over the whole drive; 1 s where there is but one."""
    return float(own["stamp_us"].diff().median()) if len(own) > 1 else 1e6


def _check_rate(cfg: Knobs, channel: str, rate_hz: float, drive_name: str) -> None:
    if cfg.keyframe_hz > RATE_SLACK * rate_hz:
        raise ConfigError(f"sample.keyframe_hz is {cfg.keyframe_hz:g}, but {channel} of {drive_name} has only "
                          f"{rate_hz:.4g} frames a second\n  set sample.keyframe_hz to at most that, or key frames on "
                          "another channel: sample.reference_channel")


def _rectifier(cfg: Knobs, sensor: Sensor) -> Rectifier:
    if sensor.camera is None:
        raise DataError(f"{sensor.channel}: {sensor.topic} has no CameraInfo, so its images have no intrinsics\n"
                        "  name its info_topic in the rig")
    try:
        return Rectifier(sensor.camera, cfg.undistort, cfg.image_width_px)
    except DataError as error:
        raise DataError(f"{sensor.channel}: {error}\n  correct its CameraInfo, or leave the channel out of the "
                        "rig") from None


def _camera_files(cfg: Knobs, sensor: Sensor, rectifier: Rectifier, chosen: Selection, counts: Counter[str]
                  ) -> Files:
    if sensor.video is None:
        return CameraFiles(rectifier, cfg.jpeg_quality)
    rows = chosen.frames.filter(pl.col("channel") == sensor.channel).to_dicts()
    return VideoFiles(sensor.video, rectifier, cfg.jpeg_quality, rows, counts)


def _write_pack(scene: Scene, files: Mapping[str, Files], chosen: Selection, recording: Path, path: Path
                ) -> tuple[pl.DataFrame, PackWriter]:
    """The chosen frames with filename, offset and bytes, in the pack's order (that of arrival), and the closed pack."""
    sensors, drive, frames = scene.sensors, scene.drive_name, chosen.frames
    left = {(sensors[row["channel"]].topic, row["receive_ns"], row["seq"]): row for row in frames.iter_rows(named=True)}
    stored = []
    with open_drive(recording, drive) as bag, PackWriter(path) as writer:
        channels = {sensors[channel].topic: channel for channel in frames["channel"].unique().sort()}
        for topic, channel in channels.items():
            msgtypes = files[channel].msgtypes
            if topic in bag.topics and bag.topics[topic].msgtype not in msgtypes:
                raise DataError(f"{drive}: {topic} is {bag.topics[topic].msgtype}, expected "
                                f"{' or '.join(msgtypes)}\n  correct its topic or modality in the rig")

        def store(made: Iterable[tuple[Mapping[str, Any], bytes]], channel: str, at_us: int) -> None:
            try:
                for row, content in made:
                    name = fragment.member_name(drive, sensors[channel], row["stamp_us"], row["sample"] >= 0)
                    offset, num_bytes = writer.add(name, content)
                    stored.append({**row, "filename": name, "offset": offset, "bytes": num_bytes})
            except DataError as error:
                raise DataError(f"{drive}: {sensors[channel].topic} at {at_us} us: {error}\n  leave {channel} out of "
                                "the rig, or go on without such scenes: sample.max_failed_ratio") from None

        videos = {topic: files[channel] for topic, channel in channels.items()
                  if isinstance(files[channel], VideoFiles)}
        for message, turn in packets.joined(bag, _messages(bag, channels, frames)):
            row = left.pop((message.topic, message.receive_ns, message.seq), None)
            channel = channels[message.topic]
            if message.topic in videos:
                store(videos[message.topic].push(bag, message), channel, ns_to_us(message.receive_ns))
            elif row is not None:
                store(_one(row, files[channel], turn or bag.decode(message)), channel, row["stamp_us"])
        for topic, video in videos.items():
            store(video.rest(), channels[topic], scene.end_us)
    if left:
        topic, receive_ns, _ = min(left)
        raise DataError(f"{drive}: {len(left)} messages that its index lists are not in the recording, first {topic} "
                        f"received at {receive_ns} ns\n  run `dvc repro -f ingest`")
    _check_lost(scene, chosen, {(row["channel"], row["stamp_us"]) for row in stored})
    return pl.DataFrame(stored), writer


def _one(row: Mapping[str, Any], files: Files, message: Any) -> Iterator[tuple[Mapping[str, Any], bytes]]:
    yield row, files.content(message, row["stamp_us"])


def _messages(bag: Bag, channels: Mapping[str, str], frames: pl.DataFrame) -> Iterator[Message]:
    """All messages (of topic -> channel) from the first wanted one to the last; of videos and single packets also those
    before that decoding begins with."""
    start_ns, stop_ns = frames["receive_ns"].min(), frames["receive_ns"].max() + 1
    early = set(frames.filter(pl.col("decode_from_ns") < pl.col("receive_ns"))["channel"])
    if early:
        yield from bag.messages([topic for topic, channel in channels.items() if channel in early],
                                frames["decode_from_ns"].min(), start_ns)
    yield from bag.messages(channels, start_ns, stop_ns)


def _check_lost(scene: Scene, chosen: Selection, stored: set[tuple[str, int]]) -> None:
    """Raises DataError where a picture that a key frame needs did not come out of its video."""
    for row in chosen.frames.filter(pl.col("sample") >= 0).iter_rows(named=True):
        channel, at_us = row["channel"], row["stamp_us"]
        if (channel, at_us) not in stored and (scene.sensors[channel].required or channel == chosen.reference):
            raise DataError(f"{scene.drive_name}: {scene.sensors[channel].topic} at {at_us} us: its video is damaged "
                            f"there, and a key frame needs {channel}\n  say `required: false` of it in the rig, or go "
                            "on without such scenes: sample.max_failed_ratio")
