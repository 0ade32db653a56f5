"""The vehicle's disk comes home: whole, verified, once; what was cut off goes on, what changed is not overwritten."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stages.lib.digests import digest_bytes, digest_file
from stages.lib.errors import ConfigError, RemoteError
from stages.store import resumable
from stages.store.bucket import Bucket
from stages.tools import upload as uploading
from stages.tools.cli import app
from stages.tools.upload import ChangedFileError, upload
from tests import remote
from tests.faultproxy import fault_proxy
from tests.servers import Server

PART_BYTES = 5 << 20  # S3's least
LARGE_BYTES = 4 * PART_BYTES + 1000


class Home:
    """A checkout whose store is on the server, and a place in a bucket there."""

    def __init__(self, folder: Path, s3: Server) -> None:
        self.server = s3
        self.name = s3.make_bucket()
        self.root = remote.checkout(folder, s3, self.name)
        self.url = f"s3://{self.name}/home/bags"
        self.bucket = Bucket(self.url, endpoint=s3.endpoint, region="us-east-1")

    def through(self, endpoint: str) -> None:
        """The checkout reaches the server by another way from now on."""
        path = self.root / "conf/store/s3.yaml"
        path.write_text(re.sub("endpoint: .*", f"endpoint: {endpoint}", path.read_text()))

    def unfinished(self) -> list[dict]:
        """Uploads that were begun and neither completed nor ended."""
        return self.server.client().list_multipart_uploads(Bucket=self.name).get("Uploads", [])


@pytest.fixture
def home(s3, tmp_path, monkeypatch) -> Home:
    """Files of 5 parts are large there."""
    monkeypatch.setenv("ROADMILL_STORE", "s3")
    monkeypatch.setattr(resumable, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(uploading, "LARGE_BYTES", LARGE_BYTES)
    return Home(tmp_path / "checkout", s3)


@pytest.fixture
def large(tmp_path) -> Path:
    """A folder with one file of 5 parts."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large/long.bag").write_bytes(random.Random(0).randbytes(LARGE_BYTES))
    return tmp_path / "large"


def sizes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_every_file_comes_home_with_its_sha256_and_a_second_time_nothing_is_sent(home, tmp_path, large):
    disk = remote.disk(tmp_path / "bags")
    (large / "long.bag").rename(disk / "long.bag")
    (disk / "empty").touch()
    before = {name: (disk / name).stat().st_mtime_ns for name in sizes(disk)}
    done = upload(home.root, disk, home.url)
    assert done.verified == sizes(disk) == {one.name: one.bytes for one in home.bucket.list("")}
    assert (done.sent, done.failed) == (set(sizes(disk)), {})
    for name, size in sizes(disk).items():
        there = home.bucket.describe(name)
        assert (there.bytes, there.sha256) == (size, digest_file(disk / name))
        assert home.bucket.download(name, tmp_path / "back") == there.sha256
    done = upload(home.root, disk, f"{home.url}/")
    assert (done.verified, done.sent, done.failed) == (sizes(disk), set(), {})
    assert {name: (disk / name).stat().st_mtime_ns for name in sizes(disk)} == before


def test_a_changed_file_is_named_and_left_alone_unless_it_is_to_be_replaced(home, tmp_path):
    disk = remote.disk(tmp_path / "bags")
    upload(home.root, disk, home.url)
    (disk / "notes.txt").write_text("rainy")
    (disk / "old.bag").write_text("longer or shorter")
    (disk / "new.txt").write_text("new")
    done = upload(home.root, disk, home.url)
    assert (done.sent, set(done.failed)) == ({"new.txt"}, {"notes.txt", "old.bag"})
    assert all(isinstance(error, ChangedFileError) for error in done.failed.values())
    assert "has other bytes of that name (5 bytes, here 5); left alone\n" in str(done.failed["notes.txt"])
    assert "`roadmill upload --replace`" in str(done.failed["notes.txt"])
    assert home.bucket.read("notes.txt") == b"sunny"
    assert upload(home.root, disk, home.url, replace=True).sent == {"notes.txt", "old.bag"}
    assert home.bucket.read("notes.txt") == b"rainy"


def test_what_came_another_way_is_compared_by_its_bytes_and_gets_its_sha256(home, tmp_path):
    disk = tmp_path / "bags"
    disk.mkdir()
    for name_, there in (("same", b"12345"), ("other", b"xxxxx")):
        (disk / name_).write_bytes(b"12345")
        home.server.client().put_object(Bucket=home.name, Key=f"home/bags/{name_}", Body=there)
    done = upload(home.root, disk, home.url)
    assert (done.sent, set(done.failed)) == ({"same"}, {"other"})
    assert home.bucket.describe("same").sha256 == digest_bytes(b"12345")
    assert home.bucket.read("other") == b"xxxxx"


