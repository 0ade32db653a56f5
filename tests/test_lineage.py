"""roadmill lineage over all stages: a small world with a tag, a branch without one recording, and an experiment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from stages.harness import STAGES, Harness
from stages.lib import pack, recordings
from stages.lib.bag import open_bag
from stages.lib.digests import digest_bytes, digest_file
from stages.lib.errors import ConfigError, DataError
from stages.store.action import Action
from stages.tools.export import export
from stages.tools.lineage import lineage
from stages.tools.lineage_text import lines
from tests import clones
from tests.clones import run


@pytest.fixture(scope="module")
def tagged(world, tmp_path_factory) -> Path:
    """The small world, with main tagged v1, an experiment `slow` of fewer key frames, and a branch `fewer` whose
    dataset lacks one drive of split train, though it still has the model that learned from it."""
    folder = clones.copy(world, tmp_path_factory.mktemp("tagged") / "clone")
    run(folder, "git", "tag", "v1")
    run(folder, "dvc", "exp", "run", "--temp", "--name", "slow", "-S", "sample.keyframe_hz=1", "merge")
    run(folder, "git", "checkout", "--quiet", "-b", "fewer")
    for path in (folder / "data/raw/bags/long").glob(f"{Path(train_drive(folder)).name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(folder, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    run(folder, "dvc", "repro", "merge")
    clones.commit(folder, "without one recording")
    run(folder, "git", "checkout", "--quiet", "main")
    run(folder, "dvc", "checkout", "--quiet")
    shutil.copytree(world / "data/raw/bags", folder / "data/raw/bags", dirs_exist_ok=True)
    return folder


def table(tagged: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(tagged / f"data/merge/tables/{name}.parquet")


def train_drive(tagged: Path) -> str:
    """The first drive of split train, by name."""
    scenes = table(tagged, "scene").filter(pl.col("split") == "train").join(table(tagged, "log"), on="drive_token")
    return sorted(scenes["logfile"])[0]


def recording(tagged: Path, name: str) -> recordings.Recording:
    return next(one for one in recordings.read(tagged / "data/recordings") if one.name == name)


def steps(document: dict) -> dict[str, dict]:
    return {step["stage"]: step for step in document["steps"]}


def test_a_frame_of_an_export_leads_to_the_message_in_the_recording(tagged, tmp_path):
    export(tagged / "data/merge", tmp_path / "out", Harness(tagged).store.need)
    row = table(tagged, "sample_data").filter((pl.col("channel") == "CAM_FRONT") & ~pl.col("is_key_frame")).row(
        3, named=True)
    path = tmp_path / "out" / row["filename"]
    found = lineage(tagged, str(path))
    subject, made = found["subject"], steps(found)
    assert (found["kind"], subject["token"], subject["same_as_in_pack"]) == ("frame", row["token"], True)
    assert subject["sha256"] == digest_file(path)
    assert [step["stage"] for step in found["steps"]] == ["sample", "split", "curate", "ingest"]
    (drive,) = found["recordings"]
    for stage, item in (("sample", found["scenes"][0]["name"]), ("ingest", drive["name"])):
        assert made[stage]["action"] == Harness(tagged).plan(stage)[item].action.key
        assert made[stage]["evidence"] == "recorded"
        assert made[stage]["inputs"]["recording"] == drive["digest"] == recording(tagged, drive["name"]).digest
        assert made[stage]["code"]["own"]
        assert made[stage]["run"]["python"].startswith("3.")
        assert made[stage]["code"]["packages"]["rosbags"] == "0.11.9"
    member = pack.read_member(Harness(tagged).store.need(subject["pack_digest"]), subject["offset"], subject["bytes"])
    assert digest_bytes(member) == subject["sha256"]
    said = subject["message"]
    with open_bag(tagged / "data/raw/bags" / said["recording"], said["recording"]) as bag:
        (message,) = [one for one in bag.messages([said["topic"]], said["receive_ns"], said["receive_ns"] + 1)
                      if one.seq == said["seq"]]
        stamp = bag.decode(message).header.stamp
    offset_us = subject["stamp_us"] - (stamp.sec * 1_000_000 + stamp.nanosec // 1000)
    assert abs(offset_us) < 50_000, "the rig's clock offset and half an exposure"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match=rf"sha256 {digest_file(path)}\) are not those of {row['filename']} in any "
                                        rf"dataset that is known here: working tree has sha256 {subject['sha256']}"):
        lineage(tagged, str(path))
    view = tmp_path / "out/v1.0-roadmill/scene.json"
    assert [one["name"] for one in lineage(tagged, str(view))["scenes"]] == table(tagged, "scene")["name"].to_list()


def test_every_token_digest_and_name_of_a_scene_leads_to_its_recording(tagged):
    scene = table(tagged, "scene").row(0, named=True)
    drive = table(tagged, "log").filter(pl.col("drive_token") == scene["drive_token"]).row(0, named=True)
    mine = pl.col("scene_token") == scene["token"]
    asked = {name: table(tagged, name).filter(mine)["token"][0] for name in (
        "sample", "sample_data", "sample_annotation", "instance", "calibrated_sensor")}
    asked |= {"scene": scene["token"], "log": drive["token"], "name": scene["name"], "pack": scene["pack_digest"],
              "ego_pose": table(tagged, "sample_data").filter(mine)["ego_pose_token"][0],
              "drive": drive["logfile"], "recording": recording(tagged, drive["logfile"]).digest,
              "file": str(tagged / "data/raw/bags" / drive["logfile"] / "metadata.yaml"),
              "action": Harness(tagged).plan("sample")[scene["name"]].action.key,
              "store": str(tagged / "data/store/cas" / scene["pack_digest"][:2] / scene["pack_digest"])}
    kinds = {}
    for what, token in asked.items():
        found = lineage(tagged, token)
        kinds[what] = found["kind"]
        assert [one["name"] for one in found["recordings"]] == [drive["logfile"]], what
        assert "gaps" not in found, what
    assert kinds == {"sample": "sample", "sample_data": "frame", "sample_annotation": "box", "instance": "track",
                     "calibrated_sensor": "sensor", "scene": "scene", "log": "recording", "name": "scene",
                     "pack": "scene", "ego_pose": "frame", "drive": "recording", "recording": "recording",
                     "file": "recording", "action": "scene", "store": "scene"}
    with pytest.raises(ConfigError, match=r"drive_9: no file here, and no token, .* did you mean long/drive_\d+\?\n"
                                          r"  `roadmill lineage` takes a file"):
        lineage(tagged, "long/drive_9")


def test_a_box_says_whose_label_it_is(tagged):
    boxes = table(tagged, "sample_annotation").unique("source", maintain_order=True)
    assert set(boxes["source"]) == {"human", "truth", "geometric"}
    for row in boxes.iter_rows(named=True):
        found = lineage(tagged, row["token"])
        (label,) = found["labels"]
        assert label["source"] == row["source"]
        drive, source = found["recordings"][0]["name"], row["source"]
        if source == "geometric":
            assert label["files"] == {}
            assert steps(found)["autolabel"]["outputs"]["boxes.parquet"]
        else:
            path = f"data/labels/{source}/{drive}.json"
            assert label["files"] == {path: digest_file(tagged / path)}
            assert "autolabel" not in steps(found)
        assert steps(found)["merge"]["knobs"]["moving_speed_mps"] == 0.5
        assert found["subject"]["track_id"]


def test_a_model_names_its_scenes_labels_recordings_settings_and_code(tagged):
    scenes = table(tagged, "scene").filter(pl.col("split") == "train").join(table(tagged, "log"), on="drive_token")
    documents = [lineage(tagged, str(tagged / "models" / file)) for file in ("model.pt", "model.onnx")]
    for found in documents:
        assert [step["stage"] for step in found["steps"]] == list(reversed(STAGES[:STAGES.index("train") + 1]))
        assert {one["name"] for one in found["scenes"]} == set(scenes["name"])
        assert {one["name"] for one in found["recordings"]} == set(scenes["logfile"])
        train = steps(found)["train"]
        assert {one["pack_digest"] for one in found["scenes"]} == {
            digest for role, digest in train["inputs"].items() if role.startswith("pack/")}
        assert train["knobs"]["steps"] == 1
        assert train["code"] | {"packages": 0} == {
            "digest": Harness(tagged).plan("train")["detector"].action.code, "own": True, "packages": 0,
            "commits": [run(tagged, "git", "rev-parse", "main").strip()]}
        assert "torch" in train["code"]["packages"]
        learned = json.loads((tagged / "models/manifest.jsonl").read_text())["facts"]["labels"]
        assert [(one["source"], one["boxes"]) for one in found["labels"]] == [(row[0], row[3]) for row in learned]
    assert documents[0]["subject"]["sha256"] == digest_file(tagged / "models/model.pt")
    scores = lineage(tagged, str(tagged / "results/evaluate/metrics.json"))
    assert [step["stage"] for step in scores["steps"]] == list(reversed(STAGES))
    assert {one["split"] for one in scores["scenes"]} == {"val"}


def test_code_that_has_changed_since_is_told_with_the_commit_that_has_it(tagged, tmp_path):
    clone = clones.copy(tagged, tmp_path / "clone")
    path = clone / "stages/lib/training.py"
    path.write_text(path.read_text() + "\n\nCHANGED = 1\n")
    (clone / "stages/lib/card.py").write_text((clone / "stages/lib/card.py").read_text() + "\n# a remark\n")
    made = steps(lineage(clone, str(clone / "models/model.pt")))
    assert not made["train"]["code"]["own"]
    assert made["train"]["code"]["commits"] == [run(tagged, "git", "rev-parse", "main").strip()]
    assert made["autolabel"]["code"]["own"]
    assert made["merge"]["code"]["changed_since"] == ["stages/lib/card.py"], "what dvc.lock says by file"
    (clone / "models/model.pt").unlink()
    (clone / "models/model.pt").write_bytes(b"another")
    found = lineage(clone, str(clone / "models/model.pt"))
    assert found["gaps"] == [{"what": "models/model.pt is not the file that dvc.lock names: an unfinished run, or "
                                      "changed by hand", "remedy": "`dvc status` says what changed, `dvc checkout "
                                      "models` restores it"}]


def test_a_model_older_than_its_dataset_leads_to_the_dataset_it_learned_from(tagged, tmp_path):
    clone = clones.copy(tagged, tmp_path / "clone")
    withdrawn = train_drive(tagged)
    run(clone, "git", "checkout", "--quiet", "fewer")
    run(clone, "dvc", "checkout", "--quiet")
    dataset, model = (lineage(clone, str(clone / path)) for path in ("data/merge", "models/model.pt"))
    assert withdrawn not in {one["name"] for one in dataset["recordings"]}
    assert withdrawn in {one["name"] for one in model["recordings"]}
    assert {one["name"] for one in dataset["scenes"]} == set(table(clone, "scene")["name"])
    assert {one["pack_digest"] for one in model["scenes"]} == {
        digest for role, digest in steps(model)["train"]["inputs"].items() if role.startswith("pack/")}
    assert steps(model)["merge"]["output_md5"] != steps(dataset)["merge"]["output_md5"]
    assert steps(model)["sample"]["items"] == steps(dataset)["sample"]["items"] + 1


def test_an_earlier_action_of_a_scene_is_still_known(tagged):
    scene = table(tagged, "scene").row(0, named=True)
    now = Harness(tagged).plan("sample")[scene["name"]].action
    (slow,) = [Action(**one) for one in Harness(tagged).store.history("sample", scene["name"])
               if Action(**one).key != now.key]
    step = lineage(tagged, slow.key)["steps"][0]
    assert (step["action"], step["knobs"]["keyframe_hz"], step["evidence"]) == (slow.key, 1.0, "recorded")
    assert step["facts"]["pack_digest"] != scene["pack_digest"]


def test_a_withdrawn_recording_is_found_in_tag_branch_and_experiment(tagged):
    name = train_drive(tagged)
    found = lineage(tagged, name)
    (one,) = found["recordings"]
    assert one["digest"] == recording(tagged, name).digest
    (experiment,) = run(tagged, "git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
    here = ["working tree", "refs/heads/main", "refs/tags/v1"]
    assert sorted(one["listed_by"]) == sorted([*here, experiment])
    assert sorted(sorted(made["revs"]) for made in one["datasets"]) == sorted([sorted(here), [experiment]])
    (model,) = one["models"]
    assert set(model["revs"]) == {*here, experiment, "refs/heads/fewer"}, "fewer still has the model that learned of it"
    assert [scene["split"] for scene in model["scenes"]] == ["train"]
    assert one["gaps"] == []
    assert found["looked_into"]["refs"] == 4
    other = sorted(set(table(tagged, "log")["logfile"]) - {name})[0]
    assert {rev for made in lineage(tagged, other)["recordings"][0]["datasets"] for rev in made["revs"]} == {
        *here, experiment, "refs/heads/fewer"}
    text = "\n".join(lines(found))
    assert "  models: 1\n" in text
    assert "branch fewer" in text
    assert f"{model['scenes'][0]['name']}   train   pack {model['scenes'][0]['pack_digest']}" in text
    assert "COULD NOT" not in text


def test_a_clone_without_the_store_says_what_is_not_recorded_and_asks_the_remote(tagged, tmp_path):
    clone = clones.copy(tagged, tmp_path / "clone")
    run(clone, "dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    run(clone, "git", "commit", "--quiet", "-m", "remote", ".dvc/config")
    name, digest = train_drive(tagged), digest_file(tagged / "models/model.pt")
    run(tmp_path, "git", "clone", "--quiet", str(clone), "fresh")
    fresh = tmp_path / "fresh"
    with pytest.raises(ConfigError, match=rf"{name}: no file here.*\n  this does not say that it was never used, "
                                          r"data/recordings of working tree, .*branch main.* could not be looked into:"
                                          r"\n  neither in DVC's cache nor in its remote: `dvc push --all-commits`"):
        lineage(fresh, name)
    run(clone, "dvc", "push")
    text = run(fresh, "roadmill", "lineage", name)
    assert "branch main, origin/HEAD, origin/main, tag v1" in text
    assert "  not into experiment slow of origin: `dvc exp pull origin slow`\n" in text
    assert "COULD NOT LOOK INTO\n    data/merge" in text, "the branch's data were never pushed"
    assert "neither in DVC's cache nor in its remote: `dvc push --all-commits` where it was made" in text
    found = json.loads(run(fresh, "roadmill", "lineage", digest, "--json"))
    assert found["revision"] == "branch main"
    assert steps(found)["train"]["action"] is None
    assert {gap["remedy"] for gap in found["gaps"]} == {
        "ask with the store that made it: ROADMILL_STORE=NAME roadmill lineage …"}
    run(fresh, "dvc", "pull")
    found = lineage(fresh, str(fresh / "models/model.pt"))
    before = steps(lineage(tagged, str(tagged / "models/model.pt")))["train"]
    assert (steps(found)["train"]["evidence"], steps(found)["train"]["action"]) == ("planned", before["action"])
    path = fresh / "stages/lib/training.py"
    path.write_text(path.read_text() + "\n\nCHANGED = 1\n")
    step = steps(lineage(fresh, str(fresh / "models/model.pt")))["train"]
    assert (step["evidence"], step["action"]) == ("", None), "other code than ran says nothing of what was made"
