"""fsck: every damage is named, nothing is changed before a repair, and a repair ends with a store that is whole."""


from stages.harness import Harness
from stages.lib.digests import canonical, digest_bytes
from stages.lib.errors import DataError
from stages.store import store as module
from stages.store.fsck import check, repair
from stages.store.store import blob_name
from stages.tools import cli
from tests.fake_clone import FakeClone
from tests.places import PLACES, action, commit, is_whole, live, result_of


def pack(row: dict) -> str:
    return row["outputs"]["0.tar"][0]


def raw(digest: str) -> bytes:
    return bytes.fromhex(digest)


def entry(row: dict) -> str:
    one = action(row["facts"]["n"])
    return f"ac/{one.generation}/{one.key[:2]}/{one.key}.{result_of(row)}"


def test_a_whole_store_is_clean_and_its_orphans_are_counted(place):
    store = place.store()
    rows = [commit(store, number) for number in range(3)]
    store.put_bytes(b"input of an action")
    one = action(9)
    store.commit(type(one)(one.op, one.knobs, one.code, "", {}, {"table": digest_bytes(b"input of an action")}),
                 "scene 9", {"n": 9}, {"pack.tar": store.put_bytes(b"pack sample c0de 0")})
    store.put_bytes(b"orphan")
    seen = []
    found = check(place.store(), live(*rows), lambda blobs, total: seen.append(total) or blobs)
    assert found.is_clean
    assert (found.num["blobs"], found.num["results"], found.num["actions"], found.num["pages"]) == (9, 4, 4, 0)
    assert found.num["bytes"] == sum(len(data) for name, data in place.names().items() if name.startswith("cas/"))
    assert (found.num_orphans, found.orphan_bytes, seen) == (1, 6, [9, 4])


def damaged_store(place) -> list[dict]:
    """0 whole, 1 its pack damaged, 2 its pack gone, 3 its document damaged, 4 its document gone."""
    store = place.store()
    rows = [commit(store, number) for number in range(5)]
    place.damage(blob_name(pack(rows[1])), b"pack sample c0de X")
    place.damage(blob_name(pack(rows[2])), None)
    place.damage(blob_name(result_of(rows[3])), b"{}")
    place.damage(blob_name(result_of(rows[4])), None)
    return rows


def test_every_damage_is_named_and_nothing_is_changed(place, capsys):
    rows = damaged_store(place)
    before = place.names()
    found = check(place.store(), live(*rows))
    assert found.damaged == {raw(pack(rows[1])), raw(result_of(rows[3]))}
    assert found.lost == {raw(pack(rows[1])): "sample", raw(pack(rows[2])): "sample",
                          raw(result_of(rows[3])): "sample", raw(result_of(rows[4])): "sample"}
    assert set(found.hits.names()) == {entry(row) for row in rows[1:]}
    assert not found.is_clean
    assert place.names() == before
    assert capsys.readouterr().err == ""


def test_what_nothing_makes_is_forgotten_so_that_the_next_run_makes_it(place):
    rows = damaged_store(place)
    store = place.store()
    found = check(store, live())
    done = repair(store, found, live(), {})
    assert (done.restored, done.lost) == (set(), {})
    assert set(done.forgotten) == {entry(row) for row in rows[1:]}
    assert set(store.done(action(0).generation)) == {action(0).key}
    assert check(place.store(), live()).is_clean
    for number in range(1, 5):
        commit(place.store(), number)
    assert all(is_whole(place.store(), row, number) for number, row in enumerate(rows))
    assert check(place.store(), live(*rows)).is_clean


