"""What is wrong with a drive: every fault has a name, a policy, a count."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl

FAULTS = {"drive_token": pl.String, "fault": pl.String, "channel": pl.String, "topic": pl.String, "count": pl.Int64,
          "detail": pl.String}
MAX_LAG_US = 1_000_000  # a topic whose stamps run further from reception than those of the others has another clock

POLICIES = {
    "clock": "clocks that disagree: no usable time until the rig states the offset",
    "unstamped": "no header.stamp, or it is 0: the time of reception stands in for it",
    "duplicate": "a stamp that came before: the first message stays",
    "backward": "a stamp out of order: the fewest messages are left out for the rest to increase",
    "dropped": "messages missing by the rig's rate: nothing is put in their place",
    "silence": "longer than the rig allows: listed in gaps.parquet; no ego pose is interpolated over it",
    "missing_topic": "the recording has no such topic: a channel that is not required is left out",
    "empty_topic": "declared, but without a message: as if it were missing",
    "transform_replaced": "a frame that came again with another mount: the later one holds",
    "camera_info_changed": "CameraInfo that is not the same all the time: the first one holds",
    "not_finite": "a value that is no number, or no rotation: the message is left out",
    "no_twist": "odometry whose linear or angular velocity is 0 throughout: it is taken from the poses",
    "no_fix": "a satellite position without a fix: left out",
    "no_height": "satellite positions without a credible altitude: 0 stands in for it",
    "contradicting_fix": "a satellite position that others around it contradict: not believed",
    "no_heading": "satellite positions that stay on the spot: they give no pose",
    "gyro_unused": "a gyro of which no axis turns as the course does: heading comes from the course alone",
    "lost_packet": "video packets that are missing between two others: see undecodable",
    "broken_packet": "a video message without a whole picture (cut off, or not Annex B): see undecodable",
    "undecodable": "pictures of a video before its first key frame, or from a lost or broken packet to the next key "
                   "frame: left out",
    "extra_picture": "a second picture in one video message: it has no stamp of its own and is left out",
    "reordered": "video in decoding order (B-frames): a picture has the stamp of the message that brings it",
    "resized": "video pictures of another size than the first one: left out",
    "unreadable_picture": "an image that can't be decoded: grey in the contact sheet",
}
"""Fault -> what it is, and what is done about it."""


class Faults:
    """The faults of one drive in the order found; `rows` are those of FAULTS but for the drive's token."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str | int]] = []

    def add(self, fault: str, count: int, *, channel: str = "", topic: str = "", detail: str = "") -> None:
        """Notes a fault that was met `count` times; none for 0."""
        if count:
            self.rows.append({"fault": fault, "channel": channel, "topic": topic, "count": int(count),
                              "detail": detail or POLICIES[fault]})

    def add_lags(self, topics: Iterable[tuple[str, str, float, int]], knob_of: dict[str, str]) -> None:
        """Notes the topics whose stamps run further from the times of reception than those of the others.

        topics   (topic, channel, median of reception minus stamp [µs], the rig's clock_offset_us); what the rig states
                 is no fault, nor is a recorder that knew the offset
        knob_of  topic -> the knob that states its offset
        """
        topics = list(topics)
        usual_us = float(np.median([lag_us for _, _, lag_us, _ in topics])) if topics else 0.0
        for topic, channel, lag_us, offset_us in topics:
            if min(abs(lag_us - usual_us), abs(lag_us - offset_us - usual_us)) > MAX_LAG_US:
                ahead = "ahead of" if lag_us < usual_us else "behind"
                self.add("clock", 1, channel=channel, topic=topic, detail=(
                    f"stamps run {abs(lag_us - usual_us) / 1e6:.1f} s {ahead} the time of reception, if other topics' "
                    f"do not; to shift them, set {knob_of[topic]} to {round(lag_us - usual_us)} (now {offset_us})"))
