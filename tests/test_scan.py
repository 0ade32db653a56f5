"""Scanning: a recording is its bytes and its relative name, and an empty scan is an error."""

import os

import pytest

from stages.lib import recordings, sources
from stages.lib.errors import ConfigError


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


def describe(source, hashes):
    return [sources.describe(path, path.relative_to(source).as_posix(), "sim", hashes)
            for path in sources.discover(source)]


def test_a_folder_with_metadata_is_one_recording_and_a_loose_bag_another(source, tmp_path):
    found = describe(source, sources.Hashes(tmp_path))
    assert [one.name for one in found] == ["day1/drive_a", "drive_b.mcap"]
    assert [member for member, _, _ in found[0].members] == ["drive_a_0.mcap", "metadata.yaml"]


def test_a_digest_knows_bytes_and_member_names_but_not_where_the_source_lies(source, tmp_path):
    before = [one.digest for one in describe(source, sources.Hashes(tmp_path))]
    moved = source.rename(tmp_path / "elsewhere")
    assert [one.digest for one in describe(moved, sources.Hashes(tmp_path))] == before
    (moved / "day1" / "drive_a" / "drive_a_0.mcap").rename(moved / "day1" / "drive_a" / "other.mcap")
    assert describe(moved, sources.Hashes(tmp_path))[0].digest != before[0]


def test_a_second_look_reads_nothing_twice_and_a_changed_file_is_read_again(source, tmp_path, monkeypatch):
    hashes = sources.Hashes(tmp_path)
    before = describe(source, hashes)
    read = []
    monkeypatch.setattr(sources, "digest_file", lambda path: read.append(path.name) or "other")
    assert describe(source, sources.Hashes(tmp_path)) == before
    assert read == []
    stat = (source / "drive_b.mcap").stat()
    os.utime(source / "drive_b.mcap", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert describe(source, sources.Hashes(tmp_path))[1].digest == "other"
    assert read == ["drive_b.mcap"]


def test_an_empty_source_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no recordings: no rosbag2 folder and no file ending in .bag, .mcap"):
        sources.discover(tmp_path)


def test_listings_come_back_sorted_and_two_scans_may_not_share_a_name(source, tmp_path):
    found = describe(source, sources.Hashes(tmp_path))
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
    hashes = sources.Hashes(tmp_path)
    wanted = describe(source, hashes)[1]
    assert sources.locate(wanted, [tmp_path / "nowhere", source], hashes) == source / "drive_b.mcap"
    (source / "drive_b.mcap").write_bytes(b"twoo")
    text = r"'drive_b.mcap' \(.*3 bytes\) is not on this machine: .*other bytes.*4 bytes"
    with pytest.raises(ConfigError, match=text):
        sources.locate(wanted, [source], hashes)
    with pytest.raises(ConfigError, match=r"no source is known(.|\n)*ROADMILL_SOURCE"):
        sources.locate(wanted, [], hashes)
