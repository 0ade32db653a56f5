"""A store whose objects are shared: what it asks of the bucket, what its cache holds, and how it heals."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.lib.digests import digest_bytes
from stages.lib.errors import RemoteError
from stages.lib.stage import Blob
from stages.store import store as module
from stages.store.action import Action
from stages.store.folder import Folder
from stages.store.store import MissingBlobError, Store, blob_name
from tests.memory import Memory


def action(number: int = 0, **changes: object) -> Action:
    return Action(**{"op": "sample", "knobs": {"hz": 2}, "code": "c0de", "salt": "", "params": {"n": number},
                     "inputs": {}, **changes})


@pytest.fixture
def bucket() -> Memory:
    return Memory()


def machine(folder: Path, bucket: Memory, **more) -> Store:
    """A store on one machine of a team."""
    return Store(Folder(folder), bucket, **more)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_and_a_bucket_hold_the_same_names_and_bytes(tmp_path, bucket):
    for store in (Store.in_folder(tmp_path / "a"), machine(tmp_path / "b", bucket)):
        store.commit(action(), "scene", {"n": 1}, {"pack.tar": store.put_bytes(b"pack")})
        store.keep_run("sample", {"seconds": 1.0})
    plain = {name for name in names(tmp_path / "a") if not name.startswith("runs/")}
    assert plain == {name for name in bucket.kept if not name.startswith("runs/")}
    assert all((tmp_path / "a" / name).read_bytes() == bucket.kept[name] for name in plain)
    assert len([name for name in bucket.kept if name.startswith("runs/sample/")]) == 1
    assert {name.partition("/")[0] for name in names(tmp_path / "b")} == {"cas"}, "the cache holds blobs alone"


def test_another_machine_reads_what_one_has_put_and_asks_once(tmp_path, bucket):
    blob = machine(tmp_path / "one", bucket).put_bytes(b"pack")
    other = machine(tmp_path / "other", bucket)
    bucket.requests.clear()
    assert [other.need(blob.digest).read_bytes() for _ in range(3)] == [b"pack"] * 3
    assert bucket.requests == {"GET": 1}


def test_a_blob_is_put_with_one_request_and_one_that_is_there_is_not_sent_again(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(module, "SINGLE_BYTES", 100)
    store = machine(tmp_path / "one", bucket)
    store.put_bytes(b"small")
    assert bucket.requests == {"PUT": 1}
    store.put_bytes(b"small")
    assert bucket.requests == {"PUT": 1}
    large = b"large" * 100
    store.put_bytes(large)
    assert bucket.requests == {"PUT": 2, "HEAD": 1}
    machine(tmp_path / "other", bucket).put_bytes(large)
    assert bucket.requests == {"PUT": 2, "HEAD": 2, "LIST": 1}


@pytest.mark.parametrize("data", [b"small", b"large" * 100])
def test_a_blob_that_was_cut_short_in_the_bucket_is_put_again(tmp_path, bucket, monkeypatch, data):
    monkeypatch.setattr(module, "SINGLE_BYTES", 100)
    bucket.kept[blob_name(digest_bytes(data))] = data[:-1]
    machine(tmp_path, bucket).put_bytes(data)
    assert bucket.kept[blob_name(digest_bytes(data))] == data


def test_bytes_that_the_way_spoilt_are_fetched_again(tmp_path, bucket, capsys):
    blob = machine(tmp_path / "one", bucket).put_bytes(b"right")
    bucket.spoil[blob_name(blob.digest)] = [b"wrong"]
    assert machine(tmp_path / "other", bucket).need(blob.digest).read_bytes() == b"right"
    assert capsys.readouterr().err == ""


def test_a_machine_whose_bytes_differ_each_time_removes_nothing_from_the_bucket(tmp_path, bucket):
    blob = machine(tmp_path / "one", bucket).put_bytes(b"right")
    bucket.spoil[blob_name(blob.digest)] = [b"wrong", b"wrung"]
    with pytest.raises(RemoteError, match=rf"memory/{blob_name(blob.digest)} came as {digest_bytes(b'wrong')[:12]}… "
                                          r"and then as .*nothing was removed\n  `roadmill store fsck` on another"):
        machine(tmp_path / "other", bucket).find(blob.digest)
    assert machine(tmp_path / "third", bucket).need(blob.digest).read_bytes() == b"right"


def test_a_blob_damaged_in_the_bucket_is_never_returned_and_is_made_again(tmp_path, bucket, capsys):
    blob = machine(tmp_path / "one", bucket).put_bytes(b"right")
    bucket.kept[blob_name(blob.digest)] = b"wrong"

    def rebuild(digest):
        store.put_bytes(b"right")
        return True

    store = machine(tmp_path / "other", bucket, rebuild=rebuild)
    assert store.need(blob.digest).read_bytes() == b"right"
    assert bucket.kept[blob_name(blob.digest)] == b"right"
    assert capsys.readouterr().err == (f"memory/{blob_name(blob.digest)}: damaged, its bytes are "
                                       f"{digest_bytes(b'wrong')[:12]}…; removed, will be made again\n")
    with pytest.raises(MissingBlobError, match=r"memory: blob abc is gone(.|\n)*dvc repro"):
        machine(tmp_path / "third", bucket).need("abc")


def test_a_cached_blob_that_is_damaged_is_fetched_again(tmp_path, bucket, capsys):
    blob = machine(tmp_path, bucket).put_bytes(b"right")
    path = machine(tmp_path, bucket).need(blob.digest)
    os.chmod(path, 0o644)
    path.write_bytes(b"wrong")
    assert machine(tmp_path, bucket).need(blob.digest).read_bytes() == b"right"
    assert "damaged, 5 bytes" in capsys.readouterr().err


def nine_old(store: Store) -> list[Blob]:
    """Nine blobs of 100 bytes, used longer ago than the cache must keep them, the first one the longest."""
    blobs = [store.put_bytes(b"%d" % number * 100) for number in range(9)]
    long_ago = time.time() - 2 * module.KEEP_S
    for number, blob in enumerate(blobs):
        path = store.local.path(blob_name(blob.digest))
        os.utime(path, (long_ago + number, path.stat().st_mtime))
    return blobs


def test_the_cache_keeps_within_its_limit_and_drops_the_least_recently_used(tmp_path, bucket):
    store = machine(tmp_path, bucket, cache_bytes=1000)
    blobs = nine_old(store)
    store.need(blobs[0].digest)
    store.put_bytes(b"x" * 200)
    here = [(tmp_path / blob_name(blob.digest)).exists() for blob in blobs]
    assert here[0], "just used"
    assert here[1:3] == [False, False]
    assert sum(path.stat().st_size for path in tmp_path.glob("cas/*/*")) <= 1000
    assert all(blob_name(blob.digest) in bucket.kept for blob in blobs)
    assert store.need(blobs[1].digest).read_bytes() == b"1" * 100


def test_the_cache_leaves_room_on_a_disk_that_is_smaller_than_its_limit(tmp_path, bucket, monkeypatch):
    store = machine(tmp_path, bucket, cache_bytes=1e12)
    blobs = nine_old(store)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    machine(tmp_path, bucket, cache_bytes=1e12).put_bytes(b"x" * 200)
    here = [(tmp_path / blob_name(blob.digest)).exists() for blob in blobs]
    assert here == [False, False, *[True] * 7], "900 there, 100 free: 950 may be used, 200 of them are new"


def test_what_was_used_in_the_last_hour_stays_in_a_full_cache(tmp_path, bucket):
    store = machine(tmp_path, bucket, cache_bytes=100)
    paths = [store.need(store.put_bytes(b"%d" % number * 90).digest) for number in range(5)]
    assert all(path.exists() for path in paths)


def test_what_is_held_stays_in_a_full_cache_however_long_ago_it_was_read(tmp_path, bucket):
    store = machine(tmp_path, bucket, cache_bytes=1000)
    held, left = (store.put_bytes(letter * 400) for letter in (b"h", b"l"))
    with store.scratch() as folder:
        paths = [store.hold(held.digest, folder), store.hold(held.digest, folder), store.need(left.digest)]
        for path in paths:
            os.utime(path, (time.time() - 2 * module.KEEP_S, path.stat().st_mtime))
        store.put_bytes(b"x" * 400)
        assert [path.exists() for path in paths] == [True, True, False]
    os.utime(paths[0], (time.time() - 2 * module.KEEP_S, paths[0].stat().st_mtime))
    machine(tmp_path, bucket, cache_bytes=1000).put_bytes(b"y" * 400)
    assert not paths[0].exists(), "nobody holds it any more"


def test_a_plan_of_100_000_scenes_costs_pages_of_listings_and_nothing_per_scene(tmp_path, bucket):
    done = {action(number).key: digest_bytes(b"%d" % number) for number in range(100_000)}
    generation = action().generation
    bucket.kept = dict.fromkeys((f"ac/{generation}/{key[:2]}/{key}.{result}" for key, result in done.items()), b"")
    assert machine(tmp_path, bucket).done(generation) == done
    assert bucket.requests == {"LIST": 100}


def test_results_of_many_actions_come_by_pages_on_another_machine(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(module, "PAGE_DOCUMENTS", 1500)
    one = machine(tmp_path / "one", bucket)
    generation = action().generation
    results = [one.commit(action(number), str(number), {"n": number}, {}) for number in range(2000)]
    documents = one.documents(generation, results)
    one.keep_pages(generation, documents)
    one.keep_pages(generation, documents)
    assert len([name for name in bucket.kept if name.startswith("pages/")]) == 2

    other = machine(tmp_path / "other", bucket)
    bucket.requests.clear()
    assert other.documents(generation, results) == documents
    assert bucket.requests == {"LIST": 1, "GET": 2}
    more = one.commit(action(2000), "2000", {"n": 2000}, {})
    bucket.requests.clear()
    assert machine(tmp_path / "other", bucket).documents(generation, [*results, more]).keys() == {*results, more}
    assert bucket.requests == {"LIST": 1, "GET": 1}, "pages are in the cache, one document is new"


def test_a_lost_or_damaged_page_costs_requests_and_no_result(tmp_path, bucket):
    one = machine(tmp_path / "one", bucket)
    generation = action().generation
    results = [one.commit(action(number), str(number), {"n": number}, {}) for number in range(1000)]
    documents = one.documents(generation, results)
    one.keep_pages(generation, documents)
    (page,) = (name.rpartition("/")[2] for name in bucket.kept if name.startswith("pages/"))
    bucket.kept[blob_name(page)] = b'{"facts":{},"outputs":{}}'
    assert machine(tmp_path / "other", bucket).documents(generation, results) == documents


def test_healing_keeps_the_new_result_before_the_lost_one_is_forgotten(tmp_path, bucket):
    store = machine(tmp_path, bucket)
    lost = store.commit(action(), "a", {"n": 1}, {"pack": store.put_bytes(b"one")})
    bucket.delete([blob_name(digest_bytes(b"one"))])
    new = store.commit(action(), "a", {"n": 2}, {"pack": store.put_bytes(b"two")})
    store.forget_lost(action())
    assert store.results(action()) == {new} != {lost}
    assert store.lookup(action()) == {"facts": {"n": 2}, "outputs": {"pack": [digest_bytes(b"two"), 3]}}
