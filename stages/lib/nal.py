"""H.264 and H.265 packets as they are: the pictures a message holds, where decoding may begin, which pictures nothing
builds on, and what is missing between them. Nothing is decoded.

Byte stream (Annex B), NAL unit header, sequence and picture parameter set, slice header: ITU-T H.264 and H.265, clauses
7.3.1, 7.3.2 and 7.3.3 (H.265: 7.3.6), annex B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

START = b"\0\0\1"
HEADER_BYTES = 96  # of a unit that are looked at: slice and parameter set headers are shorter, scaling lists aside
RECOVERY_POINT = 6
HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


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
    follows        no picture that it may build on is missing before it, as far as its numbers tell (H.264 alone)
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
        self._stream = {"h264": _H264, "hevc": _Hevc}[codec]()
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


class _Bits:
    """Reads a unit's first bytes bit by bit, freed from emulation prevention. Beyond the end there are zeros."""

    def __init__(self, unit: bytes, skip_bytes: int) -> None:
        payload = unit[skip_bytes:skip_bytes + HEADER_BYTES].replace(b"\0\0\3", b"\0\0") + bytes(8)
        self._value, self._left = int.from_bytes(payload, "big"), 8 * len(payload)

    def u(self, count: int) -> int:
        self._left = max(self._left - count, 0)
        return self._value >> self._left & (1 << count) - 1

    def ue(self) -> int:
        zeros = 0
        while zeros < 32 and not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        value = self.ue()
        return (value + 1) // 2 * (1 if value % 2 else -1)


class _H264:
    """What the bytes of H.264 say."""

    def __init__(self) -> None:
        self._sps: dict[int, tuple] = {}  # number -> (bits of frame_num, separate planes, frames only, gaps, size)
        self._pps: dict[int, int] = {}
        self._last_reference: int | None = None  # frame_num of the last picture that others build on
        self.size_px: tuple[int, int] | None = None

    @staticmethod
    def kind(unit: bytes) -> str:
        return {1: "slice", 2: "slice", 5: "slice", 6: "sei", 7: "set", 8: "set", 9: "delimiter"}.get(unit[0] & 31, "")

    @staticmethod
    def is_first(unit: bytes) -> bool:
        return bool(unit[1] & 0x80)  # first_mb_in_slice is 0

    @staticmethod
    def is_disposable(unit: bytes) -> bool:
        return not unit[0] & 0x60  # nal_ref_idc

    @staticmethod
    def is_recovery_point(unit: bytes) -> bool:
        return unit[1] == RECOVERY_POINT and len(unit) > 3 and bool(unit[3] & 0x80)  # recovery_frame_cnt is 0

    @staticmethod
    def is_key(unit: bytes, has_recovery: bool) -> bool:
        return unit[0] & 31 == 5 or has_recovery

    @staticmethod
    def is_open(unit: bytes) -> bool:
        return unit[0] & 31 != 5

    @staticmethod
    def may_lead(unit: bytes) -> bool:
        bits = _Bits(unit, 1)
        bits.ue()
        return bits.ue() in (1, 6)  # a B slice

    def note(self, unit: bytes) -> tuple:
        if unit[0] & 31 == 8:
            bits = _Bits(unit, 1)
            number = bits.ue()
            self._pps[number] = bits.ue()
            return "pps", number
        number, values = _h264_sps(unit)
        self._sps[number] = values
        return "", number

    def follows(self, unit: bytes, is_key: bool) -> bool:
        """By frame_num (7.4.3): a reference picture has that of the last one plus 1, any other one that or the same."""
        bits = _Bits(unit, 1)
        _, _, number = bits.ue(), bits.ue(), bits.ue()
        known = self._sps.get(self._pps.get(number, -1))
        if known is None:
            return True
        num_bits, is_separate, frames_only, may_skip, self.size_px = known
        if is_separate:
            bits.u(2)
        frame_num, last = bits.u(num_bits), self._last_reference
        is_reference = not self.is_disposable(unit)
        if is_reference:
            self._last_reference = frame_num
        if is_key or last is None or may_skip:
            return True
        expected = {(last + 1) % (1 << num_bits)} | (set() if is_reference and frames_only else {last})
        return frame_num in expected


