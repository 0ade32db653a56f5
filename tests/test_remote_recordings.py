"""Recordings in a bucket: the same listing, the same cache entries, and only the bytes that are wanted."""

import io
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.harness import Harness
from stages.lib import recordings, site
from stages.lib.bag import open_bag
from stages.lib.digests import digest_bytes
from stages.lib.errors import ConfigError, RemoteError
from stages.store import ranged, scratch
from stages.store.bucket import Bucket
from stages.store.ranged import RangedFile, Ranges
from stages.store.sources import BucketSource, FolderSource, Hashes, describe, locate
from stages.tools import scan as scanning
from tests import remote, tinybags, tinydrive
from tests.tinybags import T0_US


@pytest.fixture
def name(s3) -> str:
    """A new bucket's name."""
    return s3.make_bucket()


@pytest.fixture
def bucket(s3, name) -> remote.Counted:
    return remote.Counted(Bucket(f"s3://{name}/home/bags", endpoint=s3.endpoint, region="us-east-1"))


def send(bucket, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.write(path.relative_to(folder).as_posix(), path)


def source_of(bucket, folder: Path) -> BucketSource:
    return BucketSource(bucket, Hashes(folder), folder / "scratch")


def recording_of(source, of: str) -> recordings.Recording:
    return describe(source, of, source.files(of), "tiny")


# the same as on disk ----------------------------------------------------------------------------------------------
def files(root: Path, *folders: str) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for folder in folders for path in sorted((root / folder).rglob("*")) if path.is_file()}


def test_a_scan_of_a_bucket_gives_the_bytes_that_a_scan_of_the_folder_gives(s3, name, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "say", lambda *words: "")
    monkeypatch.setenv("ROADMILL_STORE", "s3")
    disk = remote.disk(tmp_path / "bags")
    send(Bucket(f"s3://{name}/home/bags", endpoint=s3.endpoint, region="us-east-1"), disk)
    here, cloud = (remote.checkout(tmp_path / place, s3, name) for place in ("here", "cloud"))
    on_disk = scanning.scan(here, disk, "tiny")
    in_bucket = scanning.scan(cloud, f"s3://{name}/home/bags/", "tiny")
    assert files(here, "data/recordings", "data/labels") == files(cloud, "data/recordings", "data/labels")
    assert list(files(cloud, "data/recordings")) == ["data/recordings/bags.jsonl"]
    assert [one.name for one in recordings.read(cloud / "data/recordings")] == ["day 1/drive_ä", "drive_b", "old.bag"]
    assert on_disk == in_bucket
    assert in_bucket.num_labels == {"human": 1, "truth": 0}
    assert site.read_sources(cloud) == {"bags": f"s3://{name}/home/bags"}
    with pytest.raises(ConfigError, match=r"elsewhere does not exist\n.*s3://bucket/prefix"):
        scanning.scan(cloud, f"s3://{name}/elsewhere", "tiny")
    with pytest.raises(ConfigError, match=r"notes.txt is no recording"):
        scanning.scan(cloud, f"s3://{name}/home/bags/notes.txt", "tiny")
    with pytest.raises(ConfigError, match=r"'s3://b/../c' is not s3://bucket/prefix"):
        scanning.scan(cloud, "s3://b/../c", "tiny")


def test_a_source_is_a_folder_or_a_url_and_the_environments_comes_first(tmp_path, monkeypatch):
    site.remember_source(tmp_path, "town", str(tmp_path / "data/raw"))
    site.remember_source(tmp_path, "home", "s3://b/home")
    assert (tmp_path / site.SOURCES).read_text().splitlines()[1:] == ["home: s3://b/home", "town: data/raw"]
    monkeypatch.setenv("ROADMILL_SOURCE", "s3://b/disk/")
    assert list(site.read_sources(tmp_path).items()) == [
        ("", "s3://b/disk"), ("home", "s3://b/home"), ("town", str(tmp_path / "data/raw"))]


@pytest.mark.parametrize("one", ["drive_b", "old.bag"])
def test_a_url_that_is_itself_a_recording_is_named_as_in_its_folder(s3, name, tmp_path, monkeypatch, one):
    monkeypatch.setattr(scanning, "say", lambda *words: "")
    monkeypatch.setenv("ROADMILL_STORE", "s3")
    disk = remote.disk(tmp_path / "bags")
    send(Bucket(f"s3://{name}", endpoint=s3.endpoint, region="us-east-1"), disk)
    here, cloud = (remote.checkout(tmp_path / place, s3, name) for place in ("here", "cloud"))
    scanning.scan(here, disk / one, "tiny")
    scanning.scan(cloud, f"s3://{name}/{one}", "tiny")
    assert files(here, "data/recordings") == files(cloud, "data/recordings")
    (found,) = recordings.read(cloud / "data/recordings")
    assert locate(found, Harness(cloud).sources).exists()


