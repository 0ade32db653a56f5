"""Stores in a folder and in a bucket whose objects can be made older, for tests of what age decides."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from stages.lib.digests import canonical, digest_bytes
from stages.store.action import Action
from stages.store.folder import Folder
from stages.store.gc import Live
from stages.store.store import Store
from tests.memory import Memory

DAY_S = 86_400.0


class FolderPlace:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self, **more) -> Store:
        """As a new process opens it."""
        return Store.in_folder(self.folder, **more)

    def names(self) -> dict[str, bytes]:
        """Name -> bytes of all that is kept; what collections write is left out."""
        found = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in self.folder.rglob("*")
                 if path.is_file()}
        return {name: data for name, data in found.items() if not name.startswith(("gc/", "tmp/"))}

    def pass_days(self, days: float) -> None:
        """All that is there gets older."""
        for path in self.folder.rglob("*"):
            stat = path.stat()
            os.utime(path, (stat.st_atime - days * DAY_S, stat.st_mtime - days * DAY_S))

    def damage(self, name: str, data: bytes | None) -> None:
        """Other bytes under a name; None takes the object away. Its age stays."""
        path = self.folder / name
        if data is None:
            path.unlink()
            return
        stat = path.stat()
        path.chmod(0o644)
        path.write_bytes(data)
        os.utime(path, (stat.st_atime, stat.st_mtime))


class BucketPlace(FolderPlace):
    """A store in a bucket behind a cache."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.bucket = Memory()
        self.machines = 0

    def store(self, **more) -> Store:
        """As another machine opens it, with an empty cache."""
        self.machines += 1
        return Store(Folder(self.folder / str(self.machines)), self.bucket, **more)

    def names(self) -> dict[str, bytes]:
        return {name: data for name, data in self.bucket.kept.items() if not name.startswith("gc/")}

    def pass_days(self, days: float) -> None:
        for name in self.bucket.modified_s:
            self.bucket.modified_s[name] -= days * DAY_S

    def damage(self, name: str, data: bytes | None) -> None:
        if data is None:
            self.bucket.kept.pop(name)
        else:
            self.bucket.kept[name] = data


PLACES = {"folder": FolderPlace, "bucket": BucketPlace}


def action(number: int, op: str = "sample", code: str = "c0de") -> Action:
    return Action(op, {"hz": 2}, code, "", {"n": number}, {})


def commit(store: Store, number: int, op: str = "sample", code: str = "c0de", files: tuple[bytes, ...] = ()) -> dict:
    """Commits an action with a pack of its own, or these files; the row that a manifest has of it."""
    blobs = {f"{index}.tar": store.put_bytes(data) for index, data in
             enumerate(files or (f"pack {op} {code} {number}".encode(),))}
    store.commit(action(number, op, code), f"scene {number}", {"n": number}, blobs)
    return {"name": f"scene {number}", "facts": {"n": number},
            "outputs": {name: [blob.digest, blob.bytes] for name, blob in blobs.items()}}


def result_of(row: dict) -> str:
    return digest_bytes(canonical({"facts": row["facts"], "outputs": row["outputs"]}))


def is_whole(store: Store, row: dict, number: int, op: str = "sample", code: str = "c0de") -> bool:
    """Whether the action is a hit and all that it names is there."""
    document = store.lookup(action(number, op, code))
    return document is not None and all(store.find(digest) for digest, _ in row["outputs"].values())


class Aging:
    """A bucket on a server, whose objects can be made older here: servers take no times from us."""

    def __init__(self, bucket) -> None:
        self.bucket, self.where, self.days = bucket, bucket.where, {}
        self.read, self.download, self.size, self.names = bucket.read, bucket.download, bucket.size, bucket.names

    def list(self, prefix):
        return [replace(one, modified_s=one.modified_s - self.days.get(one.name, 0) * DAY_S)
                for one in self.bucket.list(prefix)]

    def write(self, name, data, sha256=None):
        self.bucket.write(name, data, sha256)
        self.days.pop(name, None)

    def create(self, name, data):
        created = self.bucket.create(name, data)
        if created:
            self.days.pop(name, None)
        return created

    def delete(self, names):
        names = list(names)
        self.bucket.delete(names)
        for name in names:
            self.days.pop(name, None)


class ServerPlace(BucketPlace):
    """A store in a bucket of a real server."""

    def __init__(self, folder: Path, bucket) -> None:
        super().__init__(folder)
        self.bucket = Aging(bucket)

    def names(self) -> dict[str, bytes]:
        return {name: self.bucket.read(name) for name in self.bucket.names("") if not name.startswith("gc/")}

    def pass_days(self, days: float) -> None:
        for name in self.bucket.names(""):
            self.bucket.days[name] = self.bucket.days.get(name, 0) + days

    def damage(self, name: str, data: bytes | None) -> None:
        if data is None:
            self.bucket.bucket.delete([name])
        else:
            self.bucket.bucket.write(name, data)


def live(*rows: dict) -> Live:
    """What these rows of manifests keep alive."""
    found = Live()
    for row in rows:
        found.add(row)
    return found


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    """A store in a folder, then one in a bucket."""
    return PLACES[request.param](tmp_path / "store")