def test_what_manifests_repeat_and_what_can_be_done_again_comes_back(place):
    rows = damaged_store(place)
    made = []

    def rebuild(digest):
        made.extend(row for row in rows if pack(row) == digest)
        store.put_bytes(b"pack sample c0de %d" % made[-1]["facts"]["n"])
        return True

    store = place.store(rebuild=rebuild)
    documents = {raw(result_of(row)): canonical({"facts": row["facts"], "outputs": row["outputs"]}) for row in rows}
    done = repair(store, check(store, live(*rows)), live(*rows), documents)
    assert done.restored == {raw(pack(rows[1])), raw(pack(rows[2])), raw(result_of(rows[3])), raw(result_of(rows[4]))}
    assert (done.forgotten, done.lost) == ([], {})
    assert {row["facts"]["n"] for row in made} == {1, 2}
    assert all(is_whole(place.store(), row, number) for number, row in enumerate(rows))
    assert check(place.store(), live(*rows)).is_clean


def test_a_file_whose_document_was_lost_too_is_looked_at_once_the_document_is_back(place):
    row = commit(place.store(), 1)
    place.damage(blob_name(pack(row)), None)
    place.damage(blob_name(result_of(row)), None)
    store = place.store()
    documents = {raw(result_of(row)): canonical({"facts": row["facts"], "outputs": row["outputs"]})}
    done = repair(store, check(store, live()), live(), documents)
    assert done.restored == {raw(result_of(row))}
    assert done.forgotten == [entry(row)]
    assert check(place.store(), live()).is_clean


def test_what_a_manifest_here_needs_and_nothing_makes_remains_with_its_reason(place):
    row = commit(place.store(), 1)
    place.damage(blob_name(pack(row)), None)

    def rebuild(digest):
        raise DataError("the recording bag-1 is gone")

    store = place.store(rebuild=rebuild)
    done = repair(store, check(store, live(row)), live(row), {})
    assert done.lost == {raw(pack(row)): "the recording bag-1 is gone"}
    assert done.forgotten == [entry(row)]


def test_what_a_manifest_names_and_no_action_has_is_missing_too(place):
    row = commit(place.store(), 1)
    for name in (entry(row), blob_name(pack(row))):
        place.damage(name, None)
    found = check(place.store(), live(row))
    assert found.lost == {raw(pack(row)): ""}
    assert not found.is_clean


def test_the_copy_of_this_machine_restores_the_bucket(tmp_path):
    place = PLACES["bucket"](tmp_path)
    mine = place.store()
    row = commit(mine, 1)
    place.damage(blob_name(pack(row)), b"pack sample c0de X")
    place.damage(blob_name(result_of(row)), None)
    done = repair(mine, check(mine, live()), live(), {})
    assert (done.restored, done.forgotten) == ({raw(pack(row)), raw(result_of(row))}, [])
    assert is_whole(place.store(), row, 1)


def test_a_document_comes_back_from_a_page_and_a_page_without_its_blob_is_forgotten(place, monkeypatch):
    monkeypatch.setattr(module, "PAGE_MIN_DOCUMENTS", 2)
    store, generation = place.store(), action(0).generation
    rows = [commit(store, number) for number in range(4)]
    for some in (rows[:2], rows[2:]):
        store.keep_pages(generation, store.documents(generation, [result_of(row) for row in some]))
    pages = sorted(name for name in place.names() if name.startswith("pages/"))
    place.damage(blob_name(pages[0].rpartition("/")[2]), b"")
    place.damage(blob_name(result_of(rows[0])), None)
    place.damage(blob_name(result_of(rows[3])), None)
    store = place.store()
    found = check(store, live())
    assert found.pages == [pages[0]]
    done = repair(store, found, live(), {})
    assert len(done.restored) == len(done.forgotten) == 1, "one page was whole"
    assert check(place.store(), live()).is_clean
    assert [name for name in place.names() if name.startswith("pages/")] == [pages[1]]


def test_damaged_records_and_damaged_blobs_of_nobody_are_removed_and_foreign_names_left(place):
    store = place.store()
    row = commit(store, 1)
    orphan = store.put_bytes(b"orphan")
    place.damage(blob_name(orphan.digest), b"orphaN")
    [record] = [name for name in place.names() if name.startswith("actions/")]
    place.damage(record, b"{}")
    for name in ("cas/notes.txt", "ac/x", "actions/readme", "pages/x"):
        store.shared.write(name, b"?")
    found = check(place.store(), live())
    assert (found.actions, found.damaged) == ([record], {raw(orphan.digest)})
    assert sorted(found.foreign) == ["ac/x", "actions/readme", "cas/notes.txt", "pages/x"]
    store = place.store()
    repair(store, found, live(), {})
    again = check(place.store(), live())
    assert again.is_clean
    assert again.foreign == found.foreign
    assert is_whole(place.store(), row, 1)