def test_a_scene_cached_from_a_laptops_disk_is_a_hit_in_the_cloud_and_would_be_the_same(s3, name, tmp_path,
                                                                                      monkeypatch, capfd):
    monkeypatch.setattr(scanning, "say", lambda *words: "")
    monkeypatch.setenv("ROADMILL_STORE", "s3")
    disk = tmp_path / "bags"
    tinydrive.record(disk / "drive", tinydrive.stream())
    send(Bucket(f"s3://{name}/home/bags", endpoint=s3.endpoint, region="us-east-1"), disk)
    laptop, cloud = (remote.checkout(tmp_path / place, s3, name) for place in ("laptop", "cloud"))
    apart = remote.checkout(tmp_path / "apart", s3, name, store="other")
    lines = {}
    for root, where in ((laptop, disk), (cloud, f"s3://{name}/home/bags"), (apart, f"s3://{name}/home/bags")):
        scanning.scan(root, where, "tiny")
        Harness(root).run("ingest")
        lines[root] = capfd.readouterr().out
    assert "cached 0, ran 1" in lines[laptop]
    assert "cached 1, ran 0" in lines[cloud]
    assert "cached 0, ran 1" in lines[apart]
    made = [files(root, "data/ingest") for root in (laptop, cloud, apart)]
    assert made[0] == made[1] == made[2]


def test_a_second_look_at_a_bucket_reads_no_recording_and_what_has_no_sha256_only_once(bucket, s3, name, tmp_path):
    sent = tmp_path / "bags"
    sent.mkdir()
    (sent / "a.mcap").write_bytes(b"one")
    send(bucket, sent)
    s3.client().put_object(Bucket=name, Key="home/bags/b.mcap", Body=b"two")
    bucket.calls.clear()
    digests = {one: recording_of(source_of(bucket, tmp_path), one).digest for one in ("a.mcap", "b.mcap")}
    assert digests == {"a.mcap": digest_bytes(b"one"), "b.mcap": digest_bytes(b"two")}
    assert [call[:2] for call in bucket.calls if call[0] in ("read", "read_range")] == [("read_range", "b.mcap")]
    bucket.calls.clear()
    assert {one: recording_of(source_of(bucket, tmp_path), one).digest for one in digests} == digests
    assert {call[0] for call in bucket.calls} == {"list", "describe"}
    s3.client().put_object(Bucket=name, Key="home/bags/b.mcap", Body=b"2wo")
    assert recording_of(source_of(bucket, tmp_path), "b.mcap").digest == digest_bytes(b"2wo")
    old = recordings.Recording("b.mcap", 3, digests["b.mcap"], "tiny")
    with pytest.raises(ConfigError, match=r"s3://.*/home/bags: other bytes(.|\n)*ROADMILL_SOURCE"):
        locate(old, [source_of(bucket, tmp_path)])


def test_a_folder_mark_that_a_console_makes_is_no_file(bucket, s3, name, tmp_path):
    disk = tmp_path / "bags"
    tinybags.write(disk / "drive", [("/n", T0_US * 1000, tinybags.number(1.0))])
    send(bucket, disk)
    for mark in ("", "drive/", "empty/"):
        s3.client().put_object(Bucket=name, Key=f"home/bags/{mark}", Body=b"")
    s3.client().put_object(Bucket=name, Key="home/bags/day.mcap", Body=b"a recording")
    s3.client().put_object(Bucket=name, Key="home/bags/day.mcap/notes", Body=b"and a folder of its name")
    assert {"day.mcap": 11, "day.mcap/notes": 24}.items() <= source_of(bucket, tmp_path).files().items()
    assert recording_of(source_of(bucket, tmp_path), "drive") == recording_of(
        FolderSource(disk, Hashes(tmp_path)), "drive")


# read by ranges ---------------------------------------------------------------------------------------------------
def chunks_of(path: Path, start_ns: int, stop_ns: int) -> tuple[int, int]:
    """(how many chunks hold messages of the window, their bytes), by the file's own index."""
    with open_bag(path) as bag:
        (storage,) = bag._folder.storages
        wanted = [one for one in storage.chunks
                  if one.message_start_time < stop_ns and one.message_end_time >= start_ns]
    return len(wanted), sum(one.chunk_length for one in wanted)


