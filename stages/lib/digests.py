"""Digests and the one JSON spelling that they are taken of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SPELLING = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_written: dict[tuple[int, ...], str] = {}  # which file -> its digest, until it is asked for


def canonical(value: Any) -> bytes:
    """JSON with one spelling for one value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN and infinity."""
    return SPELLING.encode(value).encode()


def digest_bytes(data: bytes) -> str:
    """sha256 in 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes in 64 hex digits."""
    if _written and (known := _written.pop(_identity(path), None)):
        return known
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashed_while_written(path: Path, digest: str) -> None:
    """Lets the next `digest_file` of this file, as it is now, do without reading it: of large files, which whoever
    wrote them has hashed on the way."""
    _written[_identity(path)] = digest


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