def test_an_error_in_one_file_does_not_stop_the_others(home, tmp_path, monkeypatch):
    disk = tmp_path / "bags"
    disk.mkdir()
    for name in ("a", "b", "new\nline", "ü %20#?", "z"):
        (disk / name).write_text(name)
    (disk / "lost+found").mkdir()
    (disk / "lost+found/#12").write_text("the file system's own")
    write = Bucket.write
    monkeypatch.setattr(Bucket, "write", lambda self, name, *what: write(self, name, *what) if name != "b" else 1 / 0)
    done = upload(home.root, disk, home.url)
    assert set(done.verified) == done.sent == {"a", "ü %20#?", "z"}
    assert "control characters" in str(done.failed["new\nline"])
    assert isinstance(done.failed["b"], ZeroDivisionError)


def test_a_file_that_another_writer_replaces_at_once_does_not_count_as_home(home, tmp_path, monkeypatch):
    disk = tmp_path / "bags"
    disk.mkdir()
    (disk / "a").write_text("mine")
    write = Bucket.write
    monkeypatch.setattr(Bucket, "write", lambda self, name, *what: write(self, name, b"others"))
    done = upload(home.root, disk, home.url)
    assert done.verified == {}
    with pytest.raises(RemoteError, match="/a was sent, and is other bytes now"):
        raise done.failed["a"]


KILLED = """
import os, signal, sys
from pathlib import Path
from stages.store import resumable
from stages.tools import upload

resumable.PART_BYTES, upload.LARGE_BYTES, resumable.PARTS_IN_FLIGHT = {part}, {large}, 1
send, sent = resumable._Upload._send_part, []


def count(self, *part):
    send(self, *part)
    sent.append(part)
    if len(sent) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


resumable._Upload._send_part = count
upload.upload(Path("."), Path(sys.argv[1]), sys.argv[2])
"""


def parts_sent(monkeypatch) -> list[int]:
    """Fills with the numbers of the parts that are sent from now on."""
    numbers, send = [], resumable._Upload._send_part
    monkeypatch.setattr(resumable._Upload, "_send_part",
                        lambda self, number, *part: numbers.append(number) or send(self, number, *part))
    return numbers


