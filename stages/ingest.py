"""ingest: per drive its calibration, ego trajectory, vehicle signals, a time index of every sensor message, its faults.

Nothing is decoded but what is small (poses, mounts, camera models, signals) and the first message of each sensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from stages.lib import (
    calibration,
    clocks,
    drivelog,
    egopose,
    images,
    recordings,
    report,
    sensors,
    tables,
    trajectory,
    video_files,
)
from stages.lib import rig as rigs
from stages.lib.bag import Bag
from stages.lib.drivelog import DriveLog
from stages.lib.errors import ConfigError, DataError
from stages.lib.faults import FAULTS, POLICIES, Faults
from stages.lib.knobs import knob, near_miss
from stages.lib.rig import Channel, Rig
from stages.lib.sheet import contact_sheet
from stages.lib.stage import Facts, Item, Out, Result, Summary, Upstream
from stages.lib.videodrive import open_drive

INPUTS = ("recordings",)
NUM_PICTURES, NUM_SHOWN, NUM_NOTES = 4, 24, 8


@dataclass(frozen=True)
class Knobs:
    """Which vehicles there are. A drive's own rig is part of its action, the others are not."""

    rig: dict[str, dict] = knob("rig name -> what conf/rig/<name>.yaml says", in_key=False)
    max_failed_ratio: float = knob("drives that may fail by the recording's fault", low=0, high=1, in_key=False)


def plan(cfg: Knobs, inputs: Mapping[str, Upstream]) -> list[Item]:
    """One item per recording. Raises ConfigError for a rig that is unknown or wrong."""
    items = []
    for one in recordings.read(inputs["recordings"].folder):
        if one.rig not in cfg.rig:
            raise ConfigError(f"{one.name} was scanned with the rig {one.rig!r}, which ingest.rig lacks"
                              f"{near_miss(one.rig, cfg.rig)}\n"
                              "  add it to rig@ingest.rig in conf/config.yaml and run `roadmill compose`")
        rigs.load(cfg.rig[one.rig], one.rig)
        items.append(Item(one.name, {
            "drive_name": one.name, "drive_token": tables.token("drive", one.digest, one.name),
            "recording_digest": one.digest, "rig_name": one.rig, "rig": cfg.rig[one.rig]}, {"recording": one.digest}))
    return items


def run(cfg: Knobs, item: Item, inputs: Mapping[str, Path], out: Path) -> Facts:
    """calibration.json, trajectory, signals, index and motion (.parquet), preview.jpg; facts: the drive's rows of
    drives, channels, gaps and faults, each topic's span, and the gyro's `yaw_axis`.

    Raises DataError for a damaged recording, a required topic that is missing, empty or of another type, a mount or a
    calibration that is not known; ConfigError for a signal's field and a stamp that single packets can't have.
    """
    drive, rig_name, token = (item.params[key] for key in ("drive_name", "rig_name", "drive_token"))
    rig, faults = rigs.load(item.params["rig"], rig_name), Faults()
    with open_drive(inputs["recording"], drive) as bag:
        channels = sensors.present(bag, rig, rig_name, faults)
        log = drivelog.read(bag, {channel.topic for channel in channels.values()},
                            {channel.info_topic for channel in channels.values() if channel.info_topic}, _readers(rig))
        where = sensors.frames(rig, log, faults)
        mounted = {name: sensors.sensor(bag, rig, name, log, where) for name in channels}
        ego = egopose.ego_trajectory(rig.ego_pose, log, where, rig.ego_frame, drive)
        for fault, topic, count, detail in ego.faults:
            faults.add(fault, count, channel="ego_pose", topic=topic, detail=detail)
        index, rows, gaps = _index(channels, log, faults)
        silent_us = clocks.silences(ego.table["stamp_us"].to_numpy(), rig.ego_pose.max_gap_us)
        faults.add("silence", len(silent_us), channel="ego_pose")
        gaps += [{"channel": "ego_pose", "start_us": first, "end_us": last} for first, last in silent_us]
        spans = _spans(rig, channels, log, faults)
        signals = _signals(rig, log, faults)
        start_us, end_us = _usable(rig, rig_name, index, ego.table, faults)
        pictures = _pictures(bag, index, mounted, (start_us, end_us), faults)
    calibration.write(mounted, out / "calibration.json")
    tables.write(ego.table, out / "trajectory.parquet")
    tables.write(signals, out / "signals.parquet")
    tables.write(index, out / "index.parquet")
    tables.write(trajectory.motion(ego.table, token, rig.ego_pose.max_gap_us), out / "motion.parquet")
    (out / "preview.jpg").write_bytes(contact_sheet(pictures, ego.table.select("x_m", "y_m").to_numpy()))
    return {"drive": {"drive_token": token, "drive_name": drive, "recording_digest": item.params["recording_digest"],
                      "rig": rig_name, "vehicle": rig.vehicle, "location": rig.location,
                      "georeferenced": rig.ego_pose.georeferenced, "start_us": start_us, "end_us": end_us},
            "channels": rows, "gaps": gaps, "faults": faults.rows, "spans": spans, "yaw_axis": ego.yaw_axis}