def test_the_new_is_whole_before_the_old_is_removed(place, monkeypatch):
    row = commit(place.store(), 1)
    place.damage(blob_name(pack(row)), b"pack sample c0de X")
    store = place.store(rebuild=lambda digest: bool(store.put_bytes(b"pack sample c0de 1")))
    found, removed, delete = check(store, live(row)), [], store.shared.delete

    def watched(names):
        names = list(names)
        removed.extend(names)
        delete(names)

    monkeypatch.setattr(store.shared, "delete", watched)
    repair(store, found, live(row), {})
    assert removed == []
    assert is_whole(place.store(), row, 1)


def test_a_full_look_at_a_bucket_costs_listings_and_one_request_a_blob(tmp_path):
    place = PLACES["bucket"](tmp_path)
    store = place.store()
    for number in range(20):
        commit(store, number)
    place.bucket.requests.clear()
    check(place.store(), live())
    assert place.bucket.requests == {"LIST": 4, "GET": 40 + 20}


def told(capsys, *words: str, code: int = 0) -> list[str]:
    """What `roadmill store fsck` prints."""
    assert cli.app(["store", "fsck", *words], standalone_mode=False) == (code or None)
    return capsys.readouterr().out.splitlines()


def test_the_command_says_what_is_wrong_with_whose_and_repairs_it_from_this_clone(tmp_path, monkeypatch, capsys):
    place = PLACES["folder"](tmp_path / "store")
    clone = FakeClone(tmp_path / "clone", place.folder)
    store = place.store()
    rows = [commit(store, number) for number in range(3)]
    clone.commit({"sample": rows[:2]})
    other = commit(store, 7, op="autolabel")
    store.put_bytes(b"orphan")
    monkeypatch.chdir(clone.folder)
    total = sum(len(data) for name, data in place.names().items() if name.startswith("cas/"))
    head = f"{place.folder}: {{}} results, {{}} blobs, {total / 2**30:.3f} GiB, {{}} action documents, 0 pages"
    orphans = "1 blobs, 0.000 GiB, are nobody's: `roadmill store gc` takes them when they are old"
    assert told(capsys) == [head.format(4, 9, 4), orphans, "all whole"]
    place.damage(blob_name(pack(rows[0])), b"PACK sample c0de 0")
    place.damage(blob_name(result_of(rows[1])), None)
    place.damage(blob_name(pack(rows[2])), None)
    place.damage(blob_name(pack(other)), None)
    lines = told(capsys, code=4)
    assert lines[0] == head.format(4, 6, 4)
    assert sorted(lines[1:5]) == sorted([
        f"damaged  {blob_name(pack(rows[0]))}   sample scene 0", f"missing  {blob_name(result_of(rows[1]))}   sample",
        f"missing  {blob_name(pack(rows[2]))}   sample", f"missing  {blob_name(pack(other))}   autolabel"])
    assert sorted(lines[5:9])[0].startswith("hollow   ac/")
    assert lines[9] == orphans
    assert lines[10].startswith("`roadmill store fsck --repair` brings back what it can, and forgets the rest")
    monkeypatch.setattr(Harness, "rebuild", lambda self, digest: digest == pack(rows[0]) and bool(
        self.store.put_bytes(b"pack sample c0de 0")))
    assert told(capsys, "--repair")[-1] == ("repaired: 2 blobs are whole again, 2 results are forgotten: the next run "
                                            "that wants them makes them again")
    assert told(capsys)[-1] == "all whole"
    place.damage(blob_name(pack(rows[1])), None)
    assert told(capsys, "--repair", code=4)[-1] == (
        f"not to be had: {blob_name(pack(rows[1]))}   sample scene 1: nothing known makes it")
