"""Manifests and datasets of every ref, and what was made from a recording: on commits made by hand, without a stage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

from stages.lib import tables
from stages.lib.errors import ConfigError
from stages.tools import history, uses
from stages.tools.lineage import lineage
from tests.clones import run

SCENES = {"token": pl.String, "name": pl.String, "drive_token": pl.String, "split": pl.String, "pack_digest": pl.String}
EXPERIMENT = "refs/exps/ab/cdef0123456789abcdef0123456789abcdef01/slow"
GOOD, WITHDRAWN = "a" * 64, "b" * 64


class Clone:
    """A git repository with DVC's cache, in which folders and commits are written by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        run(root, "git", "init", "--quiet", "-b", "main")
        (root / ".dvc").mkdir()
        (root / ".dvc/config").write_text("")
        (root / ".gitignore").write_text("/.dvc/cache/\n/data/\n!/data/*.dvc\n")

    def cached(self, name: str) -> Path:
        return self.root / ".dvc/cache/files/md5" / name[:2] / name[2:]

    def folder(self, files: dict[str, bytes]) -> str:
        """Puts a folder into DVC's cache; its md5."""
        listed = []
        for file, content in sorted(files.items()):
            listed.append({"md5": self._put(content), "relpath": file})
        return self._put(json.dumps(listed, sort_keys=True).encode(), ".dir")

    def _put(self, content: bytes, ending: str = "") -> str:
        name = hashlib.md5(content).hexdigest() + ending
        self.cached(name).parent.mkdir(parents=True, exist_ok=True)
        self.cached(name).write_bytes(content)
        return name

    def commit(self, stages: dict[str, tuple[dict[str, str], dict[str, str]]], recordings: str = "") -> str:
        """A commit whose dvc.lock says: stage -> (path -> md5 of what it read, path -> md5 of what it made)."""
        lock = {"schema": "2.0", "stages": {stage: {
            "cmd": stage, "deps": [{"path": path, "md5": md5} for path, md5 in deps.items()],
            "outs": [{"path": path, "md5": md5} for path, md5 in outs.items()]}
            for stage, (deps, outs) in stages.items()}}
        (self.root / "dvc.lock").write_text(yaml.safe_dump(lock))
        if recordings:
            (self.root / "data").mkdir(exist_ok=True)
            (self.root / "data/recordings.dvc").write_text(
                yaml.safe_dump({"outs": [{"md5": recordings, "path": "recordings"}]}))
        run(self.root, "git", "add", "-A")
        run(self.root, "git", "commit", "--quiet", "--allow-empty", "-m", "by hand")
        return run(self.root, "git", "rev-parse", "HEAD").strip()

    def dataset(self, *scenes: tuple[str, str, str, str]) -> str:
        """A dataset with scenes (name, split, digest of the recording, its name); its md5."""
        drives = {(digest, name): tables.token("drive", digest, name) for *_, digest, name in scenes}
        log = pl.DataFrame({"drive_token": list(drives.values()), "logfile": [name for _, name in drives]})
        rows = [{"token": tables.token("scene", name), "name": name, "drive_token": drives[digest, drive],
                 "split": split, "pack_digest": f"pack of {name}"} for name, split, digest, drive in scenes]
        place = self.root / "part"
        tables.write(log, place / "log.parquet")
        tables.write(tables.frame(rows, SCENES), place / "scene.parquet")
        files = {f"tables/{path.name}": path.read_bytes() for path in place.iterdir()}
        shutil.rmtree(place)
        return self.folder(files)

    def uses(self, digest: str) -> dict:
        trees = history.trees(self.root, history.commits(self.root))
        return uses.uses(digest, trees, history.Objects(self.root))


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def manifest(*names: str) -> dict[str, bytes]:
    return {"manifest.jsonl": b"".join(json.dumps({"name": name, "facts": {}, "outputs": {}}).encode() + b"\n"
                                       for name in names)}


def sampled(md5: str) -> dict:
    return {"sample": ({}, {"data/sample": md5})}


