"""Garbage collection: what nobody needs goes in two steps, what anybody needs or uses stays whole."""

import itertools
import time

import pytest

from stages.store import gc
from stages.store import store as module
from tests.places import DAY_S, PLACES, action, commit, is_whole, live, result_of

GRACE_S = 30 * DAY_S


class KilledError(BaseException):
    """The process ends here."""


def collect(place, *rows: dict) -> gc.Survey:
    """One `roadmill store gc` whose roots name these rows."""
    store = place.store()
    found = gc.survey(store, live(*rows), GRACE_S)
    gc.sweep(store, found)
    gc.bury(store, found)
    return found


def blobs(place) -> set[str]:
    return {name.rpartition("/")[2] for name in place.names() if name.startswith("cas/")}


def counts(found: gc.Survey) -> dict:
    return {key: dict(count) for key, count in found.tally.items()}


def test_what_no_root_names_is_doomed_first_and_deleted_a_grace_period_later(place):
    one, two = (commit(place.store(), number) for number in (1, 2))
    before = place.names()
    assert counts(collect(place, one)) == {}, "it is young"
    place.pass_days(31)
    document_bytes = len(before[f"cas/{result_of(two)[:2]}/{result_of(two)}"])
    dead = {"results": 1, "blobs": 2, "bytes": len(b"pack sample c0de 2") + document_bytes}
    assert counts(collect(place, one)) == {("dooms", "sample"): dead}
    assert place.names() == before
    place.pass_days(29)
    assert counts(collect(place, one)) == {("waits", "sample"): dead}
    assert place.names() == before
    place.pass_days(2)
    assert counts(collect(place, one)) == {("goes", "sample"): dead}
    gone = before.keys() - place.names().keys()
    assert gone == {f"cas/{digest[:2]}/{digest}" for digest in (result_of(two), two["outputs"]["0.tar"][0])} | {
        f"ac/{action(2).generation}/{action(2).key[:2]}/{action(2).key}.{result_of(two)}"}
    assert is_whole(place.store(), one, 1)
    assert counts(collect(place, one)) == {}
    assert set(place.store().shared.names("gc/")) == {gc.CLOCK}


def test_a_blob_stays_as_long_as_one_living_result_names_it(place):
    shared = b"calibration of both"
    one = commit(place.store(), 1, files=(shared, b"one"))
    two = commit(place.store(), 2, files=(shared, b"two"))
    for _ in range(3):
        place.pass_days(31)
        collect(place, one)
    assert is_whole(place.store(), one, 1)
    assert not is_whole(place.store(), two, 2)
    assert len(blobs(place)) == 3


def test_an_orphan_goes_and_one_that_is_put_again_or_named_again_stays(place):
    orphans = [place.store().put_bytes(b"orphan %d" % number) for number in range(3)]
    place.pass_days(31)
    collect(place)
    place.pass_days(31)
    place.store().put_bytes(b"orphan 1")  # as an older result it may be what a run is about to commit
    row = {"name": "scene", "facts": {}, "outputs": {"pack.tar": [orphans[2].digest, orphans[2].bytes]}}
    collect(place, row)
    assert blobs(place) == {orphans[1].digest, orphans[2].digest}


def test_a_young_action_keeps_the_old_blobs_it_names(place):
    place.store().put_bytes(b"old pack")
    place.pass_days(31)
    collect(place)
    place.pass_days(25)
    row = commit(place.store(), 1, files=(b"old pack",))
    place.pass_days(6)
    collect(place)
    assert is_whole(place.store(), row, 1)


def test_a_dead_action_that_is_not_deleted_yet_keeps_its_blobs_whatever_an_older_tombstone_says(place):
    orphan = place.store().put_bytes(b"pack")
    place.pass_days(31)
    collect(place)
    row = commit(place.store(), 1, files=(b"pack",))
    place.pass_days(31)
    found = collect(place)
    assert counts(found) == {("dooms", "sample"): {"results": 1, "blobs": 2, "bytes": orphan.bytes + len(
        place.names()[f"cas/{result_of(row)[:2]}/{result_of(row)}"])}}
    assert is_whole(place.store(), row, 1)
    place.pass_days(31)
    collect(place)
    assert blobs(place) == set()


def test_a_run_that_finds_a_doomed_action_done_keeps_it_and_its_blobs(place):
    rows = [commit(place.store(), number) for number in range(3)]
    place.pass_days(31)
    collect(place)
    store = place.store()
    assert set(store.done(action(0).generation)) == {action(number).key for number in range(3)}
    gc.rescue(store.shared, action(0).generation, {action(1).key, action(7).key})
    place.pass_days(31)
    collect(place)
    assert [is_whole(place.store(), row, number) for number, row in enumerate(rows)] == [False, True, False]
    place.pass_days(31)
    collect(place)
    assert is_whole(place.store(), rows[1], 1), "doomed again, with a grace period of its own"
    place.pass_days(31)
    collect(place)
    assert blobs(place) == set()