def collect(cfg: Knobs, results: list[Result], out: Out) -> Summary:
    """drives, channels, gaps, faults and motion (.parquet) of all drives by name, and report.html."""
    token_of = {result.name: result.facts["drive"]["drive_token"] for result in results}
    drives = tables.frame([result.facts["drive"] for result in results], tables.DRIVES)
    found = {name: tables.frame([{"drive_token": token_of[result.name], **row}
                                 for result in results for row in result.facts[name]], schema)
             for name, schema in (("channels", tables.CHANNELS), ("gaps", tables.GAPS), ("faults", FAULTS))}
    motion = [tables.read(result.path("motion.parquet")) for result in results]
    for name, table in {"drives": drives, **found}.items():
        tables.write(table, out.data / f"{name}.parquet")
    tables.write(pl.concat(motion) if motion else tables.frame([], tables.MOTION), out.data / "motion.parquet")
    _report(results, drives, found, out.results / "report.html")
    unusable = drives.filter(pl.col("start_us") >= pl.col("end_us"))["drive_name"].to_list()
    clock = [f"{result.name}: {row['detail']}" for result in results for row in result.facts["faults"]
             if row["fault"] == "clock"]
    others = [f"{name}: no usable time, see results/ingest/report.html" for name in unusable
              if not any(note.startswith(f"{name}: ") for note in clock)]
    counts = Counter()
    for fault, count in found["faults"].select("fault", "count").iter_rows():
        counts[fault] += count if fault in ("duplicate", "backward", "not_finite", "no_fix") else 0
    notes = clock + others
    if len(notes) > NUM_NOTES:
        notes[NUM_NOTES:] = [f"and {len(notes) - NUM_NOTES} more such notes in results/ingest/report.html"]
    return Summary(len(results), len(results), "drives", "recordings", dict(counts), tuple(notes))


def _readers(rig: Rig) -> dict[str, tuple[str, drivelog.Read]]:
    readers = {role: (topic, egopose.READERS[role]) for role, topic in egopose.topics(rig.ego_pose).items()}
    return readers | {f"signals.{name}": (signal.topic, drivelog.signal(name, signal))
                      for name, signal in rig.signals.items()}


