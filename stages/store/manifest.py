"""A stage's manifest: a line of canonical JSON for each item, by name. It is read and written without being held.

    {"facts": …, "name": …, "outputs": {file: [sha256, bytes]}}    a result document, with the item's name
    {"error": …, "name": …}                                        an item that failed, as it may
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.lib.digests import canonical
from stages.lib.errors import ConfigError
from stages.lib.stage import Blob, Result

BETWEEN = b'},"outputs":{'  # the last in a result document: outputs hold lists, and in strings quotes are escaped


def write(path: Path, documents: Mapping[str, bytes], errors: Mapping[str, str]) -> None:
    """Item -> its result document as the store has it, and item -> text of what it failed with."""
    with path.open("wb") as file:
        for name in sorted([*documents, *errors]):
            row = _row(name, documents[name]) if name in documents else canonical({"error": errors[name], "name": name})
            file.write(row + b"\n")


def _row(name: str, document: bytes) -> bytes:
    facts, between, outputs = document.rpartition(BETWEEN)
    if not between or not facts.startswith(b'{"facts":{') or b"\n" in document:  # not written by us
        return canonical({"name": name, **json.loads(document)})
    return b'%s},"name":%s,"outputs":{%s' % (facts, canonical(name), outputs)


class Manifest(Sequence[Result]):
    """The results that the file lists; each is parsed when it is asked for. What replaces the file is not seen.

    folder  as DVC knows it, for messages
    need    need(digest) gives a blob's path
    """

    def __init__(self, path: Path, folder: str, need: Callable[[str], Path]) -> None:
        self._path, self._folder, self._need = path, folder, need
        self._file = path.open("rb")
        self._starts, self._stops, start = array("Q"), array("Q"), 0
        for line in self._file:
            if not line.startswith(b'{"error":'):
                self._starts.append(start)
                self._stops.append(start + len(line))
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int | slice) -> Result | tuple[Result, ...]:
        """One result, or some. Raises ConfigError where its line is damaged."""
        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(len(self))))
        start, stop = self._starts[index], self._stops[index]
        row = parse(os.pread(self._file.fileno(), stop - start, start), self._path, self._folder)
        try:
            outputs = {file: Blob(*blob) for file, blob in row["outputs"].items()}
            return Result(row["name"], row["facts"], outputs, lambda file: self._need(outputs[file].digest))
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(self._path, self._folder, f"a line lacks {error}") from None


def rows(path: Path, folder: str) -> Iterator[dict[str, Any]]:
    """All lines of the file, parsed; none where there is no file. Raises ConfigError for a damaged one."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield parse(line, path, folder)


def parse(line: bytes, path: Path, folder: str) -> dict[str, Any]:
    """One line. Raises ConfigError where it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, folder, error) from None


def _damaged(path: Path, folder: str, what: object) -> ConfigError:
    return ConfigError(f"{path} is damaged: {what}\n  `dvc checkout {folder}` restores it, `dvc repro` makes it again")
