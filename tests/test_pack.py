"""Packs: reproducible tars that any tar reads."""

import hashlib
import io
import os
import subprocess
import tarfile

import numpy as np
import pytest

from stages.lib import pack
from stages.lib.digests import digest_bytes, digest_file
from stages.lib.errors import DataError

MEMBERS = {"samples/CAM_FRONT/a__CAM_FRONT__1.jpg": b"one", "sweeps/LIDAR_TOP/a__LIDAR_TOP__2.pcd.bin": bytes(1000),
           "samples/CAM_FRONT/" + "long_" * 40 + ".jpg": b"longer than ustar's 100", "samples/Ü/empty.jpg": b""}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "pack.tar"
    with pack.PackWriter(path) as writer:
        places = {name: writer.add(name, content) for name, content in MEMBERS.items()}
    return path, places, writer


def test_each_member_is_read_back_by_its_offset_alone(written):
    path, places, _ = written
    assert {name: pack.read_member(path, *place) for name, place in places.items()} == MEMBERS


def test_tar_lists_and_extracts_what_was_added(written, tmp_path):
    path, _, _ = written
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    listed = subprocess.run(["tar", "tf", path], capture_output=True, check=True, text=True, env=environment)
    assert listed.stderr == ""
    assert len(listed.stdout.splitlines()) == len(MEMBERS)
    out = tmp_path / "by_tar"
    out.mkdir()
    subprocess.run(["tar", "xf", path, "-C", out], check=True)
    assert {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} == MEMBERS


def test_equal_members_give_equal_bytes_at_any_time_and_the_digest_is_theirs(written, tmp_path):
    path, _, writer = written
    again = tmp_path / "again.tar"
    with pack.PackWriter(again) as other:
        for name, content in MEMBERS.items():
            other.add(name, content)
    assert again.read_bytes() == path.read_bytes()
    assert writer.digest == other.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert writer.bytes == path.stat().st_size
    assert writer.bytes % 10240 == 0
    with tarfile.open(path) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_extract_writes_every_member_below_the_folder(written, tmp_path):
    names = pack.extract(written[0], tmp_path / "out")
    assert names == list(MEMBERS)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == MEMBERS


@pytest.mark.parametrize("name", ["../out.jpg", "/abs.jpg", "samples/../../x", "", "samples//x", "./x"])
def test_a_name_that_leaves_the_folder_is_not_added(tmp_path, name):
    with pack.PackWriter(tmp_path / "p.tar") as writer, pytest.raises(ValueError, match="not a plain relative path"):
        writer.add(name, b"")


@pytest.mark.parametrize("name", ["a", "samples/CAM_FRONT/x.jpg", "a" * 100, "a" * 101, "ä"])
@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, 8**11 - 1, 8**11])
def test_headers_are_those_of_tarfile(name, num_bytes):
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    assert pack._header(name, num_bytes) == member.tobuf(tarfile.PAX_FORMAT)


def test_a_write_that_ends_early_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "writev", lambda file, pieces: os.write(file, pieces[0][:100]))
    with pack.PackWriter(tmp_path / "p.tar") as writer:
        offset, num_bytes = writer.add("samples/x", b"content")
    assert pack.read_member(tmp_path / "p.tar", offset, num_bytes) == b"content"
    assert hashlib.sha256((tmp_path / "p.tar").read_bytes()).hexdigest() == writer.digest


def test_a_name_is_added_once(tmp_path):
    with pack.PackWriter(tmp_path / "p.tar") as writer:
        writer.add("samples/x", b"")
        with pytest.raises(ValueError, match="there already"):
            writer.add("samples/x", b"")


@pytest.mark.parametrize(("name", "kind"), [("../out.jpg", tarfile.REGTYPE), ("/abs.jpg", tarfile.REGTYPE),
                                            ("samples/link", tarfile.SYMTYPE), ("samples/hard", tarfile.LNKTYPE)])
def test_extract_refuses_foreign_tars_before_writing_anything(tmp_path, name, kind):
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as tar:
        good = tarfile.TarInfo("samples/good.jpg")
        good.size = 4
        tar.addfile(good, io.BytesIO(b"good"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match="is not a plain file below the folder, as a pack's are"):
        pack.extract(evil, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_torn_pack_is_a_data_error(written, tmp_path):
    path, places, _ = written
    torn = tmp_path / "torn.tar"
    torn.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="ends at byte 2000, a member needs bytes 1536 to 2536"):
        pack.read_member(torn, *places["sweeps/LIDAR_TOP/a__LIDAR_TOP__2.pcd.bin"])
    (tmp_path / "not.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match="not a readable tar"):
        pack.extract(tmp_path / "not.tar", tmp_path / "out")


def test_points_are_float32_rows_of_five():
    points = np.arange(10, dtype=np.float64).reshape(2, 5)
    content = pack.points_bytes(points)
    assert len(content) == 40
    assert pack.read_points(content).dtype == np.float32
    np.testing.assert_array_equal(pack.read_points(content), points)
    with pytest.raises(DataError, match=r"a \.pcd\.bin of 39 bytes is not rows of 5 float32"):
        pack.read_points(content[:-1])


def test_a_pack_is_hashed_once_and_again_when_its_file_has_changed(tmp_path, monkeypatch):
    with pack.PackWriter(tmp_path / "pack.tar") as writer:
        writer.add("a", b"a" * 1000)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert digest_file(tmp_path / "pack.tar") == writer.digest
    monkeypatch.undo()
    assert digest_file(tmp_path / "pack.tar") == writer.digest, "the second time by reading"
    with pack.PackWriter(tmp_path / "pack.tar") as writer:
        writer.add("a", b"a" * 1000)
    (tmp_path / "pack.tar").write_bytes((tmp_path / "pack.tar").read_bytes()[:-1] + b"x")
    assert digest_file(tmp_path / "pack.tar") == digest_bytes((tmp_path / "pack.tar").read_bytes()) != writer.digest