def _index(channels: Mapping[str, Channel], log: DriveLog, faults: Faults
           ) -> tuple[pl.DataFrame, list[dict[str, Any]], list[dict[str, Any]]]:
    """(INDEX of the messages that stay, by stamp, rows of CHANNELS, rows of GAPS); a channel's stamps move to the
    middle of its exposure or turn."""
    parts, rows, gaps = [tables.frame([], tables.INDEX)], [], []
    for name, channel in channels.items():
        came, from_ns = log.arrivals[channel.topic], log.arrivals[channel.topic].from_ns
        num_messages, stream = len(came.sensor_us), log.videos.get(channel.topic)
        if stream:
            pictures = np.flatnonzero(stream.from_ns >= 0)
            pictures = pictures[stream.display_order(came.sensor_us[pictures])]
            came, from_ns = came.at(pictures), stream.from_ns[pictures]
        to_middle_us = {"begin": 1, "middle": 0, "end": -1}[channel.stamp] * channel.duration_us // 2
        stamps_us = came.sensor_us + channel.clock_offset_us + to_middle_us
        kept = clocks.increasing(stamps_us)
        stamps_us = stamps_us[kept.keep]
        silent_us = clocks.silences(stamps_us, channel.max_gap_us)
        num_dropped = clocks.num_dropped(stamps_us, channel.rate_hz)
        for fault, count in (("duplicate", kept.num_duplicate), ("backward", kept.num_backward),
                             ("dropped", num_dropped), ("silence", len(silent_us)),
                             ("camera_info_changed", log.num_changed.get(channel.info_topic, 0)),
                             *(sorted(stream.faults.items()) if stream else ())):
            faults.add(fault, count, channel=name, topic=channel.topic)
        gaps += [{"channel": name, "start_us": first, "end_us": last} for first, last in silent_us]
        rows.append({"channel": name, "modality": channel.modality, "topic": channel.topic,
                     "rate_hz": clocks.rate_hz(stamps_us), "num_messages": num_messages,
                     "num_duplicate": kept.num_duplicate, "num_backward": kept.num_backward,
                     "num_dropped": num_dropped, "max_gap_us": int(np.diff(stamps_us).max(initial=0))})
        parts.append(tables.frame({"channel": [name] * len(stamps_us), "stamp_us": stamps_us, **{
            column: getattr(came, column)[kept.keep] for column in ("receive_ns", "seq", "bytes")},
            "decode_from_ns": from_ns[kept.keep]}, tables.INDEX))
    return pl.concat(parts).sort("stamp_us", "channel"), rows, gaps


def _spans(rig: Rig, channels: Mapping[str, Channel], log: DriveLog, faults: Faults) -> list[dict[str, Any]]:
    """First and last stamp of every timed topic after the rig's offset, and how far reception lags behind the stamps;
    topics without stamps, and those of another clock than the rest, go to faults."""
    used = [(channel.topic, name, channel.clock_offset_us, f"channels.{name}.clock_offset_us")
            for name, channel in channels.items()]
    used += [(topic, "ego_pose", rig.ego_pose.clock_offset_us, "ego_pose.clock_offset_us")
             for topic in egopose.topics(rig.ego_pose).values()]
    used += [(signal.topic, "signals", signal.clock_offset_us, f"signals.{name}.clock_offset_us")
             for name, signal in rig.signals.items()]
    used = [one for number, one in enumerate(used)
            if one[0] in log.arrivals and one[0] not in {earlier[0] for earlier in used[:number]}]
    for topic, channel, _, _ in used:
        faults.add("unstamped", log.arrivals[topic].num_unstamped, channel=channel, topic=topic)
    faults.add_lags([(topic, channel, log.arrivals[topic].lag_us, offset_us) for topic, channel, offset_us, _ in used
                     if not log.arrivals[topic].num_unstamped], {topic: knob_ for topic, _, _, knob_ in used})
    return [{"topic": topic, "channel": channel, "num_messages": len(log.arrivals[topic].sensor_us),
             "first_us": int(log.arrivals[topic].sensor_us.min()) + offset_us,
             "last_us": int(log.arrivals[topic].sensor_us.max()) + offset_us,
             "clock_offset_us": offset_us, "lag_us": log.arrivals[topic].lag_us}
            for topic, channel, offset_us, _ in used]


