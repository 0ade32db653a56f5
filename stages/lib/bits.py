"""Single bits and Exp-Golomb numbers from the head of a NAL unit; ITU-T H.264 and H.265, clauses 7.3.1, 9.1 and 9.2."""

from __future__ import annotations


class Bits:
    """Reads a unit's first bytes bit by bit, freed from emulation prevention. Beyond the end there are zeros."""

    def __init__(self, unit: bytes, skip_bytes: int, num_bytes: int) -> None:
        payload = unit[skip_bytes:skip_bytes + num_bytes].replace(b"\0\0\3", b"\0\0") + bytes(8)
        self._value, self._left = int.from_bytes(payload, "big"), 8 * len(payload)

    def u(self, count: int) -> int:
        """The next `count` bits."""
        self._left = max(self._left - count, 0)
        return self._value >> self._left & (1 << count) - 1

    def ue(self) -> int:
        """The next Exp-Golomb number."""
        zeros = 0
        while zeros < 32 and not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        """The next signed Exp-Golomb number."""
        value = self.ue()
        return (value + 1) // 2 * (1 if value % 2 else -1)
