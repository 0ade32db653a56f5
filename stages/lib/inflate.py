"""Chunks of a recording, decompressed up to what a recorder can have written: a few kB may stand for any number.

The one door to `lz4` and to zstd. Each raises ValueError for more than MAX_BYTES, or more than was declared.
"""

from __future__ import annotations

import bz2 as bzip2

from backports import zstd as zstandard
from lz4.frame import LZ4FrameDecompressor

MAX_BYTES = 2**29  # a recorder closes a chunk after some MB, whatever the last message takes; a file's members too


open = zstandard.open
"""What rosbags unpacks a whole compressed file with, to disk."""


def decompress(data: bytes) -> bytes:
    """The content of a message that was compressed by itself."""
    return zstd(data)


def zstd(data: bytes, num_bytes: int = MAX_BYTES) -> bytes:
    """The content of a zstd frame, of num_bytes at most."""
    return _within(zstandard.ZstdDecompressor(), data, num_bytes)


def lz4(data: bytes, num_bytes: int = MAX_BYTES) -> bytes:
    """The content of an lz4 frame."""
    return _within(LZ4FrameDecompressor(), data, num_bytes)


def bz2(data: bytes) -> bytes:
    """The content of a bz2 stream."""
    return _within(bzip2.BZ2Decompressor(), data, MAX_BYTES)


def _within(decompressor, data: bytes, num_bytes: int) -> bytes:
    if num_bytes > MAX_BYTES:
        raise ValueError(f"a chunk declares {num_bytes} bytes, at most {MAX_BYTES} are read")
    content = decompressor.decompress(data, max_length=num_bytes + 1)
    if len(content) > num_bytes or not decompressor.eof:
        raise ValueError(f"a chunk of {len(data)} bytes holds more than {num_bytes}, or its end is missing")
    return content