def _signals(rig: Rig, log: DriveLog, faults: Faults) -> pl.DataFrame:
    """SIGNALS by name, then stamp."""
    parts = [tables.frame([], tables.SIGNALS)]
    for name, signal in sorted(rig.signals.items()):
        if signal.topic in log.arrivals:
            values = log.values[f"signals.{name}"][:, 0]
            known = np.isfinite(values)
            faults.add("not_finite", int((~known).sum()), channel="signals", topic=signal.topic)
            stamps_us = log.arrivals[signal.topic].sensor_us[known] + signal.clock_offset_us
            parts.append(tables.frame({"stamp_us": stamps_us, "signal": [name] * len(stamps_us),
                                       "value": values[known]}, tables.SIGNALS).sort("stamp_us", maintain_order=True))
    return pl.concat(parts)


def _usable(rig: Rig, rig_name: str, index: pl.DataFrame, ego: pl.DataFrame, faults: Faults) -> tuple[int, int]:
    """[start_us, end_us) in which every required channel is alive and the ego pose is known over whole exposures and
    turns; of no length where there is none, and the clocks that disagree in faults."""
    if ego.is_empty() and index.is_empty():
        return 0, 0
    alive = {name: (int(own["stamp_us"].min()), int(own["stamp_us"].max()))
             for (name,), own in sorted(index.partition_by("channel", as_dict=True).items())}
    if not alive:
        return int(ego["stamp_us"][0]), int(ego["stamp_us"][-1]) + 1
    required = {name: span for name, span in alive.items() if rig.channels[name].required} or alive
    late, early = max(required, key=lambda name: required[name][0]), min(required, key=lambda name: required[name][1])
    start_us, end_us = required[late][0], required[early][1] + 1
    if start_us >= end_us:
        faults.add("clock", 1, channel=late, topic=rig.channels[late].topic, detail=(
            f"{late} begins {(start_us - end_us) / 1e6:.1f} s after {early} ended: if that is a clock, state it in "
            f"conf/rig/{rig_name}.yaml: channels.{late}.clock_offset_us or channels.{early}.clock_offset_us"))
    if ego.is_empty():
        return start_us, start_us
    pose_us = int(ego["stamp_us"][0]), int(ego["stamp_us"][-1])
    low_high_us = clocks.offsets_to_cover(pose_us, (min(first for first, _ in alive.values()),
                                                    max(last for _, last in alive.values())))
    if low_high_us:
        low_us, high_us = low_high_us
        near_us, far_us = sorted((abs(low_us), abs(high_us)))
        stated_us = rig.ego_pose.clock_offset_us
        faults.add("clock", 1, channel="ego_pose", topic=", ".join(egopose.topics(rig.ego_pose).values()), detail=(
            f"the ego pose's stamps run {near_us / 1e6:.1f} to {far_us / 1e6:.1f} s "
            f"{'ahead of' if high_us < 0 else 'behind'} the sensors': no usable time; state it in "
            f"conf/rig/{rig_name}.yaml: ego_pose.clock_offset_us, from {low_us + stated_us} to {high_us + stated_us} "
            f"(now {stated_us})"))
    half_us = max(rig.channels[name].duration_us for name in alive) // 2
    usable_us = max(start_us, pose_us[0] + half_us), min(end_us, pose_us[1] - half_us + 1)
    return usable_us if usable_us[0] < usable_us[1] else (start_us, start_us)