def found(clone: Clone) -> dict[tuple[str, ...], list[str] | None]:
    """revs -> names in the manifest."""
    return {one.revs: one.rows and [row["name"] for row in one.rows] for one in history.manifests(clone.root)}


def test_each_distinct_manifest_of_branch_tag_experiment_and_remote_branch_comes_once(clone):
    first, second = clone.folder(manifest("one")), clone.folder(manifest("one", "two"))
    clone.commit(sampled(first))
    run(clone.root, "git", "tag", "-a", "v1", "-m", "annotated")
    run(clone.root, "git", "update-ref", EXPERIMENT, clone.commit(sampled(second)))
    run(clone.root, "git", "update-ref", "refs/remotes/origin/other", "HEAD~1")
    run(clone.root, "git", "reset", "--quiet", "--hard", "HEAD~1")
    assert found(clone) == {
        ("working tree", "refs/heads/main", "refs/remotes/origin/other", "refs/tags/v1"): ["one"],
        (EXPERIMENT,): ["one", "two"]}
    assert set(history.commits(clone.root)) == {"refs/heads/main", "refs/tags/v1", "refs/remotes/origin/other",
                                                EXPERIMENT}
    assert history.names((EXPERIMENT, "refs/heads/main", "refs/tags/v1", "refs/remotes/origin/other", "e" * 40)) == [
        "experiment slow", "branch main", "tag v1", "origin/other", "commit eeeeeeeeeeee"]


def test_a_detached_head_of_another_worktree_counts(clone, tmp_path_factory):
    clone.commit(sampled(clone.folder(manifest("one"))))
    other = tmp_path_factory.mktemp("other") / "tree"
    run(clone.root, "git", "worktree", "add", "--quiet", "--detach", str(other))
    run(other, "git", "rm", "--quiet", "dvc.lock")
    run(other, "git", "commit", "--quiet", "-m", "none")
    (other / "dvc.lock").write_text(yaml.safe_dump({"stages": {"sample": {"outs": [
        {"path": "data/sample", "md5": clone.folder(manifest("far"))}]}}}))
    run(other, "git", "add", "dvc.lock")
    run(other, "git", "commit", "--quiet", "-m", "far")
    assert ["far"] in found(clone).values()


def test_a_manifest_that_is_not_here_is_none_until_the_remote_has_it(clone, tmp_path_factory):
    md5 = clone.folder(manifest("one"))
    clone.commit(sampled(md5))
    remote = tmp_path_factory.mktemp("remote")
    (clone.root / ".dvc/cache/files").rename(remote / "files")
    revs = ("working tree", "refs/heads/main")
    assert found(clone) == {revs: None}
    (clone.root / ".dvc/config").write_text(f"[core]\n    remote = team\n['remote \"team\"']\n    url = {remote}\n")
    assert found(clone) == {revs: ["one"]}
    assert not (clone.root / ".dvc/cache/files").exists(), "nothing is brought here by looking"


def test_what_lies_in_the_working_tree_needs_neither_cache_nor_remote(clone):
    files = manifest("one") | {"scenes.parquet": b"x"}
    md5 = clone.folder(files)
    clone.commit(sampled(md5))
    shutil.rmtree(clone.root / ".dvc/cache")
    for file, content in files.items():
        (clone.root / "data/sample").mkdir(parents=True, exist_ok=True)
        (clone.root / "data/sample" / file).write_bytes(content)
    assert found(clone) == {("working tree", "refs/heads/main"): ["one"]}
    (clone.root / "data/sample/manifest.jsonl").write_bytes(manifest("changed")["manifest.jsonl"])
    assert found(clone) == {("working tree", "refs/heads/main"): None, ("working tree",): ["changed"]}


@pytest.mark.parametrize("what", ["list", "file"])
def test_damaged_bytes_are_not_taken(clone, what):
    md5 = clone.folder(manifest("one"))
    clone.commit(sampled(md5))
    (listed,) = json.loads(clone.cached(md5).read_text())
    place = clone.cached(md5 if what == "list" else listed["md5"])
    place.write_bytes(place.read_bytes().replace(b"manifest", b"manifesT").replace(b"one", b"two"))
    assert found(clone) == {("working tree", "refs/heads/main"): None}


