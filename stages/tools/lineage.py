"""`roadmill lineage`: from a file, token or name back to recordings, settings, code and actions; and from a recording
to all that was made from it.

The document, whose keys stand sorted in JSON; what does not apply is left out:

    asked       what was asked for
    kind        recording, scan, drive, scene, sample, frame, box, track, sensor, dataset, model, scores, item or stage
    revision    where it was found: `working tree`, or a ref or commit
    subject     facts of the thing itself: its row, its file, sha256, where in which pack
    scenes      name, token, split, pack_digest, drive: what a model learned from, scores were judged on, a dataset has
    labels      whose labels: source, counts, files {path: sha256}
    steps       how it was made, the last step first. A step of an item: stage, item, evidence, action (key), op, code,
                salt, knobs, params, inputs {role: sha256}, outputs {file: [sha256, bytes]}, facts, run. A step of a
                stage: stage, items, evidence, code, salt, knobs, output_md5. Of a whole-stage program: stage, evidence,
                code (md5 of each file), knobs, inputs {path: md5}, output_md5
    recordings  name, digest, bytes, scan, rig; of a recording that was asked for also listed_by, datasets, models,
                scores and gaps, as `uses.uses` gives them
    looked_into refs, commits, states: how far the search for uses went; beyond: what this clone can't know of
    gaps        what, remedy: what is not known, and the command that then helps

`evidence` is `recorded` (the store has the action and its result), `planned` (the store has no record of it; it is what
this checkout asks for, and dvc.lock says that the stage ran with this code and these settings on these data),
`dvc.lock`, or "" where there is none.
"""

from __future__ import annotations

import re
from pathlib import Path

from stages.harness import DATA_FOLDERS, ITEM_STAGES, STAGES
from stages.lib.digests import digest_file
from stages.lib.errors import ConfigError
from stages.lib.knobs import near_miss
from stages.store.sources import describe
from stages.tools import exported, history, uses
from stages.tools.ancestry import Ancestry, Document
from stages.tools.checkout import Checkout

SHA256, TOKEN = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")
# table -> kind of its rows
TOKENS = {"scene": "scene", "log": "drive", "sample": "sample", "sample_data": "frame", "sample_annotation": "box",
          "instance": "track", "calibrated_sensor": "sensor"}


def lineage(root: Path, asked: str) -> Document:
    """The document of a file, a token of any table, a sha256 (of a blob, a recording, an action) or a name.

    Raises ConfigError for what no revision knows, DataError for a file whose bytes are not those of its name.
    """
    question = _Question(Ancestry(root))
    found = question.answer(asked)
    known = question.known
    if found is None:
        unseen = question.unseen(asked)
        what = ("its bytes are of no recording, stage or export" if Path(asked).exists() else
                "no file here, and no token, digest or name")
        raise ConfigError(
            f"{asked}: {what} in the working tree or in the {len(known.trees)} "
            f"states of the data that {len(known.commits)} refs and commits name{near_miss(asked, question.names)}\n"
            + (f"  this does not say that it was never used, {unseen}" if unseen else
               "  `roadmill lineage` takes a file, a token, a sha256, a scene or a drive"))
    return {"asked": asked, **found} | ({"gaps": known.gaps} if known.gaps else {})