def _pictures(bag: Bag, index: pl.DataFrame, mounted: Mapping[str, calibration.Sensor], span_us: tuple[int, int],
              faults: Faults) -> list[tuple[str, np.ndarray | None]]:
    """Caption and pixels of the front camera (else the first one) at four times of the usable interval."""
    cameras = [name for name, sensor in mounted.items() if sensor.camera]
    pictures = []
    if cameras:
        name = "CAM_FRONT" if "CAM_FRONT" in cameras else cameras[0]
        own = index.filter(pl.col("channel") == name)
        inside = own.filter(pl.col("stamp_us").is_between(*span_us, closed="left"))
        own = own if inside.is_empty() else inside
        for number in np.linspace(0, len(own) - 1, NUM_PICTURES).round().astype(int).tolist():
            row = own.row(number, named=True)
            caption = f"{name} +{(row['stamp_us'] - own['stamp_us'][0]) / 1e6:.1f} s"
            try:
                pictures.append((caption, _image(bag, mounted[name], row)))
            except DataError as error:
                pictures.append((caption, None))
                faults.add("unreadable_picture", 1, channel=name, topic=mounted[name].topic,
                           detail=f"at {row['stamp_us']} us: {error}")
    return pictures


def _image(bag: Bag, sensor: calibration.Sensor, row: Mapping[str, Any]) -> np.ndarray:
    topic = sensor.topic
    if sensor.video:
        return video_files.picture_at(bag, topic, sensor.video, row)
    for message in bag.messages([topic], row["receive_ns"], row["receive_ns"] + 1):
        if message.seq == row["seq"]:
            return images.from_message(bag.decode(message))
    raise DataError(f"{bag.name}: {topic} at {row['stamp_us']} us is in the index and not in the recording; "
                    "its chunk index is damaged: `mcap recover IN.mcap -o OUT.mcap` writes it anew")


def _report(results: list[Result], drives: pl.DataFrame, found: Mapping[str, pl.DataFrame], path: Path) -> None:
    named = drives.select("drive_token", drive="drive_name")
    shown = {name: named.join(table, on="drive_token", how="inner", maintain_order="right").drop("drive_token")
             for name, table in found.items()}
    origin_us = {result.name: min(span["first_us"] for span in result.facts["spans"]) for result in results}
    spans = pl.DataFrame([{"drive": result.name, "topic": span["topic"], "as": span["channel"],
                           "first_s": (span["first_us"] - origin_us[result.name]) / 1e6,
                           "last_s": (span["last_us"] - origin_us[result.name]) / 1e6,
                           "stated_offset_s": span["clock_offset_us"] / 1e6, "received_after_s": span["lag_us"] / 1e6}
                          for result in results for span in result.facts["spans"]])
    usable_s = (pl.max_horizontal("end_us", "start_us") - pl.col("start_us")) / 1e6
    summary = drives.select("drive_name", "rig", "vehicle", "location", "georeferenced", usable_s=usable_s)
    yaw_axes = {result.name: result.facts["yaw_axis"] for result in results}
    summary = summary.with_columns(gyro_axis=pl.Series([yaw_axes[name] or "" for name in summary["drive_name"]],
                                                       dtype=pl.String))
    wrong = shown["faults"].filter(pl.col("fault") == "clock")
    disagree = "\n\n".join(f"{row['drive']}: {row['detail']}" for row in wrong.iter_rows(named=True))
    met = sorted(set(shown["faults"]["fault"]))
    report.write(path, "ingest", [
        report.Section("Drives", f"{len(drives)} drives, {summary['usable_s'].sum():.1f} s in which the ego pose and "
                       "all required channels are known.", summary,
                       tuple((result.name, result.path("preview.jpg").read_bytes()) for result in results[:NUM_SHOWN])),
        report.Section("Clocks", f"{disagree or 'No clock is seen to disagree.'}\n\nStamps after the stated offset, in "
                       "seconds after the drive's first; received_after_s compares reception with the stamps as "
                       "recorded.", spans),
        report.Section("Channels", "Rates are those of the median distance between stamps.", shown["channels"]),
        report.Section("Faults", "", shown["faults"]),
        report.Section("What is done about them", "", pl.DataFrame(
            {"fault": met, "policy": [POLICIES[fault] for fault in met]}, schema=dict.fromkeys(("fault", "policy"),
                                                                                            pl.String))),
        report.Section("Silences", "Longer than the rig allows.", shown["gaps"])])