def test_a_large_file_goes_on_after_a_kill_with_the_parts_that_are_there(home, large, monkeypatch):
    code = KILLED.format(part=PART_BYTES, large=LARGE_BYTES)
    killed = subprocess.run([sys.executable, "-c", code, large, home.url], cwd=home.root,
                            env={**os.environ, "PYTHONPATH": str(remote.ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert list(home.bucket.list("")) == []
    numbers = parts_sent(monkeypatch)
    assert upload(home.root, large, home.url).sent == {"long.bag"}
    assert sorted(numbers) == [4, 5], "three of five were there"
    assert home.bucket.describe("long.bag").sha256 == digest_file(large / "long.bag")
    assert list((home.root / ".roadmill/uploads").iterdir()) == []


@pytest.fixture
def cut_off(home, large, monkeypatch):
    """An upload of the large file that was stopped after three parts."""
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "PARTS_IN_FLIGHT", 1)
        send = resumable._Upload._send_part

        def stop(self, number, *part):
            send(self, number, *part)
            if number == 3:
                raise RuntimeError("stopped")

        patch.setattr(resumable._Upload, "_send_part", stop)
        assert isinstance(upload(home.root, large, home.url).failed["long.bag"], RuntimeError)


def test_parts_of_a_file_that_changed_meanwhile_are_not_used(cut_off, home, large, monkeypatch):
    data = bytearray((large / "long.bag").read_bytes())
    data[0] ^= 1
    (large / "long.bag").write_bytes(data)
    numbers = parts_sent(monkeypatch)
    assert upload(home.root, large, home.url).sent == {"long.bag"}
    assert sorted(numbers) == [1, 2, 3, 4, 5]
    assert home.bucket.read("long.bag") == data
    assert not home.unfinished(), "the other one was ended"


def test_parts_that_the_bucket_has_lost_are_all_sent_again(cut_off, home, large, monkeypatch):
    (one,) = home.unfinished()
    home.server.client().abort_multipart_upload(Bucket=home.name, Key=one["Key"], UploadId=one["UploadId"])
    numbers = parts_sent(monkeypatch)
    assert upload(home.root, large, home.url).sent == {"long.bag"}
    assert sorted(numbers) == [1, 2, 3, 4, 5]


def test_a_torn_note_of_an_upload_begins_anew(cut_off, home, large):
    (note,) = (home.root / ".roadmill/uploads").iterdir()
    note.write_text(note.read_text()[:20])
    assert upload(home.root, large, home.url).sent == {"long.bag"}
    assert home.bucket.describe("long.bag").sha256 == digest_file(large / "long.bag")


def test_a_large_file_that_changes_while_it_is_sent_does_not_appear(home, large, monkeypatch):
    monkeypatch.setattr(resumable, "PARTS_IN_FLIGHT", 1)
    send = resumable._Upload._send_part

    def change(self, number, *part):
        with (large / "long.bag").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(bytes([number]))
        send(self, number, *part)

    monkeypatch.setattr(resumable._Upload, "_send_part", change)
    done = upload(home.root, large, home.url)
    assert "long.bag changed while it was being sent\n  run it again" in str(done.failed["long.bag"])
    assert list(home.bucket.list("")) == []
    assert not home.unfinished()


def test_a_part_that_changes_on_the_way_never_becomes_an_object(home, large):
    with fault_proxy(home.server.port) as proxy:
        home.through(proxy.endpoint)
        proxy.inject("flip", side="up", at=1000, match="partNumber=2", times=1)
        done = upload(home.root, large, home.url)
    assert done.failed or done.sent == {"long.bag"}
    for one in home.bucket.list(""):
        assert home.bucket.download(one.name, home.root / "back") == digest_file(large / "long.bag")
    home.through(home.server.endpoint)
    assert "long.bag" in upload(home.root, large, home.url).verified


def test_an_answer_that_is_lost_at_the_end_does_not_lose_the_file(home, large):
    with fault_proxy(home.server.port) as proxy:
        home.through(proxy.endpoint)
        proxy.inject("lose_answer", match=r"^POST .*uploadId=", times=1)
        done = upload(home.root, large, home.url)
    assert (done.sent, done.failed) == ({"long.bag"}, {})
    assert home.bucket.describe("long.bag").sha256 == digest_file(large / "long.bag")


def test_what_the_server_refuses_is_said_and_goes_on_the_next_time(home, large, monkeypatch):
    with fault_proxy(home.server.port) as proxy:
        home.through(proxy.endpoint)
        proxy.inject("answer", status=403, code="AccessDenied", match="partNumber=4", times=1)
        error = upload(home.root, large, home.url).failed["long.bag"]
    assert isinstance(error, RemoteError)
    assert "/home/bags/long.bag: access denied (HTTP 403 AccessDenied)\n" in str(error)
    home.through(home.server.endpoint)
    numbers = parts_sent(monkeypatch)
    assert upload(home.root, large, home.url).sent == {"long.bag"}
    assert set(numbers) <= {4, 5}


@pytest.mark.parametrize(("what", "to", "text"), [
    ("nowhere", "s3://bucket/x", r"nowhere is no folder with files in it"),
    ("empty", "s3://bucket/x", r"empty is no folder with files in it"),
    ("full", "s3://bucket/store/bags/", r"s3://bucket/store/bags lies in s3://bucket/store, .* deletes .*\n.*its own"),
    ("full", "s3://bucket/dvc", r"s3://bucket/dvc lies in s3://bucket/dvc, whose garbage collection"),
    ("full", "bucket/x", r"'bucket/x' is not s3://bucket/prefix"),
    ("full", "s3://bucket/a b", r"'s3://bucket/a b' is not s3://bucket/prefix\n  its parts are of letters"),
])
def test_what_cannot_be_uploaded_is_refused_before_anything_is_read(home, tmp_path, what, to, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    config = home.root / "conf/store/s3.yaml"
    config.write_text(config.read_text().replace(home.name, "bucket"))
    with pytest.raises(ConfigError, match=text):
        upload(home.root, tmp_path / what, to)


def test_the_command_counts_lists_what_failed_and_ends_with_its_code(home, tmp_path, monkeypatch):
    disk = remote.disk(tmp_path / "bags")
    monkeypatch.chdir(home.root)
    ended = CliRunner().invoke(app, ["upload", str(disk), home.url])
    assert ended.exit_code == 0
    assert f"{home.url}: 7 files, 0.00 GiB, each with its size and sha256: 7 sent, 0 were there\n" in ended.output
    assert f"`roadmill scan {home.url} --rig RIG`" in ended.output
    (disk / "notes.txt").write_text("rainy")
    ended = CliRunner().invoke(app, ["upload", str(disk), home.url])
    assert ended.exit_code == ConfigError.exit_code
    assert f"notes.txt: {home.url} has other bytes of that name" in ended.output
    assert "6 files, 0.00 GiB, each with its size and sha256: 0 sent, 6 were there\n  1 files are not" in ended.output
