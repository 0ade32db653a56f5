"""Packs: one uncompressed tar per scene, read member by member with one ranged read each.

The tar is POSIX (a pax header only for names that ustar cannot hold), regular files only, mode 644, uid, gid and mtime
0, no user names: its bytes follow from the members and the order in which they were added. POSIX.1-2017, `pax`.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from stages.lib import names
from stages.lib.digests import hashed_while_written
from stages.lib.errors import DataError

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES
COPY_BYTES = 2**20
POINT_COLUMNS = 5  # x, y, z [m], intensity, ring
# A header without name and size, its checksum summed as blanks, as the format wants.
BLANK = tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT)[:148] + b" " * 8 + tarfile.TarInfo("").tobuf()[156:]


class PackWriter:
    """A pack being written; members stand in the order of `add`. `digest` and `bytes` hold once it is closed.

    Raises ValueError for a name that is there already, absolute, or leads out of the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._names: set[str] = set()
        self.bytes = 0

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            end = 2 * BLOCK_BYTES
            self._write(bytes(end + -(self.bytes + end) % RECORD_BYTES))
        self._file.close()
        if kind is None:
            hashed_while_written(self._path, self.digest)

    @property
    def digest(self) -> str:
        """sha256 of all bytes written, hex."""
        return self._sha256.hexdigest()

    def add(self, name: str, content: bytes | memoryview) -> tuple[int, int]:
        """(offset, number of bytes) of the member's content in the pack."""
        if name in self._names or not names.is_below(name):
            raise ValueError(f"pack member {name!r} is there already or not a plain relative path")
        self._names.add(name)
        header = _header(name, len(content))
        offset = self.bytes + len(header)
        self._write(header, content, bytes(-len(content) % BLOCK_BYTES))
        return offset, len(content)

    def _write(self, *pieces: bytes | memoryview) -> None:
        num_bytes = sum(map(len, pieces))
        written = os.writev(self._file.fileno(), pieces)
        while written < num_bytes:  # a disk that is full says so at the next write
            written += self._file.write(b"".join(pieces)[written:])
        for piece in pieces:
            self._sha256.update(piece)
        self.bytes += num_bytes


def read_member(pack_path: Path, offset: int, num_bytes: int) -> bytes:
    """A member's content. Raises DataError where the pack ends before it."""
    with pack_path.open("rb") as file:
        size = file.seek(0, 2)
        if offset < 0 or num_bytes < 0 or offset + num_bytes > size:
            raise DataError(f"{pack_path}: ends at byte {size}, a member needs bytes {offset} to {offset + num_bytes}"
                            "\n  make the pack again: `dvc repro -f sample`")
        file.seek(offset)
        return file.read(num_bytes)


def points_bytes(points: np.ndarray) -> memoryview:
    """The content of a `.pcd.bin`: float32, little-endian, row by row, of points (N, 5)."""
    return np.ascontiguousarray(points, "<f4").reshape(-1).view(np.uint8).data


def read_points(content: bytes) -> np.ndarray:
    """Points (N, 5) float32: x, y, z [m] in the sensor frame, intensity, ring. Raises DataError."""
    if len(content) % (4 * POINT_COLUMNS):
        raise DataError(f"a .pcd.bin of {len(content)} bytes is not rows of {POINT_COLUMNS} float32"
                        "\n  make the pack again: `dvc repro -f sample`")
    return np.frombuffer(content, "<f4").reshape(-1, POINT_COLUMNS)


def extract(pack_path: Path, folder: Path) -> list[str]:
    """Writes the members below `folder`; their names, in the pack's order.

    Raises DataError, before anything is written, for a member that is no plain file, would leave the folder or stands
    there twice, and where something is there already.
    """
    found = members(pack_path)
    with pack_path.open("rb") as pack:
        for name, (offset, num_bytes) in found.items():
            target = folder / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    pack.seek(offset)
                    _copy(pack, file, num_bytes)
            except (FileExistsError, NotADirectoryError):
                raise DataError(f"{pack_path}: member {name!r} stands where another file is\n"
                                "  make the pack again: `dvc repro -f sample`") from None
    return list(found)


def members(pack_path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset, number of bytes) of the content of each member, in the pack's order.

    Raises DataError where the file is no tar of plain files, each below the folder and within the pack, and none twice.
    """
    found: dict[str, tuple[int, int]] = {}
    num_bytes = pack_path.stat().st_size
    try:
        with tarfile.open(pack_path, "r:") as tar:
            for member in tar:
                if (member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse() or member.name in found
                        or not names.is_below(member.name) or member.offset_data + member.size > num_bytes):
                    raise DataError(f"{pack_path}: member {member.name[:200]!r} is not a plain file below the folder, "
                                    "as a pack's are\n  make the pack again: `dvc repro -f sample`")
                found[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{pack_path}: not a readable tar: {error}\n  make it again: `dvc repro -f sample`") from None
    return found


def _copy(source: IO[bytes], target: IO[bytes], num_bytes: int) -> None:
    while num_bytes:
        piece = source.read(min(num_bytes, COPY_BYTES))
        if not piece:
            raise EOFError("the pack became shorter")
        target.write(piece)
        num_bytes -= len(piece)


def _header(name: str, num_bytes: int) -> bytes:
    """What stands before a member's content: tarfile's own for any name, made from one of them where ustar holds it."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or num_bytes >= 8**11:
        member = tarfile.TarInfo(name)
        member.size = num_bytes
        return member.tobuf(tarfile.PAX_FORMAT)
    block = bytearray(BLANK)
    block[:len(name)] = name.encode()
    block[124:135] = b"%011o" % num_bytes
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)
