"""Scanning: a recording is its bytes and its relative name, and an empty scan is an error."""

import os
import shutil
from pathlib import Path

import pytest

from stages.lib import recordings, site
from stages.lib.errors import ConfigError
from stages.store import sources
from stages.store.sources import FolderSource, Hashes
from stages.tools import config
from stages.tools import scan as scanning

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    """A rosbag2 folder of two members, a single bag beside it, and files that are no recordings."""
    root = tmp_path / "bags"
    (root / "day1" / "drive_a").mkdir(parents=True)
    (root / "day1" / "drive_a" / "metadata.yaml").write_text("rosbag2_bagfile_information:\n  version: 5\n")
    (root / "day1" / "drive_a" / "drive_a_0.mcap").write_bytes(b"one")
    (root / "drive_b.mcap").write_bytes(b"two")
    (root / "notes.txt").write_text("sunny")
    return root


def describe(folder, hashes):
    source = FolderSource(folder, hashes)
    found = sources.discover(source.files(), source)
    return [sources.describe(source, name, found[name], "sim") for name in sorted(found)]


def test_a_folder_with_metadata_is_one_recording_and_a_loose_bag_another(source, tmp_path):
    found = describe(source, Hashes(tmp_path))
    assert [one.name for one in found] == ["day1/drive_a", "drive_b.mcap"]
    assert [member for member, _, _ in found[0].members] == ["drive_a_0.mcap", "metadata.yaml"]


def test_a_digest_knows_bytes_and_member_names_but_not_where_the_source_lies(source, tmp_path):
    before = [one.digest for one in describe(source, Hashes(tmp_path))]
    moved = source.rename(tmp_path / "elsewhere")
    assert [one.digest for one in describe(moved, Hashes(tmp_path))] == before
    (moved / "day1" / "drive_a" / "drive_a_0.mcap").rename(moved / "day1" / "drive_a" / "other.mcap")
    assert describe(moved, Hashes(tmp_path))[0].digest != before[0]


def test_a_second_look_reads_nothing_twice_and_a_changed_file_is_read_again(source, tmp_path, monkeypatch):
    hashes = Hashes(tmp_path)
    before = describe(source, hashes)
    read = []
    monkeypatch.setattr(sources, "digest_file", lambda path: read.append(path.name) or "other")
    assert describe(source, Hashes(tmp_path)) == before
    assert read == []
    stat = (source / "drive_b.mcap").stat()
    os.utime(source / "drive_b.mcap", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert describe(source, Hashes(tmp_path))[1].digest == "other"
    assert read == ["drive_b.mcap"]


def test_an_empty_source_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no recordings: no rosbag2 folder, no folder of videos with their "
                                          r"stamps and no file ending in .bag, .mcap"):
        sources.look(str(tmp_path), lambda where: FolderSource(Path(where), Hashes(tmp_path)))


def test_listings_come_back_sorted_and_two_scans_may_not_share_a_name(source, tmp_path):
    found = describe(source, Hashes(tmp_path))
    folder = tmp_path / "recordings"
    recordings.write_listing(reversed(found), folder / "bags.jsonl")
    assert recordings.read(folder) == found
    recordings.write_listing(found[:1], folder / "more.jsonl")
    with pytest.raises(ConfigError, match=r"two scans name a recording 'day1/drive_a', again in more.jsonl"):
        recordings.read(folder)


def test_no_listing_at_all_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match="`roadmill scan SOURCE --rig RIG`"):
        recordings.read(tmp_path)


def test_a_recording_is_found_by_its_bytes_and_missing_or_changed_ones_are_named(source, tmp_path):
    hashes = Hashes(tmp_path)
    wanted = describe(source, hashes)[1]
    here, nowhere = FolderSource(source, hashes), FolderSource(tmp_path / "nowhere", hashes)
    assert sources.locate(wanted, [nowhere, here]) == source / "drive_b.mcap"
    (source / "drive_b.mcap").write_bytes(b"twoo")
    text = r"'drive_b.mcap' \(.*3 bytes\) is not on this machine: .*other bytes.*4 bytes"
    with pytest.raises(ConfigError, match=text):
        sources.locate(wanted, [nowhere, here])
    with pytest.raises(ConfigError, match=r"no source is known(.|\n)*ROADMILL_SOURCE"):
        sources.locate(wanted, [])