def _h264_sps(unit: bytes) -> tuple[int, tuple]:
    """(its number, (bits of frame_num, separate planes, frames only, gaps allowed, (width, height))); 7.3.2.1.1."""
    bits = _Bits(unit, 1)
    profile, _, _ = bits.u(8), bits.u(8), bits.u(8)
    number, chroma, is_separate = bits.ue(), 1, 0
    if profile in HIGH_PROFILES:
        chroma = bits.ue()
        is_separate = bits.u(1) if chroma == 3 else 0
        bits.ue(), bits.ue(), bits.u(1)
        if bits.u(1):
            for index in range(8 if chroma != 3 else 12):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    num_bits, order = bits.ue() + 4, bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1), bits.se(), bits.se()
        for _ in range(min(bits.ue(), 255)):
            bits.se()
    bits.ue()
    may_skip, width, height, frames_only = bits.u(1), 16 * (bits.ue() + 1), 16 * (bits.ue() + 1), bits.u(1)
    height *= 2 - frames_only
    bits.u(1 if frames_only else 2)
    if bits.u(1):
        x, y = (2 if chroma in (1, 2) else 1), (2 if chroma == 1 else 1) * (2 - frames_only)
        width -= x * (bits.ue() + bits.ue())
        height -= y * (bits.ue() + bits.ue())
    return number, (num_bits, is_separate, bool(frames_only), bool(may_skip), (width, height))


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


class _Hevc:
    """What the bytes of H.265 say. Missing pictures are found in decoding alone: slices name those they need."""

    def __init__(self) -> None:
        self._num_layers = 1
        self.size_px: tuple[int, int] | None = None

    @staticmethod
    def kind(unit: bytes) -> str:
        kind = unit[0] >> 1 & 63
        return "slice" if kind < 32 else {32: "set", 33: "set", 34: "set", 35: "delimiter", 39: "sei"}.get(kind, "")

    @staticmethod
    def is_first(unit: bytes) -> bool:
        return bool(unit[2] & 0x80)  # first_slice_segment_in_pic_flag

    def is_disposable(self, unit: bytes) -> bool:
        """A sub-layer non-reference picture of the highest layer."""
        kind = unit[0] >> 1 & 63
        return kind < 16 and kind % 2 == 0 and (unit[1] & 7) >= self._num_layers

    @staticmethod
    def is_recovery_point(unit: bytes) -> bool:
        return False

    @staticmethod
    def is_key(unit: bytes, has_recovery: bool) -> bool:
        return 16 <= unit[0] >> 1 & 63 <= 21

    @staticmethod
    def is_open(unit: bytes) -> bool:
        return unit[0] >> 1 & 63 != 20  # IDR_N_LP

    @staticmethod
    def may_lead(unit: bytes) -> bool:
        return 6 <= unit[0] >> 1 & 63 <= 9  # RADL, RASL

    def note(self, unit: bytes) -> tuple:
        kind = unit[0] >> 1 & 63
        bits = _Bits(unit, 2)
        if kind == 34:
            return kind, bits.ue()
        if kind == 33:
            self._num_layers, self.size_px = _hevc_sps(bits)
        return kind, 0

    def follows(self, unit: bytes, is_key: bool) -> bool:
        return True


def _hevc_sps(bits: _Bits) -> tuple[int, tuple[int, int]]:
    """(number of sub-layers, (width, height)); 7.3.2.2."""
    bits.u(4)
    extra = bits.u(3)
    bits.u(1 + 88 + 8)
    present = [(bits.u(1), bits.u(1)) for _ in range(extra)]
    if extra:
        bits.u(2 * (8 - extra))
    for has_profile, has_level in present:
        bits.u(88 * has_profile + 8 * has_level)
    bits.ue()
    chroma = bits.ue()
    if chroma == 3:
        bits.u(1)
    width, height = bits.ue(), bits.ue()
    if bits.u(1):
        width -= (2 if chroma in (1, 2) else 1) * (bits.ue() + bits.ue())
        height -= (2 if chroma == 1 else 1) * (bits.ue() + bits.ue())
    return extra + 1, (width, height)
