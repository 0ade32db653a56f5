"""What a Parquet file says of itself, before anything is decoded: a few kB may stand for any number of values.

Parquet ends in FileMetaData, its length (4 bytes, little-endian) and `PAR1`; FileMetaData is Thrift, compact protocol.
Sources: parquet-format 2.10 (parquet.thrift), Thrift's doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAGIC = b"PAR1"
TRUE, FALSE, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 6, 7, 8, 9, 10, 12
SIZES = {3: 1, DOUBLE: 8, 13: 16}  # of fixed length: byte, double, uuid
# field numbers: FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data, ColumnMetaData.num_values
ROW_GROUPS, COLUMNS, META_DATA, NUM_VALUES = 4, 1, 3, 5


def num_values(path: Path) -> int:
    """Values of all columns that the file declares, those within lists too. Raises ValueError where it is not one."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or length + 12 > size:
            raise ValueError("it does not end as Parquet does")
        file.seek(size - 8 - length)
        content = file.read(length)
    try:
        groups = _Compact(content).struct()[ROW_GROUPS]
        return sum(column[META_DATA][NUM_VALUES] for group in groups for column in group[COLUMNS])
    except (IndexError, KeyError, TypeError, RecursionError):
        raise ValueError("its footer is damaged") from None


class _Compact:
    """A reader of Thrift's compact protocol: structs become dicts of field numbers."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def struct(self) -> dict[int, Any]:
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind == STRUCT:
            return self.struct()
        if kind in (LIST, SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15) for _ in range(count)]
        if kind == BINARY:
            return self._take(self._varint())
        if kind in (4, 5, I64):
            return self._integer()
        return self._take(SIZES[kind if kind > FALSE else 3])  # in a list a truth value is a byte

    def _take(self, count: int) -> bytes:
        taken = self._content[self._at:self._at + count]
        if len(taken) != count:
            raise IndexError
        self._at += count
        return taken

    def _byte(self) -> int:
        return self._take(1)[0]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
