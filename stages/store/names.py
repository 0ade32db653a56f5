"""The names in a store: read, written, and many of them packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from stages.lib.digests import canonical, digest_bytes
from stages.store.store import blob_name

HEX = frozenset("0123456789abcdef")


class Names:
    """Names of the store, packed: a million take some 200 MB.

    of  mark -> generation: an action's key and result in 64 bytes -> `<op>/<generation>`, a blob's digest in 32 bytes
        -> "", a page's name -> ""
    """

    def __init__(self) -> None:
        self.of: dict[bytes | str, str] = {}

    def __len__(self) -> int:
        return len(self.of)

    def __contains__(self, mark: bytes | str) -> bool:
        return mark in self.of

    def add(self, name: str) -> None:
        """Takes in a name; one that is not of the store's layout is passed over."""
        if parsed := parse_action(name):
            self.of[parsed[1]] = parsed[0]
        elif name.startswith("pages/"):
            self.of[name] = ""
        elif digest := parse_blob(name):
            self.of[digest] = ""

    def actions(self) -> dict[str, list[bytes]]:
        """Generation -> keys and results, sorted."""
        found = defaultdict(list)
        for mark, generation in self.of.items():
            if generation:
                found[generation].append(mark)
        return {generation: sorted(found[generation]) for generation in sorted(found)}

    def rest(self) -> Iterator[str]:
        """Names of the pages, then of the blobs, sorted."""
        yield from sorted(mark for mark in self.of if isinstance(mark, str))
        yield from (blob_name(digest.hex()) for digest in self.blobs())

    def blobs(self) -> list[bytes]:
        """Digests, sorted."""
        return sorted(mark for mark in self.of if len(mark) == 32 and isinstance(mark, bytes))

    def names(self) -> Iterator[str]:
        """All of them."""
        for generation, pairs in self.actions().items():
            yield from (action_name(generation, pair) for pair in pairs)
        yield from self.rest()


def result_digest(document: Mapping[str, Any]) -> str:
    """The result's digest, of its document or of a manifest's row."""
    return digest_bytes(canonical({"facts": document["facts"], "outputs": document["outputs"]}))


def parse_action(name: str) -> tuple[str, bytes] | None:
    """(`<op>/<generation>`, key and result in 64 bytes) of an AC entry's name; None for any other name."""
    parts = name.split("/")
    key, _, result = parts[-1].partition(".")
    if len(parts) != 5 or parts[0] != "ac" or not (is_digest(key) and is_digest(result)) or parts[3] != key[:2]:
        return None
    return f"{parts[1]}/{parts[2]}", bytes.fromhex(key + result)


def action_name(generation: str, pair: bytes) -> str:
    """Name of an AC entry."""
    return f"ac/{generation}/{pair[:1].hex()}/{pair[:32].hex()}.{pair[32:].hex()}"


def parse_blob(name: str) -> bytes | None:
    """The digest in the name of a blob; None for any other name."""
    digest = name.rpartition("/")[2]
    return bytes.fromhex(digest) if is_digest(digest) and name == blob_name(digest) else None


def is_digest(text: str) -> bool:
    """Whether it is 64 hex digits as sha256 are written."""
    return len(text) == 64 and HEX.issuperset(text)


def outputs_of(document: Mapping[str, Any]) -> set[bytes]:
    """Digests of a result document's files."""
    return {bytes.fromhex(digest) for digest, _ in document["outputs"].values()}
