"""JPEG files of a camera's video: one decoder a channel, fed packet by packet, gives every rate that is wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from stages.lib import images, nal
from stages.lib.bag import Bag, Message, ns_to_us
from stages.lib.calibration import Video
from stages.lib.cameras import Rectifier
from stages.lib.errors import DataError
from stages.lib.video import MSGTYPES, Decoded, Decoder

Row = Mapping[str, Any]
"""A row of INDEX."""


class VideoPictures:
    """The wanted pictures of one topic, as its messages come by in the order received.

    rows    the wanted ones, of INDEX
    counts  num_decoded_pictures, and num_lost_pictures that were wanted and did not come out

    What no wanted picture builds on is not decoded.
    """

    def __init__(self, video: Video, rows: Iterable[Row], counts: Counter[str]) -> None:
        self._video, self._counts = video, counts
        self._rows = sorted(rows, key=_place)
        self._from_ns = [row["decode_from_ns"] for row in self._rows]  # made the earliest of this and all later rows
        for number in range(len(self._rows) - 1, 0, -1):
            self._from_ns[number - 1] = min(self._from_ns[number - 1:number + 1])
        self._next = 0  # the first wanted row not yet met
        self._pictures = nal.Pictures(video.codec, video.headers)
        self._decoder = Decoder(video.codec)
        self._sent: dict[int, Row] = {}  # number of a packet -> what it is wanted as
        self._number = 0
        self._is_running = self._is_sound = False
        self._leading: nal.Leading | None = None  # of the key picture where decoding began

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
        stamp_us = bag.sensor_us(message) or ns_to_us(message.receive_ns)
        for picture in self._pictures.push(bag.decode(message).data.tobytes()):
            yield from self._send(picture, stamp_us, row)
            row = None  # a second picture of one message has no stamp

    def rest(self) -> Iterator[tuple[Row, Decoded]]:
        """The wanted pictures still inside the decoder."""
        yield from self._wanted(self._decoder.rest())
        self._counts["num_lost_pictures"] += len(self._sent)
        self._sent.clear()
        self._is_running = self._is_sound = False
        self._pictures = nal.Pictures(self._video.codec, self._video.headers)

    def _send(self, picture: nal.Picture, stamp_us: int, row: Row | None) -> Iterator[tuple[Row, Decoded]]:
        data = picture.data
        if picture.is_key and not self._is_running:
            data = self._video.headers + data
            self._is_running = True
        if picture.is_key and not self._is_sound:
            self._leading = nal.Leading()
            self._is_sound = True
        if self._leading is not None:
            leads = self._leading.take(picture, stamp_us)
            if leads:
                return
            if not picture.is_key:
                self._leading = None
        if not self._is_sound or (row is None and picture.is_disposable):
            self._counts["num_lost_pictures"] += row is not None
            return
        self._number += 1
        if row is not None:
            self._sent[self._number] = row
        try:
            decoded = self._decoder.send(data, self._number)
        except DataError:
            self._counts["num_lost_pictures"] += self._sent.pop(self._number, None) is not None
            self._is_sound &= picture.is_disposable
        else:
            yield from self._wanted(decoded)

    def _wanted(self, decoded: list[Decoded]) -> Iterator[tuple[Row, Decoded]]:
        self._counts["num_decoded_pictures"] += len(decoded)
        for picture in decoded:
            row = self._sent.pop(picture.number, None)
            if row is not None:
                yield row, picture


class VideoFiles:
    """JPEG files of a camera whose topic is video."""

    msgtypes = ("sensor_msgs/msg/CompressedImage", *MSGTYPES)

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
