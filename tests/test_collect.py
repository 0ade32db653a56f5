"""`roadmill store gc`: every ref of every clone that is named is a root, and where one is not known nothing goes."""

import re
import shutil
import subprocess

import pytest

from stages.lib.errors import ConfigError
from stages.store.store import Store
from stages.tools import cli, collect
from tests.clones import run
from tests.fake_clone import FakeClone
from tests.places import PLACES, commit, is_whole, result_of


@pytest.fixture
def place(tmp_path):
    return PLACES["folder"](tmp_path / "store")


@pytest.fixture
def clone(tmp_path, place):
    return FakeClone(tmp_path / "clone", place.folder)


def gc(clone, *others, dry_run=False) -> list[str]:
    return collect.collect(clone.folder, [other.folder for other in others], 30.0, dry_run)


def survivors(place, clone, *others) -> set[str]:
    """Packs that are left when all that is dead has been collected."""
    for _ in range(3):
        place.pass_days(31)
        gc(clone, *others)
    return {path.read_text() for path in place.folder.glob("cas/*/*") if path.read_bytes().startswith(b"pack")}


def test_all_refs_are_roots(place, clone):
    store = place.store()
    row = {name: commit(store, number, files=(f"pack {name}".encode(),))
           for number, name in enumerate(("tag", "branch", "remote", "experiment", "stash", "old", "here", "nobody"))}
    for name in ("tag", "branch", "remote", "experiment"):
        clone.commit({"sample": [row[name]]})
        ref = {"tag": "tags/detector@v1.0.0", "branch": "heads/other", "remote": "remotes/origin/main",
               "experiment": "exps/ab/cd/slow-ant"}[name]
        clone.git("update-ref", f"refs/{ref}", "HEAD")
    clone.commit({"sample": [row["stash"]]})
    clone.git("update-ref", "refs/stash", "HEAD")
    clone.commit({"sample": [row["old"]]})
    clone.commit({"autolabel": [row["here"], {"name": "scene 9", "error": "no points"}]})
    assert survivors(place, clone) == {f"pack {name}" for name in row if name not in ("old", "nobody")}, \
        "an older commit of a branch counts once it has a tag"
    clone.git("tag", "--delete", "detector@v1.0.0")
    assert "pack tag" not in survivors(place, clone)


def test_working_trees_are_roots_before_anything_is_committed(place, clone, tmp_path):
    store = place.store()
    rows = [commit(store, number) for number in range(3)]
    clone.commit({"sample": rows[:1]})
    clone.git("worktree", "add", "--quiet", str(tmp_path / "aside"), "-b", "aside")
    for tree, made in ((tmp_path / "aside", rows[1]), (clone.folder / ".dvc/tmp/exps/tmp1", rows[2])):
        (tree / "data/sample").mkdir(parents=True)
        (tree / "data/sample/manifest.jsonl").write_text(repr(made).replace("'", '"') + "\n")
    assert survivors(place, clone) == {f"pack sample c0de {number}" for number in range(3)}


def test_clones_that_are_named_are_roots_and_others_are_named_as_a_danger(place, clone, tmp_path):
    other, third = (FakeClone(tmp_path / name, place.folder) for name in ("other", "third"))
    store = place.store()
    for number, one in enumerate((clone, other, third)):
        one.commit({"sample": [commit(store, number)]})
        store.keep_clone(one.folder)
    text = "\n".join(gc(clone, other, dry_run=True))
    assert "other clones use this store; what only they have" in text
    assert re.search(rf":{third.folder}, last run 0 days ago", text)
    assert f"{other.folder}," not in text
    assert survivors(place, clone, other) == {f"pack sample c0de {number}" for number in range(2)}


def test_a_manifest_that_cannot_be_had_stops_everything(place, clone):
    clone.commit({"sample": [commit(place.store(), 1)]})
    clone.git("tag", "v1")
    clone.commit({"sample": [commit(place.store(), 2)]})
    gc(clone)
    before = place.names()
    for path in (clone.folder / ".dvc/cache").rglob("*"):
        if path.is_file() and b"scene 1" in path.read_bytes():
            path.unlink()
    place.pass_days(31)
    with pytest.raises(ConfigError, match=r"1 manifests that git names can't be read, so what they need is not known: "
                                          r"sample of refs/tags/v1 in (.|\n)*dvc fetch --all-commits"):
        gc(clone)
    assert place.names() == before
    clone.git("tag", "--delete", "v1")
    gc(clone)