def test_a_window_of_a_long_recording_costs_its_index_and_the_chunks_it_lies_in(bucket, tmp_path):
    drive = remote.long_drive(tmp_path / "bags/drive", 120)
    send(bucket, tmp_path / "bags")
    size = (drive / "drive.mcap").stat().st_size
    start_ns, stop_ns = (T0_US + 60_000_000) * 1000, (T0_US + 80_000_000) * 1000
    num_chunks, chunk_bytes = chunks_of(drive, start_ns, stop_ns)
    source = source_of(bucket, tmp_path)
    path = locate(recording_of(source, "drive"), [source])
    bucket.calls.clear()
    with open_bag(path) as bag, open_bag(drive) as same:
        read = bucket.ranges(".mcap")
        assert len(read) <= 4
        assert sum(stop - start for start, stop in read) < 4 * ranged.LEAST_BYTES
        wanted = list(same.messages(["/cam"], start_ns, stop_ns))
        assert list(bag.messages(["/cam"], start_ns, stop_ns)) == wanted
        assert len(wanted) == 100
        read = bucket.ranges(".mcap")
        num_bytes = sum(stop - start for start, stop in read)
        assert size > 25_000_000
        assert 4 <= num_chunks <= 8
        assert len(read) <= 2 * num_chunks
        assert num_bytes <= 1.25 * chunk_bytes + ranged.LEAST_BYTES < size / 3
        assert list(bag.messages(["/cam"])) == list(same.messages(["/cam"]))
        read = bucket.ranges(".mcap")
        assert len(read) <= 25
        assert sum(stop - start for start, stop in read) <= size


def test_ranges_read_like_a_file_and_keep_little(monkeypatch):
    monkeypatch.setattr(ranged, "LEAST_BYTES", 64)
    monkeypatch.setattr(ranged, "MOST_BYTES", 256)
    monkeypatch.setattr(ranged, "KEPT_BYTES", 1024)
    monkeypatch.setattr(ranged, "GAP_BYTES", 32)
    dice = random.Random(0)
    data = dice.randbytes(10_000)
    asked = []
    ranges = Ranges(lambda start, stop: asked.append(stop - start) or data[start:stop], len(data), "s3://b/x")
    file, same = RangedFile(ranges), io.BytesIO(data)
    for _ in range(3000):
        if dice.random() < 0.4:
            offset, whence = dice.choice([(dice.randrange(11_000), 0), (dice.randrange(100), 1), (-37, 2)])
            assert file.seek(offset, whence) == same.seek(offset, whence)
        size = dice.choice([1, 8, 30, 500, -1] if dice.random() < 0.02 else [1, 8, 30])
        assert file.read(size) == same.read(size)
        assert file.tell() == same.tell()
        assert sum(len(kept) for _, kept in ranges._kept) <= 1024 + max(asked)
    assert file.seek(9_990)
    assert file.readinto(buffer := bytearray(20)) == 10
    assert buffer[:10] == data[-10:]
    with pytest.raises(OSError, match=r"before the start"):
        file.seek(-1)


@pytest.mark.parametrize("given", [b"", b"short"])
def test_a_range_that_comes_back_short_is_an_error_and_never_data(given):
    file = RangedFile(Ranges(lambda start, stop: given, 100, "s3://b/x"))
    with pytest.raises(RemoteError, match=rf"s3://b/x: bytes 0 to 100 were asked for, {len(given)} bytes came"):
        file.read(10)


def test_a_fault_of_the_bucket_is_not_told_as_a_fault_of_the_recording(bucket, tmp_path):
    remote.long_drive(tmp_path / "bags/drive", 2)
    send(bucket, tmp_path / "bags")
    source = source_of(bucket, tmp_path)
    path = locate(recording_of(source, "drive"), [source])
    with open_bag(path) as bag:
        bucket.bucket = SimpleNamespace(read_range=lambda *what: b"short")
        path._ranges.clear()
        bag._reader.storage.storages[0].bio._ranges._kept.clear()
        with pytest.raises(RemoteError, match=r"bytes came"):
            list(bag.messages(["/cam"]))