def test_rescuing_costs_one_listing_where_nothing_is_doomed(tmp_path):
    place = PLACES["bucket"](tmp_path)
    commit(place.store(), 1)
    place.bucket.requests.clear()
    gc.rescue(place.bucket, action(1).generation, {action(1).key})
    assert place.bucket.requests == {"LIST": 1}


def test_what_a_branch_named_again_has_its_whole_grace_period_when_it_dies_again(place):
    row = commit(place.store(), 1)
    place.pass_days(31)
    collect(place)
    place.pass_days(10)
    collect(place, row)
    place.pass_days(21)
    found = collect(place)
    assert {step for step, _ in found.tally} == set(), "struck out of the tombstone, it is kept until that is gone"
    collect(place)
    place.pass_days(29)
    collect(place)
    assert is_whole(place.store(), row, 1)


def test_what_a_run_uses_while_it_is_being_deleted_keeps_its_blobs(place, monkeypatch):
    row = commit(place.store(), 1)
    place.pass_days(31)
    collect(place)
    place.pass_days(31)
    store = place.store()
    found, delete = gc.survey(store, live(), GRACE_S), store.shared.delete

    def delete_then_use(names):
        delete(names)
        gc.rescue(store.shared, action(1).generation, {action(1).key})

    monkeypatch.setattr(store.shared, "delete", delete_then_use)
    gc.sweep(store, found)
    assert store.lookup(action(1)) is None
    assert blobs(place) == {result_of(row), row["outputs"]["0.tar"][0]}


def test_what_was_made_again_since_the_survey_is_not_deleted(place):
    commit(place.store(), 1)
    place.pass_days(31)
    collect(place)
    place.pass_days(31)
    store = place.store()
    found = gc.survey(store, live(), GRACE_S)
    assert len(found.goes) == 3
    row = commit(place.store(), 1)
    gc.sweep(store, found)
    assert is_whole(place.store(), row, 1)


def old_store(place) -> tuple[list[dict], list[dict]]:
    """(rows that live, rows that are doomed and ripe): they share blobs, and actions of two generations."""
    rows = [commit(place.store(), number, code=code, files=(b"shared", f"{number} {code}".encode()))
            for number, code in itertools.product(range(3), ("old", "new"))]
    place.store().put_bytes(b"orphan")
    place.pass_days(31)
    kept, dead = rows[1::2], rows[::2]
    collect(place, *kept)
    place.pass_days(31)
    return kept, dead


@pytest.mark.parametrize("kind", PLACES)
def test_a_kill_between_any_two_deletions_leaves_every_hit_whole_and_the_next_collection_ends_it(kind, tmp_path):
    final = None
    for budget in itertools.count():
        place = PLACES[kind](tmp_path / str(budget))
        kept, dead = old_store(place)
        store = place.store()
        found, delete, left = gc.survey(store, live(*kept), GRACE_S), store.shared.delete, [budget]

        def delete_some(names, delete=delete, left=left):
            for name in names:
                if not left[0]:
                    raise KilledError
                left[0] -= 1
                delete([name])

        store.shared.delete = delete_some
        try:
            gc.sweep(store, found)
        except KilledError:
            store.shared.delete = delete
            for row, code in itertools.chain(zip(kept, ["new"] * 3), zip(dead, ["old"] * 3)):
                number = row["facts"]["n"]
                if place.store().done(action(number, code=code).generation).get(action(number, code=code).key):
                    assert is_whole(place.store(), row, number, code=code), budget
            collect(place, *kept)
            place.pass_days(31)
            collect(place, *kept)
            assert final is None or final == blobs(place)
            final = blobs(place)
            continue
        assert blobs(place) == final
        assert all(is_whole(place.store(), row, row["facts"]["n"], code="new") for row in kept)
        assert budget > 10
        break


def test_a_kill_while_a_tombstone_is_written_dooms_nothing(place, monkeypatch):
    row = commit(place.store(), 1)
    place.pass_days(31)
    store = place.store()
    found, write = gc.survey(store, live(), GRACE_S), store.shared.write

    def write_all_but_the_last(name, data):
        if name.endswith("/whole"):
            raise KilledError
        write(name, data)

    monkeypatch.setattr(store.shared, "write", write_all_but_the_last)
    with pytest.raises(KilledError):
        gc.bury(store, found)
    monkeypatch.undo()
    place.pass_days(31)
    assert {step for step, _ in collect(place).tally} == {"dooms"}
    assert is_whole(place.store(), row, 1)
    assert len({name.split("/")[1] for name in place.store().shared.names("gc/")} - {"clock"}) == 1