class _Question:
    """Finds what is meant; `names` are those that it came across."""

    def __init__(self, known: Ancestry) -> None:
        self.known = known
        self.names: set[str] = set()

    def answer(self, asked: str) -> Document | None:
        """The document, None where nothing is found."""
        path = Path(asked)
        if path.exists():
            return self._file(path.resolve())
        if SHA256.fullmatch(asked):
            return self._digest(asked) or self._action(asked) or self._unlisted(asked)
        return self._token(asked) if TOKEN.fullmatch(asked) else self._name(asked)

    def unseen(self, asked: str) -> str:
        """What could not be looked into on the way, and the command that then helps; "" where nothing."""
        gaps = uses.listed(self.known.trees, self.known.objects)[1]
        if SHA256.fullmatch(asked):
            gaps = [*gaps, *uses.uses(asked, self.known.trees, self.known.objects)["gaps"]]
        revs = history.names(dict.fromkeys(rev for one in gaps for rev in one["revs"]))
        paths = ", ".join(dict.fromkeys(one["path"] for one in gaps))
        return f"{paths} of {', '.join(revs)} could not be looked into:\n  {gaps[0]['remedy']}" if gaps else ""

    def _file(self, path: Path) -> Document | None:
        if path.is_relative_to(self.known.root):
            name = path.relative_to(self.known.root).as_posix()
            for stage, folder in DATA_FOLDERS.items():
                if stage in STAGES and (f"{name}/".startswith(f"{folder}/") or name.startswith(f"results/{stage}/")):
                    return self._made_file(path, name, stage)
            if name.startswith(f"{DATA_FOLDERS['labels']}/") and path.suffix == ".json":
                kind, _, drive = name.removeprefix(f"{DATA_FOLDERS['labels']}/").removesuffix(".json").partition("/")
                found = self._name(drive)
                return found and found | {"labels": [{"source": kind, "files": {name: digest_file(path)}}]}
            if name.startswith(f"{DATA_FOLDERS['recordings']}/"):
                subject = {"path": name, "sha256": digest_file(path)}
                return self.known.scan(next(self.known.checkouts()), path.stem, subject)
        if path.is_dir():
            return self._recording_at(path)
        return (self._member(path) or self._digest(digest_file(path)) or self._view(path) or self._copy(path)
                or self._recording_at(path))

    def _made_file(self, path: Path, name: str, stage: str) -> Document:
        """What a file or folder of a stage is, as it lies here."""
        checkout = next(self.known.checkouts())
        self._want_locked(checkout, path, name)
        if path.is_file() and stage in ITEM_STAGES:
            digest = digest_file(path)
            for row in checkout.rows(stage):
                files = [file for file, blob in row["outputs"].items() if blob[0] == digest]
                if files:
                    return self.known.item(checkout, stage, row, {"path": name, "sha256": digest, "file": files[0]})
        subject = {"path": name}
        if path.is_file():
            subject |= {"sha256": digest_file(path), "bytes": path.stat().st_size}
        return self.known.stage(checkout, stage, subject)

    def _want_locked(self, checkout: Checkout, path: Path, name: str) -> None:
        """Notes where a file on disk is not the one that dvc.lock names."""
        out = next((out for out in checkout.tree.outs if f"{name}/".startswith(f"{out}/")), "")
        if not out or path.is_dir():
            return
        md5 = checkout.md5(out)
        known = md5 if out == name else (self.known.objects.members(out, md5) or {}).get(name.removeprefix(f"{out}/"))
        if known != history.file_md5(path):
            self.known.gap(f"{name} is not the file that dvc.lock names: an unfinished run, or changed by hand",
                           f"`dvc status` says what changed, `dvc checkout {out}` restores it")

    def _digest(self, digest: str) -> Document | None:
        """What has this sha256: a recording, or an output of an item."""
        known, gaps = uses.listed(self.known.trees, self.known.objects)
        if any(one.recording.digest == digest for one in known):
            return self.known.recordings([one for one in known if one.recording.digest == digest], gaps)
        for checkout in self.known.checkouts():
            for stage in ITEM_STAGES:
                for row in checkout.rows(stage):
                    files = [file for file, blob in row["outputs"].items() if blob[0] == digest]
                    if files:
                        return self.known.item(checkout, stage, row, {"sha256": digest, "file": files[0]})
        return None

    def _unlisted(self, digest: str) -> Document | None:
        """A recording that datasets have scenes of, though no list has it."""
        used = uses.uses(digest, self.known.trees, self.known.objects)
        return self.known.searched([{"digest": digest, **used}]) if any(used[kind] for kind in uses.KINDS.values()) \
            else None

    def _action(self, key: str) -> Document | None:
        """The item whose action has this key: one that is planned now, or an earlier one of a known item."""
        here = next(self.known.checkouts())
        for stage in ITEM_STAGES:
            names = {name for name, one in self.known.origins.plan(stage).items() if one.action.key == key}
            for row in (row for row in here.rows(stage) if row["name"] in names):
                return self.known.item(here, stage, row, {"action": key})
        for checkout in self.known.checkouts():
            for stage in ITEM_STAGES:
                for row in checkout.rows(stage):
                    if (earlier := self.known.origins.earlier(stage, row["name"], key)) is not None:
                        return self.known.item(checkout, stage, earlier, {"action": key})
        return None

    def _token(self, token: str) -> Document | None:
        for checkout in self.known.checkouts():
            for table, kind in TOKENS.items():
                for row in checkout.find(table, "token", token):
                    return self.known.row(checkout, kind, row)
            for row in checkout.find("sample_data", "ego_pose_token", token):
                return self.known.row(checkout, "frame", row)
        return None

    def _name(self, name: str) -> Document | None:
        """A scene, a recording (which is a drive), or a run."""
        for checkout in self.known.checkouts():
            for stage in ("sample", "train", "evaluate"):
                rows = checkout.rows(stage)
                self.names |= {row["name"] for row in rows}
                for row in rows:
                    if row["name"] == name:
                        return self.known.item(checkout, stage, row, {"name": name})
        known, gaps = uses.listed(self.known.trees, self.known.objects)
        self.names |= {one.recording.name for one in known}
        same = [one for one in known if one.recording.name == name]
        return self.known.recordings(same, gaps) if same else None

    def _recording_at(self, path: Path) -> Document | None:
        """The recording on this machine that the path is, or is part of, with the bytes that a list says."""
        known, gaps = uses.listed(self.known.trees, self.known.objects)
        for source in self.known.harness.sources:
            for one in known:
                name = one.recording.name
                if (path.is_relative_to(Path(source.where, name).resolve()) and describe(
                        source, name, source.files(name), one.recording.rig).digest == one.recording.digest):
                    return self.known.recordings([one], gaps)
        return None

    def _member(self, path: Path) -> Document | None:
        found = exported.MEMBER.search(path.as_posix()) and exported.member(
            path, self.known.checkouts(), self.known.harness.store)
        if not found:
            return None
        document = self.known.row(found[0], "frame", found[1])
        document["subject"] = {"path": str(path), "sha256": digest_file(path), "same_as_in_pack": True,
                               **document["subject"]}
        return document

    def _copy(self, path: Path) -> Document | None:
        """A copy of a file of some stage's folder, in any revision."""
        md5 = history.file_md5(path)
        for checkout in self.known.checkouts():
            for stage, folder in DATA_FOLDERS.items():
                if stage in STAGES and checkout.objects is not None:
                    members = checkout.objects.members(folder, checkout.md5(folder)) or {}
                    same = [file for file, one in members.items() if one == md5]
                    if same:
                        return self.known.stage(checkout, stage, {"path": str(path), "sha256": digest_file(path),
                                                                  "file": f"{folder}/{same[0]}"})
        return None

    def _view(self, path: Path) -> Document | None:
        found = exported.view(path, self.known.checkouts())
        if found is None:
            return None
        subject = {"path": str(path), "sha256": digest_file(path), "same_when_written_again": True}
        return self.known.stage(found[0], "merge", subject, set(found[1]["token"]))
