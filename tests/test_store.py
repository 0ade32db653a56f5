"""The scene store on disk: whole files or none, right bytes or none, one result for all readers."""

import os

import pytest

from stages.lib.digests import canonical, digest_bytes
from stages.lib.errors import DataError
from stages.store.action import Action
from stages.store.store import MissingBlobError, Store

ACTION = Action("sample", {"keyframe_hz": 2.0}, "c0de", "", {"scene": "a"}, {"recording": "ab" * 32})


def test_canonical_json_has_one_spelling_and_refuses_nan():
    assert canonical({"b": 1, "a": [1.5, "ü"]}) == '{"a":[1.5,"ü"],"b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


def test_every_part_of_an_action_changes_its_key_and_only_shared_parts_its_generation():
    parts = {"op": "x", "knobs": {}, "code": "", "salt": "s", "params": {}, "inputs": {}}
    for part, value in parts.items():
        other = Action(**{**vars_of(ACTION), part: value})
        assert other.key != ACTION.key
        assert (other.generation != ACTION.generation) == (part not in ("params", "inputs"))


def vars_of(action: Action) -> dict:
    return {name: getattr(action, name) for name in ("op", "knobs", "code", "salt", "params", "inputs")}


def test_a_blob_comes_back_with_its_bytes_and_cannot_be_written(tmp_path):
    store = Store.in_folder(tmp_path)
    blob = store.put_bytes(b"lidar")
    path = store.need(blob.digest)
    assert (path.read_bytes(), blob.digest, blob.bytes) == (b"lidar", digest_bytes(b"lidar"), 5)
    assert path.stat().st_mode & 0o222 == 0


def test_put_file_moves_and_put_copy_leaves_the_file(tmp_path):
    store = Store.in_folder(tmp_path / "store")
    with store.scratch() as folder:
        (folder / "moved").write_bytes(b"moved")
        (tmp_path / "copied").write_bytes(b"copied")
        moved, copied = store.put_file(folder / "moved"), store.put_copy(tmp_path / "copied")
        assert list(folder.iterdir()) == []
    assert store.need(moved.digest).read_bytes() == b"moved"
    assert store.need(copied.digest).read_bytes() == b"copied"
    assert (tmp_path / "copied").read_bytes() == b"copied"


def test_a_damaged_blob_is_never_returned_and_is_made_again(tmp_path, capsys):
    made = []

    def rebuild(digest):
        made.append(digest)
        store.put_bytes(b"right")
        return True

    store = Store.in_folder(tmp_path, rebuild=rebuild)
    blob = store.put_bytes(b"right")
    path = store.need(blob.digest)
    os.chmod(path, 0o644)
    path.write_bytes(b"wrong")
    assert Store.in_folder(tmp_path, rebuild=rebuild).need(blob.digest).read_bytes() == b"right"
    assert made == [blob.digest]
    assert "damaged" in capsys.readouterr().err


def test_a_gone_blob_that_nothing_makes_is_an_error_with_a_command(tmp_path):
    with pytest.raises(MissingBlobError, match=r"blob abc is gone(.|\n)*dvc repro"):
        Store.in_folder(tmp_path).need("abc")


def test_a_committed_action_is_found_by_one_listing(tmp_path):
    store = Store.in_folder(tmp_path)
    outputs = {"pack.tar": store.put_bytes(b"pack")}
    result = store.commit(ACTION, "scene a", {"num": 1}, outputs)
    assert store.done(ACTION.generation) == {ACTION.key: result}
    assert store.lookup(ACTION) == store.result(result)
    assert store.lookup(Action(**{**vars_of(ACTION), "salt": "other"})) is None
    assert store.result(result) == {"facts": {"num": 1}, "outputs": {"pack.tar": [digest_bytes(b"pack"), 4]}}
    assert store.history("sample", "scene a") == [ACTION.document]
    assert store.commit(ACTION, "scene a", {"num": 1}, outputs) == result


def test_an_action_whose_result_document_is_gone_counts_as_not_done(tmp_path):
    store = Store.in_folder(tmp_path)
    result = store.commit(ACTION, "a", {}, {})
    (tmp_path / "cas" / result[:2] / result).unlink()
    assert store.result(store.done(ACTION.generation)[ACTION.key]) is None


def test_two_results_for_one_key_are_reported_and_all_readers_take_the_same(tmp_path, capsys):
    store = Store.in_folder(tmp_path)
    results = sorted(store.commit(ACTION, "a", {"n": n}, {}) for n in (1, 2))
    assert store.done(ACTION.generation) == {ACTION.key: results[0]}
    assert "not deterministic" in capsys.readouterr().err
    assert store.lookup(ACTION) == store.result(results[0])
    (tmp_path / "cas" / results[0][:2] / results[0]).unlink()
    assert store.lookup(ACTION) == store.result(results[1]), "where one is gone, the other"
    store.forget_lost(ACTION)
    assert store.done(ACTION.generation) == {ACTION.key: results[1]}


def test_rebuilt_bytes_that_differ_are_an_error(tmp_path):
    def rebuild(digest):
        raise DataError(f"other bytes than {digest}")

    with pytest.raises(DataError, match="other bytes than abc"):
        Store.in_folder(tmp_path, rebuild=rebuild).need("abc")