def test_two_collections_at_once_delete_nothing_that_lives(place):
    kept, _ = old_store(place)
    first, second = place.store(), place.store()
    both = [(store, gc.survey(store, live(*kept), GRACE_S)) for store in (first, second)]
    for store, found in both:
        gc.sweep(store, found)
    for store, found in both:
        gc.bury(store, found)
    assert all(is_whole(place.store(), row, row["facts"]["n"], code="new") for row in kept)
    assert len(blobs(place)) == 3 + 3 + 1


def test_ages_are_taken_by_the_clock_of_the_place_and_not_of_the_machine(tmp_path, monkeypatch):
    place = PLACES["folder"](tmp_path)
    row = commit(place.store(), 1)
    for years in (-10, 10):
        with monkeypatch.context() as patch:
            now_s = time.time() + years * 365 * DAY_S
            patch.setattr(time, "time", lambda now_s=now_s: now_s)
            for _ in range(3):
                assert counts(collect(place)) == {}
    assert is_whole(place.store(), row, 1)


def test_a_machine_whose_clock_is_wrong_still_makes_what_it_puts_again_young(tmp_path, monkeypatch):
    place = PLACES["folder"](tmp_path)
    orphan = place.store().put_bytes(b"orphan")
    place.pass_days(31)
    collect(place)
    place.pass_days(31)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    place.store().put_bytes(b"orphan")
    collect(place)
    assert blobs(place) == {orphan.digest}


def test_pages_stay_whole_while_their_generation_lives_and_go_after_it(place, monkeypatch):
    monkeypatch.setattr(module, "PAGE_MIN_DOCUMENTS", 2)
    store = place.store()
    rows = {code: [commit(store, number, code=code) for number in range(3)] for code in ("old", "new")}
    for code, made in rows.items():
        generation = action(0, code=code).generation
        store.keep_pages(generation, store.documents(generation, [result_of(row) for row in made]))
    for _ in range(2):
        place.pass_days(31)
        collect(place, rows["new"][0])
    pages = [name for name in place.names() if name.startswith("pages/")]
    assert [name.rpartition("/")[0] for name in pages] == [f"pages/{action(0, code='new').generation}"]
    assert blobs(place) == {pages[0].rpartition("/")[2], result_of(rows["new"][0]),
                            rows["new"][0]["outputs"]["0.tar"][0]}


def test_of_two_results_of_one_action_that_which_a_root_names_stays(place, capsys):
    store = place.store()
    rows = []
    for text in (b"first", b"second"):
        blob = store.put_bytes(text)
        store.commit(action(1), "scene", {"n": 1}, {"pack.tar": blob})
        rows.append({"name": "scene", "facts": {"n": 1}, "outputs": {"pack.tar": [blob.digest, blob.bytes]}})
    for _ in range(2):
        place.pass_days(31)
        collect(place, rows[0])
    assert is_whole(place.store(), rows[0], 1)
    assert len(blobs(place)) == 2


def test_an_action_whose_document_is_gone_is_collected_too(place):
    row = commit(place.store(), 1)
    place.damage(f"cas/{result_of(row)[:2]}/{result_of(row)}", None)
    for _ in range(2):
        place.pass_days(31)
        collect(place)
    assert blobs(place) == set()
    assert not [name for name in place.names() if name.startswith("ac/")]


def test_names_that_are_not_the_stores_are_left_alone(place):
    store = place.store()
    for name in ("cas/readme.txt", "ac/sample/x", "pages/note", "mine/own"):
        store.shared.write(name, b"?")
    before = place.names()
    for _ in range(3):
        place.pass_days(31)
        collect(place)
    assert place.names() == before


def test_an_orphan_that_a_branch_named_for_a_while_has_its_whole_grace_period_too(place):
    orphan = place.store().put_bytes(b"orphan")
    row = {"name": "scene", "facts": {}, "outputs": {"pack.tar": [orphan.digest, orphan.bytes]}}
    place.pass_days(31)
    collect(place)
    place.pass_days(29)
    collect(place, row)
    place.pass_days(2)
    assert counts(collect(place)) == {("dooms", "(nobody's)"): {"blobs": 1, "bytes": 6}}
    assert blobs(place) == {orphan.digest}


def test_a_page_that_is_not_deleted_yet_keeps_its_blob(place, monkeypatch):
    monkeypatch.setattr(module, "PAGE_MIN_DOCUMENTS", 2)
    rows = [commit(place.store(), number) for number in range(2)]
    documents = place.store().documents(action(0).generation, [result_of(row) for row in rows])
    page = place.store().put_bytes(b"\n".join(documents[digest] for digest in sorted(documents)))
    place.pass_days(31)
    collect(place, *rows)
    place.store().shared.create(f"pages/{action(0).generation}/{page.digest}", b"")
    place.pass_days(31)
    collect(place)
    assert page.digest in blobs(place)
    for _ in range(2):
        place.pass_days(31)
        collect(place)
    assert blobs(place) == set()
