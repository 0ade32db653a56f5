"""What the NAL units of an H.265 stream say without being decoded. ITU-T H.265, clauses 7.3.2, 7.3.6, 7.3.7 and 8.3."""

from __future__ import annotations

from dataclasses import dataclass

from stages.lib.bits import Bits

HEAD_BYTES, SET_BYTES = 96, 1024
IDR, RASL_RADL = (19, 20), (6, 7, 8, 9)
MAX_SETS = 64

References = dict[int, bool]
"""Distance in picture order count -> whether this picture itself builds on it, or only later ones."""


@dataclass(frozen=True)
class _Sps:
    """The part of a sequence parameter set that slice headers need."""

    num_layers: int
    size_px: tuple[int, int]
    separate_planes: int
    poc_bits: int
    references: tuple[References, ...]


class H265:
    """What the units of one H.265 stream say; `size_px` by the last picture's parameter sets."""

    def __init__(self) -> None:
        self._sps: dict[int, _Sps] = {}
        self._pps: dict[int, tuple[int, int, int]] = {}  # number -> (its SPS, has output flags, bits to pass over)
        self._num_layers = 1
        self._known: set[int] = set()  # picture order counts that later pictures may build on
        self._last_poc: int | None = None  # of the last picture of the lowest layer
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
        return unit[0] >> 1 & 63 in RASL_RADL

    def note(self, unit: bytes) -> tuple:
        kind, bits = unit[0] >> 1 & 63, Bits(unit, 2, SET_BYTES)
        if kind == 34:
            number, sps, _, has_output, extra = bits.ue(), bits.ue(), bits.u(1), bits.u(1), bits.u(3)
            self._pps[number] = sps, has_output, extra
            return kind, number
        if kind == 33:
            number, sps = _sps(bits)
            self._sps[number], self._num_layers = sps, sps.num_layers
            return kind, number
        return kind, bits.u(4)

    def follows(self, unit: bytes, is_key: bool) -> bool:
        """By its reference picture set (8.3.2): all that it builds on came, and was kept since."""
        kind, layer, bits = unit[0] >> 1 & 63, unit[1] & 7, Bits(unit, 2, HEAD_BYTES)
        bits.u(2 if kind >= 16 else 1)
        number, has_output, extra = self._pps.get(bits.ue(), (-1, 0, 0))
        sps = self._sps.get(number)
        if sps is None:
            return True
        self.size_px = sps.size_px
        bits.u(extra)
        bits.ue()
        bits.u(has_output + 2 * sps.separate_planes)
        poc, references = 0, {}
        if kind not in IDR:
            poc = self._poc(bits.u(sps.poc_bits), sps.poc_bits)
            if bits.u(1):
                which = bits.u((len(sps.references) - 1).bit_length()) if sps.references else 0
                references = sps.references[which] if which < len(sps.references) else {}
            else:
                references = _references(bits, sps.references, len(sps.references))
        follows = is_key or all(poc + step in self._known for step, is_needed in references.items() if is_needed)
        self._known = self._known & {poc + step for step in references} | {poc}
        if layer == 1 and kind not in RASL_RADL and not (kind < 16 and kind % 2 == 0):
            self._last_poc = poc
        return follows

    def _poc(self, low: int, num_bits: int) -> int:
        """Picture order count from its low bits (8.3.1): the nearest to that of the last picture."""
        if self._last_poc is None:
            return low
        span = 1 << num_bits
        poc = self._last_poc - self._last_poc % span + low
        return poc + span * ((self._last_poc - poc >= span // 2) - (poc - self._last_poc > span // 2))


def _sps(bits: Bits) -> tuple[int, _Sps]:
    """(its number, what slices need); 7.3.2.2."""
    bits.u(4)
    extra = bits.u(3)
    bits.u(1 + 88 + 8)
    present = [(bits.u(1), bits.u(1)) for _ in range(extra)]
    bits.u(2 * (8 - extra) if extra else 0)
    for has_profile, has_level in present:
        bits.u(88 * has_profile + 8 * has_level)
    number, chroma = bits.ue(), bits.ue()
    separate_planes = bits.u(1) if chroma == 3 else 0
    width, height = bits.ue(), bits.ue()
    if bits.u(1):
        width -= (2 if chroma in (1, 2) else 1) * (bits.ue() + bits.ue())
        height -= (2 if chroma == 1 else 1) * (bits.ue() + bits.ue())
    bits.ue(), bits.ue()
    poc_bits = min(bits.ue(), 12) + 4
    for _ in range(3 * (extra + 1 if bits.u(1) else 1) + 6):
        bits.ue()
    if bits.u(1) and bits.u(1):
        _skip_scaling_lists(bits)
    bits.u(2)
    if bits.u(1):
        bits.u(8), bits.ue(), bits.ue(), bits.u(1)
    sets: list[References] = []
    num_sets = min(bits.ue(), MAX_SETS)
    for index in range(num_sets):
        sets.append(_references(bits, sets, index, is_last=False))
    return number, _Sps(extra + 1, (width, height), separate_planes, poc_bits, tuple(sets))


def _references(bits: Bits, sets: list[References] | tuple[References, ...], index: int, is_last: bool = True
                ) -> References:
    """A short-term reference picture set, nearest ones first, past ones before those to come; 7.3.7, 7.4.8."""
    if index and bits.u(1):
        base = sets[max(index - 1 - bits.ue(), 0) if is_last else index - 1]
        step = (1 - 2 * bits.u(1)) * (bits.ue() + 1)
        found = {}
        for before in [*base, 0]:
            is_needed = bits.u(1)
            if is_needed or bits.u(1):
                found[before + step] = bool(is_needed)
    else:
        found, counts = {}, (bits.ue(), bits.ue())
        for sign, count in zip((-1, 1), counts):
            at = 0
            for _ in range(min(count, 16)):
                at += sign * (bits.ue() + 1)
                found[at] = bool(bits.u(1))
    past, future = sorted((at for at in found if at < 0), reverse=True), sorted(at for at in found if at > 0)
    return {at: found[at] for at in [*past, *future]}


def _skip_scaling_lists(bits: Bits) -> None:
    """7.3.4."""
    for size in range(4):
        for _ in range(0, 6, 3 if size == 3 else 1):
            if not bits.u(1):
                bits.ue()
                continue
            if size > 1:
                bits.se()
            for _ in range(min(64, 16 << 2 * size)):
                bits.se()
