"""A team on one bucket, as its people type it: made on one machine, taken up on another, the same bytes everywhere."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from stages.harness import STAGES
from tests import clones
from tests.clones import counters, num_rows, outputs, run, set_knob
from tests.servers import running
from tests.small_world import NUM_DRIVES, NUM_SCENES


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running("moto", tmp_path_factory.mktemp("moto")) as server:
        yield server


def num_requests(server) -> int:
    """Lines of the server's log, one a request."""
    return os.pread(server.log.fileno(), 1 << 30, 0).count(b"HTTP/1.1")


@pytest.fixture(scope="module")
def shell(server) -> dict[str, str]:
    """What the team's people have in their shells: AWS's own settings, nothing of ours."""
    return {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret, "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def shared(world, drives, server, shell, tmp_path_factory) -> Path:
    """A clone of the small world that the team's store and remote hold, and nothing on this disk beside it."""
    folder = clones.copy(world, tmp_path_factory.mktemp("team") / "clone")
    bucket = server.make_bucket()
    settings = yaml.safe_load((folder / "conf/store/s3.yaml").read_text())
    settings |= {"url": f"s3://{bucket}/team/store", "dvc_remote": f"s3://{bucket}/team/dvc",
                 "endpoint": server.endpoint}
    (folder / "conf/store/s3.yaml").write_text(yaml.safe_dump(settings))
    run(folder, "roadmill", "store", "use", "s3", **shell)
    clones.commit(folder, "the team's store")
    return folder


@pytest.fixture(scope="module")
def pushed(shared, shell) -> Path:
    """The same after what the local store had was copied and DVC's files pushed."""
    text = run(shared, "roadmill", "store", "copy", "local", "s3", **shell)
    assert "0 were there" in text
    run(shared, "dvc", "push", **shell)
    return shared


def elsewhere(clone: Path, folder: Path) -> Path:
    """A clone on another machine: no cache, no store, no recordings."""
    run(folder, "git", "clone", "--quiet", str(clone), "elsewhere")
    return folder / "elsewhere"


def test_another_machine_has_a_working_dataset_after_clone_pull_and_fetch(pushed, shell, tmp_path):
    other = elsewhere(pushed, tmp_path)
    run(other, "dvc", "pull", **shell)
    text = run(other, "roadmill", "fetch", "--split", "val", **shell)
    num_val = len(json.loads((other / "data/merge/splits.json").read_text())["val"])
    assert f"{num_val} packs fetched" in text
    again = run(other, "roadmill", "fetch", "--split", "val", **shell)
    assert f"0 packs fetched, 0.00 GiB, {num_val} were here" in again
    run(other, "roadmill", "export", "val", "--split", "val", **shell)
    assert list((other / "val/samples").rglob("*.jpg"))
    assert outputs(other) == outputs(pushed)


def test_a_repro_elsewhere_runs_nothing_and_downloads_nothing(pushed, server, shell, tmp_path):
    other = elsewhere(pushed, tmp_path)
    before = num_requests(server)
    text = run(other, "dvc", "repro", "--allow-missing", **shell)
    assert not any(f"Running stage '{stage}'" in text for stage in STAGES)
    assert num_requests(server) == before
    assert not (other / "data/sample").exists()


def test_a_colleague_who_may_only_read_has_the_dataset_and_repeats_its_stages(pushed, server, shell, tmp_path):
    reads = {**shell, **server.reader()}
    other = elsewhere(pushed, tmp_path)
    run(other, "dvc", "pull", **reads)
    assert "2 packs fetched" in run(other, "roadmill", "fetch", "--split", "val", **reads)
    assert "miss" not in run(other, "roadmill", "explain", "long/drive_0000", **reads)
    assert "ok     store\n" in run(other, "roadmill", "doctor", code=2, **reads), "wrong is that it has no recordings"
    assert "a gc would stop: " in run(other, "roadmill", "store", "stats", **reads)
    assert "access denied" in run(other, "roadmill", "store", "gc", "--dry-run", code=4, **reads)
    text = run(other, "dvc", "repro", "--force", "--single-item", "train", **reads)
    assert "cached 1, ran 0" in text
    assert "train: done, but the store keeps no record of this run: s3://" in text
    assert outputs(other) == outputs(pushed)


def test_doctor_asks_the_bucket(pushed, shell, tmp_path):
    other = elsewhere(pushed, tmp_path)
    path = other / "conf/store/s3.yaml"
    path.write_text(path.read_text().replace("url: s3://b", "url: s3://no-such-"))
    assert "wrong  store: s3://no-such-" in run(other, "roadmill", "doctor", code=2, **shell)


def test_a_knob_changed_elsewhere_runs_only_its_misses_and_gives_the_local_bytes(pushed, world, shell, tmp_path):
    other = elsewhere(pushed, tmp_path)
    run(other, "dvc", "pull", **shell)
    set_knob(other, "autolabel", "min_score", 0.2)
    run(other, "dvc", "repro", "merge", **shell)
    assert counters(other)["autolabel"]["ran"] == NUM_SCENES
    local = clones.copy(world, tmp_path / "local")
    set_knob(local, "autolabel", "min_score", 0.2)
    run(local, "dvc", "repro", "merge")
    merged = {name: digest for name, digest in outputs(local).items() if name.startswith("data/")}
    assert merged.items() <= outputs(other).items()


def test_a_teammate_without_a_result_takes_those_of_the_others(pushed, drives, shell, tmp_path):
    """DVC's lock gone, an empty cache, other places for the recordings: all from the bucket, nothing runs."""
    other = elsewhere(pushed, tmp_path)
    shutil.copytree(pushed / "data/raw", other / "data/raw")
    run(other, "dvc", "pull", "data/recordings", "data/labels", **shell)
    (other / "dvc.lock").unlink()
    run(other, "dvc", "repro", "merge", **shell)
    found = counters(other)
    assert [(found[stage]["cached"], found[stage]["ran"]) for stage in ("ingest", "sample", "autolabel")] == [
        (NUM_DRIVES, 0), (NUM_SCENES, 0), (NUM_SCENES, 0)]
    assert num_rows(other) == NUM_SCENES


def test_a_copy_that_is_there_moves_nothing_and_a_lost_object_comes_again(pushed, server, shell):
    assert "0 results copied" in run(pushed, "roadmill", "store", "copy", "local", "s3", **shell)
    settings = yaml.safe_load((pushed / "conf/store/s3.yaml").read_text())
    bucket, _, prefix = settings["url"].removeprefix("s3://").partition("/")
    packs = [blob[0] for row in map(json.loads, (pushed / "data/sample/manifest.jsonl").read_text().splitlines())
             for name, blob in row["outputs"].items() if name == "pack.tar"]
    server.client().delete_object(Bucket=bucket, Key=f"{prefix}/cas/{packs[0][:2]}/{packs[0]}")
    assert "1 results copied" in run(pushed, "roadmill", "store", "copy", "local", "s3", **shell)
    shutil.rmtree(pushed / ".roadmill/cache", ignore_errors=True)
    assert f"{len(packs)} packs fetched" in run(pushed, "roadmill", "fetch", **shell)


def test_dvc_gc_of_the_remote_cannot_touch_the_store(pushed, server, shell):
    settings = yaml.safe_load((pushed / "conf/store/s3.yaml").read_text())

    def listed(url: str) -> set[str]:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return {one["Key"] for page in pages for one in page.get("Contents", ())}

    store, remote = listed(settings["url"]), listed(settings["dvc_remote"])
    assert store
    assert remote
    set_knob(pushed, "evaluate", "num_worst", 1)
    (pushed / "dvc.lock").unlink()
    run(pushed, "dvc", "gc", "--workspace", "--cloud", "--force", **shell)
    assert listed(settings["dvc_remote"]) < remote, "it did delete what it may"
    assert listed(settings["url"]) == store
