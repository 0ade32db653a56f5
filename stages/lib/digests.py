"""Digests and the one JSON spelling that they are taken of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SPELLING = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: Any) -> bytes:
    """JSON with one spelling for one value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN and infinity."""
    return SPELLING.encode(value).encode()


def digest_bytes(data: bytes) -> str:
    """sha256 in 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes in 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
