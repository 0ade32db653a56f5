"""Names of files that come from data: packs, tables, manifests, listings. One rule says which may become a path."""

from __future__ import annotations

from pathlib import PurePosixPath

MAX_BYTES = 1024  # a path that Linux takes ends at 4096


def is_below(name: object) -> bool:
    """Whether this is the plain relative name of a file below a folder: no `..`, nothing absolute, one spelling."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode("utf-8", "replace")) <= MAX_BYTES:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name != "."