@pytest.mark.parametrize("new", [b"other", None], ids=["replaced", "removed"])
def test_a_recording_that_is_replaced_under_our_feet_is_an_error(bucket, tmp_path, new):
    remote.long_drive(tmp_path / "bags/drive", 30)
    send(bucket, tmp_path / "bags")
    source = source_of(bucket, tmp_path)
    path = locate(recording_of(source, "drive"), [source])
    with open_bag(path) as bag:
        bucket.write("drive/drive.mcap", new * 2_000_000) if new else bucket.delete(["drive/drive.mcap"])
        with pytest.raises(RemoteError, match=r"drive.mcap was re(placed|moved) while it was being read"):
            list(bag.messages(["/cam"]))


def test_a_path_in_a_bucket_answers_as_one_on_disk(bucket, tmp_path):
    disk = remote.disk(tmp_path / "bags")
    send(bucket, disk)
    source = source_of(bucket, tmp_path)
    path, same = locate(recording_of(source, "drive_b"), [source]), disk / "drive_b"
    for one in (path, path / "drive_b.mcap", path / "metadata.yaml", path / "nothing.db3"):
        like = disk / str(one).removeprefix(f"{bucket.where}/")
        for asked in ("name", "stem", "suffix"):
            assert getattr(one, asked) == getattr(like, asked)
        for asked in ("exists", "is_file", "is_dir"):
            assert getattr(one, asked)() == getattr(like, asked)()
    assert (path / "metadata.yaml").read_text() == (same / "metadata.yaml").read_text()
    assert (path / "drive_b.mcap").stat().st_size == (same / "drive_b.mcap").stat().st_size
    for asked in ("open", "stat", "read_text"):
        with pytest.raises(FileNotFoundError, match=r"nothing.db3 is not there"):
            getattr(path / "nothing.db3", asked)()
    with pytest.raises(ValueError, match=r"only be opened for reading"):
        (path / "metadata.yaml").open("w")


# once to scratch --------------------------------------------------------------------------------------------------
@pytest.fixture
def whole(bucket, tmp_path):
    """The source of a bucket with a sqlite3 recording and a ROS 1 bag, and these two."""
    disk = tmp_path / "bags"
    tinybags.write(disk / "day/old", [("/n", T0_US * 1000, tinybags.number(1.0))], storage="sqlite3")
    tinybags.write_ros1(disk / "older.bag", [("/n", T0_US * 1000, tinybags.number(1.0))])
    send(bucket, disk)
    source = source_of(bucket, tmp_path)
    return source, recording_of(source, "day/old"), recording_of(source, "older.bag")


def test_what_cannot_be_read_by_ranges_comes_to_scratch_once_and_whole(bucket, tmp_path, whole):
    source, *both = whole
    for recording in both:
        bucket.calls.clear()
        path = locate(recording, [source])
        assert isinstance(path, Path)
        assert path.name == Path(recording.name).name
        with open_bag(path) as bag:
            assert [message.receive_ns for message in bag.messages(["/n"])] == [T0_US * 1000]
        num = len([call for call in bucket.calls if call[0] == "download"])
        assert num == max(1, len(recording.members))
        assert locate(recording, [source_of(bucket, tmp_path)]) == path
        assert len([call for call in bucket.calls if call[0] == "download"]) == num
        (damaged,) = [path] if path.is_file() else path.glob("*.db3")
        damaged.write_bytes(b"x" * damaged.stat().st_size)
        assert digest_bytes(locate(recording, [source]).joinpath(*damaged.relative_to(path).parts).read_bytes()) in str(
            recording)


def test_other_bytes_than_the_recordings_do_not_come_to_scratch(bucket, tmp_path, whole):
    source, _, recording = whole
    bucket.write("older.bag", b"x" * recording.bytes)
    with pytest.raises(RemoteError, match=r"older.bag: .* came, expected .*\n.*run it again"):
        source.reach(recording)
    assert not list((tmp_path / "scratch").glob("*/older.bag"))


def test_scratch_makes_room_of_what_nobody_reads_and_says_where_it_cannot(bucket, tmp_path, whole, monkeypatch):
    source, folder, bag = whole

    def usage(place):
        kept = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        return SimpleNamespace(free=folder.bytes + 10 - kept)

    monkeypatch.setattr(scratch, "SPARE_BYTES", 0)
    monkeypatch.setattr(scratch.shutil, "disk_usage", usage)
    other = source_of(bucket, tmp_path)
    here = other.reach(bag)
    text = rf"day/old can't be read by ranges and needs {folder.bytes} bytes here.* left\n.*`ros2 bag convert`"
    with pytest.raises(ConfigError, match=text):
        source.reach(folder)
    assert here.exists(), "another reads it"
    other._scratch._held.close()
    assert source.reach(folder).exists()
    assert not here.exists()
