"""stats: bytes by op and by dataset, and what a collection would free."""

from pathlib import Path

import pytest

from stages.tools import cli, stats
from stages.tools.stats import Line
from tests.fake_clone import FakeClone
from tests.places import PLACES, commit, result_of

MIB = 2**20


@pytest.fixture
def place(tmp_path):
    return PLACES["folder"](tmp_path / "store")


def size_of(place, row: dict) -> int:
    return (place.folder / "cas" / result_of(row)[:2] / result_of(row)).stat().st_size


def world(tmp_path: Path, place) -> tuple[FakeClone, list[dict]]:
    """Scenes of 1, 2, 4 MiB that share 8 MiB; main has 0 and 1, a tag 1 and 2; nobody has 3, of 16 MiB."""
    store = place.store()
    rows = [commit(store, number, files=(b"s" * 8 * MIB, b"%d" % number * 2**number * MIB)) for number in range(3)]
    rows.append(commit(store, 3, op="autolabel", files=(b"n" * 16 * MIB,)))
    store.put_bytes(b"i" * 32 * MIB)
    clone = FakeClone(tmp_path / "clone", place.folder)
    clone.commit({"sample": rows[1:3]})
    clone.git("tag", "v1")
    clone.commit({"sample": rows[:2]})
    return clone, rows


def test_datasets_count_what_they_need_and_what_no_other_needs(tmp_path, place):
    clone, _ = world(tmp_path, place)
    lines = {line.name: line for line in stats.of_datasets([clone.folder])}
    assert lines == {
        "working tree, branch main": Line("working tree, branch main", 2, 5, (8 + 1 + 2) * MIB, 1 * MIB),
        "tag v1": Line("tag v1", 2, 5, (8 + 2 + 4) * MIB, 4 * MIB)}


def test_the_table_says_who_made_what_who_needs_it_and_what_a_gc_would_free(tmp_path, place, monkeypatch, capsys):
    clone, rows = world(tmp_path, place)
    place.pass_days(31)
    monkeypatch.chdir(clone.folder)
    cli.app(["store", "stats"], standalone_mode=False)
    documents = [size_of(place, row) for row in rows]

    def line(results: int, blobs: int, num_bytes: int, freed_bytes: int, name: str) -> str:
        return f"{results:>9}{blobs:>10}{num_bytes / 2**30:>11.3f}{freed_bytes / 2**30:>16.3f}   {name}"

    assert capsys.readouterr().out.splitlines() == [
        str(place.folder),
        "  results     blobs        GiB      a gc frees   made by",
        line(1, 2, 16 * MIB + documents[3], 16 * MIB + documents[3], "autolabel"),
        line(3, 7, 15 * MIB + sum(documents[:3]), 0, "sample"),
        line(0, 1, 32 * MIB, 32 * MIB, "pages and inputs"),
        line(4, 10, 63 * MIB + sum(documents), 48 * MIB + documents[3], "all"),
        "",
        "  results     blobs        GiB  no other needs   needed by",
        line(2, 5, 14 * MIB, 4 * MIB, "tag v1"),
        line(2, 5, 11 * MIB, 1 * MIB, "working tree, branch main")]


def test_where_a_gc_would_stop_the_table_says_why_and_has_no_figure(tmp_path, place, monkeypatch, capsys):
    clone, _ = world(tmp_path, place)
    for path in (clone.folder / ".dvc/cache").rglob("*"):
        if path.is_file() and b"scene 2" in path.read_bytes():
            path.unlink()
    monkeypatch.chdir(clone.folder)
    cli.app(["store", "stats"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "a gc would stop: 1 manifests that git names can't be read" in text
    assert "               ?   sample" in text