def test_a_clone_that_lags_behind_its_git_remote_stops_everything(place, clone, tmp_path):
    run(tmp_path, "git", "init", "--quiet", "--bare", "hub")
    clone.commit({"sample": [commit(place.store(), 1)]})
    clone.git("remote", "add", "origin", str(tmp_path / "hub"))
    clone.git("push", "--quiet", "origin", "main")
    gc(clone)
    mate = tmp_path / "mate"
    run(tmp_path, "git", "clone", "--quiet", str(tmp_path / "hub"), "mate")
    run(mate, "git", "commit", "--quiet", "--allow-empty", "-m", "new")
    for ref in ("refs/heads/feature", "refs/exps/ab/cd/slow-ant"):
        run(mate, "git", "push", "--quiet", "origin", f"HEAD:{ref}")
    run(mate, "git", "tag", "-a", "v1", "-m", "v1")
    run(mate, "git", "push", "--quiet", "origin", "v1")
    with pytest.raises(ConfigError, match=r"lacks what its git remote origin has: refs/exps/ab/cd/slow-ant, "
                                          r"refs/heads/feature, refs/tags/v1\n  `git fetch origin") as error:
        gc(clone)
    command = re.search(r"`(git fetch .*?)` in it", str(error.value)).group(1)
    subprocess.run(command, shell=True, cwd=clone.folder, check=True, capture_output=True)
    gc(clone)
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(ConfigError, match=r"its git remote origin does not answer(.|\n)*git remote remove origin"):
        gc(clone)


def test_roots_that_name_nothing_and_a_grace_period_of_hours_are_refused(place, clone, tmp_path):
    commit(place.store(), 1)
    with pytest.raises(ConfigError, match=r"no ref of .*/clone names any result, so all of .*/store would go"):
        gc(clone)
    with pytest.raises(ConfigError, match=r"--grace=0.5: under 1 day a collection would take what a run"):
        collect.collect(clone.folder, [], 0.5, False)
    with pytest.raises(ConfigError, match=r"is not a Roadmill repository: no dvc.yaml"):
        collect.collect(clone.folder, [tmp_path / "nowhere"], 30.0, False)


def test_a_dry_run_says_what_would_go_and_changes_nothing(place, clone, monkeypatch, capsys):
    store = place.store()
    clone.commit({"sample": [commit(store, 1)]})
    for number in (2, 3):
        commit(store, number, op="autolabel", files=(b"x" * 2**20, b"%d" % number * 2**20))
    place.pass_days(31)
    before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    monkeypatch.chdir(clone.folder)
    cli.app(["store", "gc", "--dry-run"], standalone_mode=False)
    text = capsys.readouterr().out
    assert re.search(r"would be doomed   autolabel           2        5     0\.003\n"
                     r"doomed today: 7 names; `roadmill store gc` after \d{4}-\d\d-\d\d deletes what", text), text
    after = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    assert {path for path in after if path.name != "clock"} == before.keys()
    cli.app(["store", "gc"], standalone_mode=False)
    assert re.search(r"^doomed            autolabel           2        5     0\.003$", capsys.readouterr().out, re.M)
    cli.app(["store", "gc"], standalone_mode=False)
    assert re.search(r"^waiting until \d{4}-\d\d-\d\d: 7 names$", capsys.readouterr().out, re.M)


def test_dvc_gc_of_cache_and_remote_cannot_touch_the_store(tmp_path):
    """In the clone, inside DVC's cache, beside DVC's remote and even in it: `dvc gc -c` takes all that it can."""
    clone, remote = FakeClone(tmp_path / "clone", tmp_path / "s"), tmp_path / "remote"
    run(clone.folder, "dvc", "remote", "add", "--default", "hub", str(remote))
    (clone.folder / "table").write_text("one")
    run(clone.folder, "dvc", "add", "table")
    run(clone.folder, "dvc", "push")
    clone.commit({})
    (clone.folder / "table").write_text("two")
    run(clone.folder, "dvc", "add", "table")
    rows, stores = [], [Store.in_folder(folder) for folder in (clone.folder / "data/store", clone.folder / ".dvc/cache",
                                                               remote / "store", remote)]
    for store in stores:
        rows.append([commit(store, number) for number in range(3)])
    packs = [path for path in remote.rglob("files/md5/*/*") if path.is_file()]
    assert "Removed 1 objects from remote" in run(clone.folder, "dvc", "gc", "--cloud", "--workspace", "--force")
    assert not any(path.exists() for path in packs), "it did what it can"
    for store, made in zip(stores, rows):
        assert all(is_whole(Store.in_folder(store.local.root), row, number) for number, row in enumerate(made))
        assert all(store.local.path(f"cas/{result_of(row)[:2]}/{result_of(row)}").exists() for row in made)