@pytest.mark.parametrize("lock", ["<<<<<<< HEAD\nstages: {}\n", "stages: [1]\n",
                                  "stages: {sample: {outs: [{path: data/sample, md5: ../../../etc/passwd}]}}\n"])
def test_a_damaged_or_hostile_lock_file_is_none_for_every_stage_it_hides(clone, lock):
    clone.commit(sampled(clone.folder(manifest("one"))))
    run(clone.root, "git", "tag", "good")
    (clone.root / "dvc.lock").write_text(lock)
    run(clone.root, "git", "commit", "--quiet", "-am", "bad")
    rows = {(rev, one.stage): one.rows for one in history.manifests(clone.root) for rev in one.revs}
    assert rows["refs/heads/main", "sample"] is None
    assert rows["refs/tags/good", "sample"]


def test_commits_that_name_the_same_data_are_looked_into_once(clone):
    first, second = sampled(clone.folder(manifest("one"))), sampled(clone.folder(manifest("two")))
    for number in range(20):
        clone.commit(first if number < 15 else second)
    commits = history.commits(clone.root)
    assert len(commits) == 20
    assert [len(tree.revs) for tree in history.trees(clone.root, commits)] == [6, 15], "and the working tree"


# what was made from a recording ---------------------------------------------------------------------------------------
def made(merge: str, models: str = "", learned_from: str = "") -> dict:
    stages = {"merge": ({}, {"data/merge": merge})}
    return stages | ({"train": ({"data/merge": learned_from or merge}, {"models": models})} if models else {})


def test_a_recording_is_found_in_every_dataset_and_model_by_its_bytes_whatever_its_name(clone):
    whole = clone.dataset(("s1", "train", WITHDRAWN, "d1"), ("s2", "val", WITHDRAWN, "d1"), ("s3", "train", GOOD, "d2"))
    renamed = clone.dataset(("s4", "val", WITHDRAWN, "moved/d1"), ("s3", "train", GOOD, "d2"))
    without = clone.dataset(("s3", "train", GOOD, "d1"))
    clone.commit(made(whole, "m1.dir"))
    old = run(clone.root, "git", "rev-parse", "HEAD").strip()
    run(clone.root, "git", "update-ref", EXPERIMENT, clone.commit(made(renamed, "m2.dir")))
    clone.commit(made(without, "m3.dir"))
    used = clone.uses(WITHDRAWN)
    assert [(one["md5"], one["revs"], [scene["name"] for scene in one["scenes"]]) for one in used["datasets"]] == [
        (renamed, [EXPERIMENT], ["s4"]), (whole, [old], ["s1", "s2"])], "a name that other bytes took is none of it"
    assert [(one["md5"], one["revs"], [scene["name"] for scene in one["scenes"]]) for one in used["models"]] == [
        ("m1.dir", [old], ["s1"])], "m2 saw it in val alone"
    assert used["gaps"] == []


def test_a_model_older_than_its_branchs_dataset_still_counts(clone):
    whole = clone.dataset(("s1", "train", WITHDRAWN, "d1"), ("s2", "train", GOOD, "d2"))
    without = clone.dataset(("s2", "train", GOOD, "d2"))
    clone.commit(made(without, "m1.dir", learned_from=whole))
    used = clone.uses(WITHDRAWN)
    assert used["datasets"] == []
    assert [(one["md5"], one["dataset_md5"]) for one in used["models"]] == [("m1.dir", whole)]