def test_what_a_kill_tore_of_the_remembered_hashes_is_passed_over(source, tmp_path):
    before = describe(source, Hashes(tmp_path))
    remembered = tmp_path / sources.REMEMBERED
    remembered.write_text(remembered.read_text()[:-30])
    assert describe(source, Hashes(tmp_path)) == before
    assert describe(source, Hashes(tmp_path)) == before


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with this one's conf/, where nothing is tracked by DVC."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "conf", folder / "conf")
    config.write_params(folder)
    monkeypatch.setattr(scanning, "say", lambda *words: "")
    return folder


def names(root):
    return [one.name for one in recordings.read(root / "data/recordings")]


@pytest.mark.parametrize("name", ["day1/drive_a", "drive_b.mcap"])
def test_a_source_that_is_itself_a_recording_is_named_as_in_its_folder(root, source, name):
    (source / f"{name}.labels.json").write_text("{}")
    scanned = scanning.scan(root, source / name, "sim")
    assert names(root) == [Path(name).name]
    assert scanned.num_labels == {"human": 1, "truth": 0}
    assert (root / f"data/labels/human/{Path(name).name}.json").exists()
    (recording,) = recordings.read(root / "data/recordings")
    here = [FolderSource(Path(where), Hashes(root)) for where in site.read_sources(root).values()]
    assert sources.locate(recording, here) == source / name


def test_a_second_scan_says_what_is_new_changed_by_bytes_or_rig_and_gone(root, source):
    scanning.scan(root, source, "sim")
    again = scanning.scan(root, source, "radiate")
    assert (again.added, again.changed, again.gone) == ([], ["day1/drive_a", "drive_b.mcap"], [])
    assert config.selected(root, "rig@ingest.rig") == ["sim", "radiate"]
    (source / "day1").rename(source / "day2")
    (source / "drive_b.mcap").write_bytes(b"three")
    again = scanning.scan(root, source, "radiate")
    assert (again.added, again.changed, again.gone) == (["day2/drive_a"], ["drive_b.mcap"], ["day1/drive_a"])


def test_labels_that_are_gone_beside_a_recording_are_gone_after_a_scan(root, source):
    beside = source / "drive_b.mcap.labels.json"
    beside.write_text("{}")
    scanning.scan(root, source, "sim")
    copied = root / "data/labels/human/drive_b.mcap.json"
    linked = copied.read_bytes()
    os.link(copied, root / "cached")
    beside.write_text("[]")
    scanning.scan(root, source, "sim")
    assert (copied.read_bytes(), (root / "cached").read_bytes()) == (b"[]", linked), "DVC's link is not written into"
    beside.unlink()
    scanning.scan(root, source, "sim")
    assert not copied.exists()


def test_a_scan_that_is_refused_changes_nothing(root, source, tmp_path):
    scanning.scan(root, source, "sim")
    before = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    other = tmp_path / "elsewhere" / "bags"
    shutil.copytree(source, other)
    (other / "drive_b.mcap").rename(other / "drive_c.mcap")
    shutil.rmtree(other / "day1")
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, rig, words in [
        (tmp_path / "nowhere", "sim", "nowhere does not exist"), (empty, "radiate", "empty holds no recordings"),
        (source / "notes.txt", "sim", "notes.txt is no recording: its name does not end in .bag"),
        (source, "sin", r"conf/rig/sin.yaml does not exist, did you mean sim\?"),
        (other, "radiate", r"the scan 'bags' is of .*bags; .*elsewhere/bags would replace all its recordings"),
        (source / "drive_b.mcap", "sim", "has the same bytes as 'drive_b.mcap' of the scan 'bags'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            scanning.scan(root, place, rig)
    (source / "twin.mcap").write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"twin.mcap has the same bytes as 'drive_b.mcap'\n"):
        scanning.scan(root, source, "radiate")
    (root / "params.yaml").write_text("an: experiment")
    with pytest.raises(ConfigError, match=r"the rig 'radiate' cannot be added(.|\n)*`roadmill record NAME`"):
        config.use_rig(root, "radiate")
    (root / "params.yaml").write_bytes(before[root / "params.yaml"])
    remembered = root / sources.REMEMBERED
    assert {path: path.read_bytes() for path in before if path != remembered} == {
        path: content for path, content in before.items() if path != remembered}


def test_a_scan_does_not_forget_what_was_not_fetched(root, source):
    scanning.scan(root, source, "sim")
    (root / "data/recordings.dvc").write_text("outs: []")
    shutil.rmtree(root / "data/recordings")
    with pytest.raises(ConfigError, match="a scan would forget what it holds\n  `dvc pull data/recordings` fetches it"):
        scanning.scan(root, source, "sim")
