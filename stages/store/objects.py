"""Named bytes, in a folder or in a bucket: what the scene store is laid out on.

Names are relative, with `/` between parts of letters, digits and `._~-`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing; modified_s is the place's own clock, in seconds since 1970."""

    name: str
    bytes: int
    modified_s: float


class Objects(Protocol):
    """A place for objects. Each appears whole or not at all; writers may race and die.

    where  the path or URL, for messages; it holds no secret
    """

    where: str

    def names(self, prefix: str) -> Iterator[str]:
        """Names that start with the prefix, in any order."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """The same with their sizes and times."""

    def read(self, name: str) -> bytes | None:
        """The whole object; None where it is not there."""

    def download(self, name: str, path: Path) -> str | None:
        """sha256 of what was written to `path`; None where the object is not there."""

    def write(self, name: str, data: bytes | Path, sha256: str | None = None) -> None:
        """Keeps bytes, or a copy of a file, instead of what was there; sha256 is the data's, where it is known."""

    def create(self, name: str, data: bytes) -> bool:
        """Keeps bytes only where nothing is there; False where something is. Of racing writers one wins."""

    def size(self, name: str) -> int | None:
        """Bytes of the object; None where it is not there."""

    def delete(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""
