"""Objects in memory that count requests as S3 bills them, for tests of what the store asks for."""

import time
from collections import Counter
from pathlib import Path

from stages.lib.digests import digest_bytes
from stages.store.objects import Listed

PAGE_NAMES = 1000  # ListObjectsV2 gives that many keys a request


class Memory:
    """Objects in a dict. requests: LIST, GET, HEAD, PUT, DELETE -> how many; spoil: name -> bytes of the next GETs."""

    where = "memory"

    def __init__(self):
        self.kept: dict[str, bytes] = {}
        self.requests: Counter = Counter()
        self.spoil: dict[str, list[bytes]] = {}
        self.modified_s: dict[str, float] = {}

    def names(self, prefix):
        found = [name for name in self.kept if name.startswith(prefix)]
        self.requests["LIST"] += max(1, -(-len(found) // PAGE_NAMES))
        return iter(found)

    def list(self, prefix):
        return [Listed(name, len(self.kept[name]), self.modified_s.get(name, time.time()))
                for name in self.names(prefix)]

    def read(self, name):
        self.requests["GET"] += 1
        return self.spoil[name].pop(0) if self.spoil.get(name) else self.kept.get(name)

    def download(self, name, path: Path):
        data = self.read(name)
        if data is None:
            return None
        path.write_bytes(data)
        return digest_bytes(data)

    def write(self, name, data, sha256=None):
        self.requests["PUT"] += 1
        self._put(name, data.read_bytes() if isinstance(data, Path) else data)

    def create(self, name, data):
        self.requests["PUT"] += 1
        if name in self.kept:
            return False
        self._put(name, data)
        return True

    def size(self, name):
        self.requests["HEAD"] += 1
        return len(self.kept[name]) if name in self.kept else None

    def delete(self, names):
        for name in names:
            self.requests["DELETE"] += 1
            self.kept.pop(name, None)

    def _put(self, name, data):
        self.kept[name], self.modified_s[name] = data, time.time()
