"""H.264 and H.265 packets as they are: the pictures a message holds, where decoding may begin, which pictures nothing
builds on, and what is missing between them. Nothing is decoded.

Byte stream: ITU-T H.264 and H.265, annex B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.lib.h264 import H264
from stages.lib.h265 import H265

START = b"\0\0\1"


@dataclass(frozen=True, slots=True)
class Picture:
    """One coded picture.

    data           Annex B, with the parameter sets before it, without SEI
    is_key         decoding may begin here: what is displayed after it is whole
    is_open        of a key: pictures that are displayed before it may come after it, and need what came before it
    may_lead       it may be such a picture
    is_disposable  no other picture builds on it
    is_whole       its first slice is there
    has_headers    it carries parameter sets
    follows        no picture that it may build on is missing before it, as far as its header tells
    size_px        width and height by its parameter sets; None where none were seen
    """

    data: bytes
    is_key: bool
    is_open: bool
    may_lead: bool
    is_disposable: bool
    is_whole: bool
    has_headers: bool
    follows: bool
    size_px: tuple[int, int] | None


class Leading:
    """Tells, picture by picture, which ones lead a key picture: decoded after it and displayed before it."""

    def __init__(self) -> None:
        self._key_us: int | None = None

    def take(self, picture: Picture, stamp_us: int) -> bool:
        """Whether this picture, stamped stamp_us, leads the last key picture; such ones follow it directly."""
        if picture.is_key:
            self._key_us = stamp_us if picture.is_open else None
            return False
        if self._key_us is None or not picture.may_lead or stamp_us >= self._key_us:
            self._key_us = None
        return self._key_us is not None


def units(data: bytes) -> list[bytes]:
    """The NAL units of a byte stream, without start codes; none where it has no start code."""
    found, begin = [], data.find(START)
    while begin >= 0:
        end = data.find(START, begin + 3)
        found.append(data[begin + 3:end if end >= 0 else len(data)].rstrip(b"\0"))
        begin = end
    return [unit for unit in found if len(unit) > 2]


class Pictures:
    """Takes the messages of one stream in order and gives their pictures; `headers`: the parameter sets in force.

    codec  "h264" or "hevc"
    """

    def __init__(self, codec: str, headers: bytes = b"") -> None:
        self._stream = {"h264": H264, "hevc": H265}[codec]()
        self._waiting: list[bytes] = []  # parameter sets of a message without a picture: those of the next one
        self._sets: dict[tuple, bytes] = {}
        for unit in units(headers):
            self._note(unit)

    @property
    def headers(self) -> bytes:
        """All parameter sets seen, the latest of each number."""
        return b"".join(START + unit for _, unit in sorted(self._sets.items()))

    @property
    def waits(self) -> bool:
        """Parameter sets came without a picture, and belong to the next one."""
        return bool(self._waiting)

    def push(self, data: bytes) -> list[Picture]:
        """The pictures of one message, most often one."""
        pictures, own, slices, has_recovery = [], self._waiting, [], False

        def close() -> None:
            nonlocal own, slices, has_recovery
            if slices:
                pictures.append(self._picture(own, slices, has_recovery))
                own, slices, has_recovery = [], [], False

        for unit in units(data):
            kind = self._stream.kind(unit)
            if kind == "slice":
                if self._stream.is_first(unit):
                    close()
                slices.append(unit)
                own.append(unit)
            elif kind in ("set", "sei", "delimiter"):
                close()
                if kind == "set":
                    self._note(unit)
                    own.append(unit)
                elif kind == "sei" and self._stream.is_recovery_point(unit):
                    own.append(unit)
                    has_recovery = True
        close()
        self._waiting = own
        return pictures

    def _note(self, unit: bytes) -> None:
        self._sets[self._stream.note(unit)] = unit

    def _picture(self, own: Sequence[bytes], slices: Sequence[bytes], has_recovery: bool) -> Picture:
        first, stream = slices[0], self._stream
        is_key = stream.is_key(first, has_recovery)
        return Picture(b"".join(START + unit for unit in own), is_key, is_key and stream.is_open(first),
                       stream.may_lead(first), stream.is_disposable(first), stream.is_first(first),
                       any(stream.kind(unit) == "set" for unit in own), stream.follows(first, is_key), stream.size_px)