def test_what_could_not_be_looked_into_is_named_with_its_refs_and_a_command(clone, tmp_path_factory):
    seen, lost = clone.dataset(("s1", "train", GOOD, "d1")), clone.dataset(("s2", "train", WITHDRAWN, "d2"))
    clone.commit(made(lost, "m1.dir"))
    run(clone.root, "git", "tag", "v1")
    clone.commit(made(seen, "m2.dir", learned_from=lost))
    clone.cached(lost).unlink()
    used = clone.uses(WITHDRAWN)
    assert [used["datasets"], used["models"], used["scores"]] == [[], [], []]
    (gap,) = used["gaps"]
    assert (gap["path"], gap["md5"]) == ("data/merge", lost)
    assert sorted(gap["revs"]) == ["refs/heads/main", "refs/tags/v1", "working tree"]
    assert gap["remedy"].endswith("this clone has no DVC remote: `dvc remote add --default NAME URL`")
    remote = tmp_path_factory.mktemp("remote")
    (clone.root / ".dvc/config").write_text(f"[core]\n    remote = team\n['remote \"team\"']\n    url = {remote}\n")
    (gap,) = clone.uses(WITHDRAWN)["gaps"]
    assert gap["remedy"] == ("neither in DVC's cache nor in its remote: `dvc push --all-commits` where it was made, "
                             "`dvc exp push origin NAME` of an experiment")


def test_a_dataset_on_disk_that_no_lock_names_counts(clone):
    clone.commit(made(clone.dataset(("s1", "train", GOOD, "d1"))))
    md5 = clone.dataset(("s2", "train", WITHDRAWN, "d2"))
    for one in json.loads(clone.cached(md5).read_text()):
        (clone.root / "data/merge/tables").mkdir(parents=True, exist_ok=True)
        shutil.copy(clone.cached(one["md5"]), clone.root / "data/merge" / one["relpath"])
    (one,) = clone.uses(WITHDRAWN)["datasets"]
    assert (one["md5"], one["revs"]) == ("", ["working tree"])
    (clone.root / "data/merge/tables/log.parquet").write_bytes(b"torn")
    (gap,) = clone.uses(WITHDRAWN)["gaps"]
    assert gap["remedy"] == "what lies there is damaged: `dvc checkout data/merge` restores it"


def test_what_a_clone_can_not_know_of_is_named(clone, tmp_path_factory):
    first, second = clone.commit({}), clone.commit({})
    folder = tmp_path_factory.mktemp("others")
    run(folder, "git", "clone", "--quiet", "--depth", "1", f"file://{clone.root}", "shallow")
    run(folder, "git", "clone", "--quiet", str(clone.root), "whole")

    def beyond(name: str) -> list[str]:
        return uses.beyond(folder / name, history.commits(folder / name))

    assert beyond("whole") == []
    assert uses.beyond(clone.root, {}) == [], "no git remote"
    assert beyond("shallow") == ["this clone is shallow, its older commits are missing: `git fetch --unshallow`"]
    clone.commit({"sample": ({}, {})})
    run(clone.root, "git", "tag", "-a", "v2", "-m", "annotated")
    run(clone.root, "git", "tag", "-a", "v1", first, "-m", "annotated")
    run(clone.root, "git", "update-ref", EXPERIMENT, "HEAD")
    run(clone.root, "git", "branch", "old", second)
    assert beyond("whole") == ["experiment slow of origin: `dvc exp pull origin slow`",
                               "branch main of origin: `git fetch origin refs/heads/main`",
                               "tag v2 of origin: `git fetch origin refs/tags/v2:refs/tags/v2`"]
    shutil.rmtree(clone.root / ".git")
    assert beyond("whole") == ["origin does not answer, so what it has beyond this clone is not known: "
                               "`git ls-remote origin`"]


def test_a_recording_of_no_list_is_found_by_its_digest(clone):
    clone.commit(made(clone.dataset(("s1", "train", WITHDRAWN, "d1"))))
    (clone.root / "params.yaml").write_text("{}")
    shutil.copytree(Path(__file__).parents[1] / "conf", clone.root / "conf")
    found = lineage(clone.root, WITHDRAWN)
    assert [one["name"] for one in found["recordings"][0]["datasets"][0]["scenes"]] == ["s1"]
    with pytest.raises(ConfigError, match=r"dvc\.lock: its bytes are of no recording, stage or export in the"):
        lineage(clone.root, str(clone.root / "dvc.lock"))
    with pytest.raises(ConfigError, match=r"no file here.*\n  `roadmill lineage` takes a file"):
        lineage(clone.root, GOOD)
