"""What the NAL units of an H.264 stream say without being decoded. ITU-T H.264, clauses 7.3.2, 7.3.3 and 7.4.3."""

from __future__ import annotations

from stages.lib.bits import Bits

HEAD_BYTES, SET_BYTES = 32, 1024
RECOVERY_POINT = 6
HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


class H264:
    """What the units of one H.264 stream say; `size_px` by the last picture's parameter sets."""

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
        bits = Bits(unit, 1, HEAD_BYTES)
        bits.ue()
        return bits.ue() in (1, 6)  # a B slice

    def note(self, unit: bytes) -> tuple:
        if unit[0] & 31 == 8:
            bits = Bits(unit, 1, HEAD_BYTES)
            number = bits.ue()
            self._pps[number] = bits.ue()
            return "pps", number
        number, values = _h264_sps(unit)
        self._sps[number] = values
        return "", number

    def follows(self, unit: bytes, is_key: bool) -> bool:
        """By frame_num (7.4.3): a reference picture has that of the last one plus 1, any other one that or the same."""
        bits = Bits(unit, 1, HEAD_BYTES)
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
    bits = Bits(unit, 1, SET_BYTES)
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
    num_bits, order = min(bits.ue(), 12) + 4, bits.ue()
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


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last
