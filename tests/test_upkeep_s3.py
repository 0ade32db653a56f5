"""Collection and repair of a store on real S3 servers: the same as in a folder."""

import pytest

from stages.store import gc
from stages.store.bucket import Bucket
from stages.store.fsck import check, repair
from stages.store.gc import Live
from stages.store.store import blob_name
from tests.places import DAY_S, ServerPlace, action, commit, is_whole, result_of


@pytest.fixture
def place(s3, tmp_path):
    return ServerPlace(tmp_path, Bucket(f"s3://{s3.make_bucket()}/team/store", endpoint=s3.endpoint,
                                        region="us-east-1"))


def collect(place, *rows: dict) -> set[str]:
    """A collection with these roots; the steps at which something was."""
    live = Live()
    for row in rows:
        live.add(row)
    store = place.store()
    found = gc.survey(store, live, 30 * DAY_S)
    gc.sweep(store, found)
    gc.bury(store, found)
    return {step for step, _ in found.tally}


def test_the_dead_go_after_their_grace_period_and_what_lives_or_is_used_stays(place):
    store = place.store()
    rows = [commit(store, number, files=(b"shared", b"%d" % number)) for number in range(4)]
    assert collect(place, rows[0]) == set(), "all is young"
    place.pass_days(31)
    assert collect(place, rows[0]) == {"dooms"}
    gc.rescue(place.store().shared, action(1).generation, {action(1).key})
    commit(place.store(), 2, files=(b"shared", b"2"))
    assert collect(place, rows[0]) == {"waits"}
    place.pass_days(31)
    commit(place.store(), 2, files=(b"shared", b"2"))
    assert collect(place, rows[0]) == {"goes"}
    assert [is_whole(place.store(), row, number) for number, row in enumerate(rows)] == [True, True, True, False]
    assert set(place.store().shared.names("gc/")) == {gc.CLOCK}
    assert check(place.store(), Live()).is_clean


def test_damage_is_found_and_repaired(place, capsys):
    mine = place.store()
    rows = [commit(mine, number) for number in range(4)]
    packs = [blob_name(row["outputs"]["0.tar"][0]) for row in rows]
    place.damage(packs[1], b"pack sample c0de X")
    place.damage(packs[2], None)
    place.damage(blob_name(result_of(rows[3])), b"{}")
    other = place.store(rebuild=lambda digest: digest in packs[1] and bool(other.put_bytes(b"pack sample c0de 1")))
    found = check(other, Live())
    assert {blob_name(digest.hex()) for digest in found.damaged} == {packs[1], blob_name(result_of(rows[3]))}
    assert len(found.hits) == 3
    done = repair(other, found, Live(), {})
    assert (len(done.restored), len(done.forgotten)) == (1, 2)
    assert check(place.store(), Live()).is_clean
    assert [is_whole(place.store(), row, number) for number, row in enumerate(rows)] == [True, True, False, False]


def test_a_listing_by_a_whole_name_or_its_beginning_has_it_and_no_neighbour(place):
    for name in ("a/ba", "a/bb", "a/bb.x", "a/bc", "a/bax"):
        place.bucket.write(name, b"")
    assert {one.name for one in place.bucket.list("a/bb")} == {"a/bb", "a/bb.x"}
    assert {one.name for one in place.bucket.list("a/ba")} == {"a/ba", "a/bax"}
    assert {one.name for one in place.bucket.list("a/bb.")} == {"a/bb.x"}
