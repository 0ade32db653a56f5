"""JPEG files of a camera's video: one decoder a channel, fed packet by packet, gives every rate that is wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.lib import images, nal
from stages.lib.bag import Bag, Message
from stages.lib.calibration import Video
from stages.lib.cameras import Rectifier
from stages.lib.errors import DataError
from stages.lib.video import CAMERA_MSGTYPES, Decoded, Decoder

MAX_INSIDE = 32  # a picture that does not come out within so many packets never will

Row = Mapping[str, Any]
"""A row of INDEX."""


@dataclass(frozen=True)
class _Sent:
    """A packet in the decoder. group: number of the key picture that it builds on; row: what it is wanted as."""

    group: int
    is_disposable: bool
    row: Row | None


class VideoPictures:
    """The wanted pictures of one topic, as its messages come by in the order received.

    rows    the wanted ones, of INDEX
    counts  num_decoded_pictures, and num_lost_pictures that were wanted and could not be decoded

    What no wanted picture builds on is not decoded. What builds on a damaged picture is not given out.
    """

    def __init__(self, video: Video, rows: Iterable[Row], counts: Counter[str]) -> None:
        self._video, self._counts = video, counts
        self._rows = sorted(rows, key=_place)
        self._from_ns = [row["decode_from_ns"] for row in self._rows]  # made the earliest of this and all later rows
        for number in range(len(self._rows) - 1, 0, -1):
            self._from_ns[number - 1] = min(self._from_ns[number - 1:number + 1])
        self._next = 0  # the first wanted row not yet met
        self._pictures, self._leading = nal.Pictures(video.codec, video.headers), nal.Leading()
        self._decoder = Decoder(video.codec)
        self._number = self._group = 0
        self._is_running = False  # a key picture went in, and since then all but what nothing builds on
        self._sent: dict[int, _Sent] = {}  # by number, not yet out
        self._held: list[tuple[_Sent, Decoded]] = []  # out, while one that was sent earlier is not
        self._damage: dict[int, int] = {}  # group -> its first damaged packet that others build on

    def push(self, bag: Bag, message: Message) -> Iterator[tuple[Row, Decoded]]:
        """The wanted pictures that come out as this message of the topic goes in."""
        place = message.receive_ns, message.seq
        while self._next < len(self._rows) and _place(self._rows[self._next]) < place:
            self._next += 1
        if self._next == len(self._rows) or self._from_ns[self._next] > place[0]:
            if self._is_running:
                yield from self.rest()
            return
        row = self._rows[self._next] if _place(self._rows[self._next]) == place else None
        shown_us = bag.shown_us(message)
        for picture in self._pictures.push(bag.decode(message).data.tobytes()):
            yield from self._send(picture, shown_us, row)
            row = None  # a second picture of one message has no stamp

    def rest(self) -> Iterator[tuple[Row, Decoded]]:
        """The wanted pictures still inside the decoder."""
        self._take(self._decoder.rest())
        for number in sorted(self._sent):
            self._lose(number)
        yield from self._released()
        self._is_running = False
        self._pictures = nal.Pictures(self._video.codec, self._video.headers)

    def _send(self, picture: nal.Picture, shown_us: int, row: Row | None) -> Iterator[tuple[Row, Decoded]]:
        leads = self._leading.take(picture, shown_us)
        data = picture.data
        if picture.is_key:
            self._group += 1
            if not self._is_running:
                self._is_running, data = True, self._video.headers + data
                self._damage[self._group - 1] = -1  # what leads this one builds on nothing that was sent
        group = self._group - leads
        if not self._is_running or group in self._damage or (row is None and picture.is_disposable):
            self._counts["num_lost_pictures"] += row is not None
            return
        self._number += 1
        self._sent[self._number] = _Sent(group, picture.is_disposable, row)
        try:
            self._take(self._decoder.send(data, self._number))
        except DataError:
            self._lose(self._number)
        for number in [number for number in self._sent if number < self._number - MAX_INSIDE]:
            self._lose(number)
        yield from self._released()

    def _take(self, decoded: Iterable[Decoded]) -> None:
        for picture in decoded:
            if picture.number in self._sent:
                self._counts["num_decoded_pictures"] += 1
                if picture.is_corrupt:
                    self._lose(picture.number)
                else:
                    self._held.append((self._sent.pop(picture.number), picture))

    def _lose(self, number: int) -> None:
        sent = self._sent.pop(number)
        self._counts["num_lost_pictures"] += sent.row is not None
        if not sent.is_disposable:
            self._damage[sent.group] = min(number, self._damage.get(sent.group, number))

    def _released(self) -> Iterator[tuple[Row, Decoded]]:
        """What is sure to build on whole pictures: all that was sent before it has come out."""
        first = min(self._sent, default=self._number + 1)
        held, self._held = self._held, []
        for sent, picture in held:
            if picture.number > first:
                self._held.append((sent, picture))
            elif sent.row is not None:
                if picture.number > self._damage.get(sent.group, picture.number):
                    self._counts["num_lost_pictures"] += 1
                else:
                    yield sent.row, picture


class VideoFiles:
    """JPEG files of a camera whose topic is video."""

    msgtypes = ("sensor_msgs/msg/CompressedImage", *CAMERA_MSGTYPES)

    def __init__(self, video: Video, rectifier: Rectifier, jpeg_quality: int, rows: Iterable[Row],
                 counts: Counter[str]) -> None:
        self._pictures = VideoPictures(video, rows, counts)
        self._rectifier = rectifier
        self._jpeg_quality = jpeg_quality

    def push(self, bag: Bag, message: Message) -> Iterator[tuple[Row, bytes]]:
        """The wanted images that come out as this message of the topic goes in, as they are to be saved.

        Raises DataError for an image that has not the size that its calibration is for.
        """
        return self._saved(self._pictures.push(bag, message))

    def rest(self) -> Iterator[tuple[Row, bytes]]:
        """Those that come out after the last message."""
        return self._saved(self._pictures.rest())

    def _saved(self, pictures: Iterator[tuple[Row, Decoded]]) -> Iterator[tuple[Row, bytes]]:
        for row, picture in pictures:
            yield row, images.encode_jpeg(self._rectifier.apply(picture.rgb()), self._jpeg_quality)


def picture_at(bag: Bag, topic: str, video: Video, row: Row) -> np.ndarray:
    """(H, W, 3) uint8 RGB of one row of INDEX. Raises DataError where it can't be decoded."""
    pictures = VideoPictures(video, [row], Counter())
    found = []
    for message in bag.messages([topic], row["decode_from_ns"], row["receive_ns"] + 1):
        found += pictures.push(bag, message)
    for _, picture in [*found, *pictures.rest()]:
        return picture.rgb()
    raise DataError(f"{bag.name}: {topic}: no picture comes out of the video at {row['stamp_us']} us")


def _place(row: Row) -> tuple[int, int]:
    return row["receive_ns"], row["seq"]
