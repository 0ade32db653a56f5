"""What ingest learns of a video topic from its packets: which messages hold a picture, and where decoding must begin
for it to be whole. Only its first pictures are decoded."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

from stages.lib import nal, video
from stages.lib.calibration import Video
from stages.lib.errors import DataError

NUM_PROBED = 48  # pictures that are decoded to see in which order they come out
MAX_REORDER = 16  # pictures that a decoder may hold back: the greatest decoded picture buffer of both codecs


class VideoLog:
    """Takes the messages of one topic in the order received.

    faults  fault of `lib.faults` -> how often
    """

    def __init__(self, codec: str) -> None:
        self.faults: Counter[str] = Counter()
        self._codec = codec
        self._pictures, self._leading = nal.Pictures(codec), nal.Leading()
        self._headers: bytes | None = None  # the parameter sets at the first key picture
        self._size_px: tuple[int, int] | None = None
        self._headers_ns: int | None = None  # where parameter sets came that wait for their picture
        self._key_ns: int | None = None  # where decoding begins for what comes now; None: nowhere, it is damaged
        self._before_ns: int | None = None  # the same for what leads the last key picture
        self._from_ns: list[int] = []
        self._probe: list[tuple[bytes, int]] = []
        self._reorders = False

    def add(self, data: bytes, receive_ns: int, stamp_us: int) -> None:
        """One message's packet, Annex B."""
        pictures = self._pictures.push(data)
        begin_ns = receive_ns if self._headers_ns is None else self._headers_ns
        self._headers_ns = begin_ns if self._pictures.waits and not pictures else None
        if not pictures and not self._pictures.waits:
            self.faults["broken_packet"] += 1
            self._key_ns = None
        self.faults["extra_picture"] += max(len(pictures) - 1, 0)
        from_ns = [self._begin(picture, begin_ns, stamp_us) for picture in pictures]
        self._from_ns.append(from_ns[0] if from_ns and from_ns[0] is not None else -1)

    @property
    def from_ns(self) -> np.ndarray:
        """(N,) int64: receive time of the message at which decoding must begin for this message's picture; -1: it has
        none that can be decoded."""
        return np.array(self._from_ns, np.int64)

    def video(self) -> Video:
        """What a decoder must know beforehand.

        Raises DataError for a stream without a key frame, and where pictures are reordered (B-frames) and stamps are
        not: whose they are is then not known.
        """
        self._check_key()
        shown = self._probed()
        self._reorders = bool(np.any(np.diff(shown) < 0))
        if self._reorders and np.all(np.diff([stamp_us for _, stamp_us in self._probe]) > 0):
            raise DataError("its pictures are reordered (B-frames), but its stamps increase from packet to packet: "
                            "which picture a stamp belongs to is not known, so record without B-frames")
        return Video(self._codec, self._headers)

    def first_picture(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises DataError."""
        self._check_key()
        return video.first_picture(self._codec, (data for data, _ in self._probe))

    def display_order(self, stamps_us: np.ndarray) -> np.ndarray:
        """(N,) the messages of these stamps, in decoding order, sorted as a decoder shows their pictures."""
        if not self._reorders:
            return np.arange(len(stamps_us))
        self.faults["reordered"] = len(stamps_us)
        heap: list[tuple[int, int]] = []
        shown = []
        for number, stamp_us in enumerate(stamps_us.tolist()):
            heapq.heappush(heap, (stamp_us, number))
            if len(heap) > MAX_REORDER:
                shown.append(heapq.heappop(heap)[1])
        return np.array(shown + [number for _, number in sorted(heap)], np.int64)

    def _check_key(self) -> None:
        if self._headers is None:
            broken = self.faults["broken_packet"]
            shape = f", {broken} of them not Annex B" if broken else ""
            raise DataError(f"video without a key frame (with its parameter sets) in {len(self._from_ns)} messages"
                            f"{shape}: decoding can begin nowhere; set the encoder to send one every second")

    def _begin(self, picture: nal.Picture, begin_ns: int, stamp_us: int) -> int | None:
        """Where decoding must begin for this picture; None where it can't be had."""
        if picture.is_key and picture.is_whole and self._is_start(picture):
            self._before_ns, self._key_ns = self._key_ns, begin_ns
        leads = self._leading.take(picture, stamp_us)
        if not picture.is_whole:
            self.faults["broken_packet"] += 1
        elif not picture.follows and (self._before_ns if leads else self._key_ns) is not None:
            self.faults["lost_packet"] += 1
        if not (picture.follows and (picture.is_whole or picture.is_disposable)):
            if leads:
                self._before_ns = None
            else:
                self._key_ns = None
        from_ns = self._before_ns if leads else self._key_ns
        if from_ns is None or not picture.is_whole:
            self.faults["undecodable"] += 1
            return None
        if len(self._probe) < NUM_PROBED:
            self._probe.append((picture.data if self._probe else self._headers + picture.data, stamp_us))
        if picture.size_px != self._size_px:
            self.faults["resized"] += 1
            return None
        return from_ns

    def _is_start(self, picture: nal.Picture) -> bool:
        """Its parameter sets come with it, or are those of the first key picture, which every decoder is given."""
        headers = self._pictures.headers
        if self._headers is None and picture.size_px is not None:
            self._headers, self._size_px = headers, picture.size_px
        return self._headers is not None and (picture.has_headers or headers == self._headers)

    def _probed(self) -> list[int]:
        """Numbers of the first pictures in the order of display."""
        decoder, shown = video.Decoder(self._codec), []
        for number, (data, _) in enumerate(self._probe):
            try:
                shown += [picture.number for picture in decoder.send(data, number)]
            except DataError:
                break
        return shown + [picture.number for picture in decoder.rest()]
