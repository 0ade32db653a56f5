"""Documents of `roadmill lineage`: what a row, an item, a stage's output or a recording comes from."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from stages.harness import DATA_FOLDERS, ITEM_STAGES, STAGES, Harness
from stages.lib import tables
from stages.lib.digests import digest_file
from stages.tools import history, uses
from stages.tools.checkout import Checkout
from stages.tools.origin import Origins

Document = dict[str, Any]
LABELLED_BY_FILES = ("human", "truth")
FOLDER_KINDS = {"merge": "dataset", "train": "model", "evaluate": "scores"}
ITEM_KINDS = {"ingest": "drive", "sample": "scene", "train": "model", "evaluate": "scores"}


class Ancestry:
    """What this clone knows of where things come from; `gaps` gathers what it does not know: what, remedy."""

    def __init__(self, root: Path) -> None:
        self.root, self.harness = root, Harness(root)
        self.commits = history.commits(root)
        self.trees = history.trees(root, self.commits)
        self.objects = history.Objects(root)
        self.origins = Origins(self.harness, self.trees, self.commits)
        self.gaps: list[dict[str, str]] = []

    def checkouts(self) -> Iterator[Checkout]:
        """The files on disk, then what each tree's dvc.lock names, the newest first."""
        yield Checkout(self.root, self.trees[0], None)
        for tree in self.trees:
            yield Checkout(self.root, tree, self.objects)

    def gap(self, what: str, remedy: str) -> None:
        """Notes what is not known, and the command that then helps."""
        if (gap := {"what": what, "remedy": remedy}) not in self.gaps:
            self.gaps.append(gap)

    # documents --------------------------------------------------------------------------------------------------------
    def row(self, checkout: Checkout, kind: str, row: Mapping[str, Any]) -> Document:
        """A row of a merged table."""
        if kind == "drive":
            known, gaps = uses.listed(self.trees, self.objects)
            return self.recordings([one for one in known if tables.token(
                "drive", one.recording.digest, row["logfile"]) == row["drive_token"]], gaps)
        scene = row if kind == "scene" else checkout.find("scene", "token", row["scene_token"])[0]
        known = {key: value for key, value in row.items() if value not in ("", None, []) and not _is_nan(value)}
        document = {"kind": kind, "revision": checkout.name, "subject": known}
        steps, extra = self._scene_steps(checkout, scene, "merge"), {}
        if kind == "frame":
            document["subject"] |= self._message(checkout, scene, row, steps)
        if kind in ("box", "track"):
            source = row["source"]
            instance = row if kind == "track" else checkout.find("instance", "token", row["instance_token"])[0]
            document["subject"]["track_id"] = instance["track_id"]
            extra = {"labels": [{"source": source, "files": self._label_files(checkout, source, [scene["drive"]])}]}
            if source not in LABELLED_BY_FILES:
                steps = [*self._labelled(checkout, scene), *steps]
            steps = [self.origins.of_program(checkout, "merge"), *steps]
        elif kind in ("scene", "sample"):
            extra = {"labels": self._boxes(checkout, [scene])}
        return document | extra | {"scenes": [self._scene(scene)], "steps": steps,
                                   "recordings": self._of_drives(checkout, [scene])}

    def _scene_steps(self, checkout: Checkout, scene: dict[str, Any], asked: str) -> list[Document]:
        """How the scene came to the stage that is asked of (merge, autolabel or sample): the actions that sampled it
        and read its drive, and what cut and split in between. Gives the scene its drive's name."""
        scene["drive"] = _drive_names(checkout).get(scene["drive_token"], "")
        names = {"sample": scene["name"], "split": "", "curate": "", "ingest": scene["drive"]}
        steps = []
        for stage, name in names.items():
            if stage == asked:
                continue
            at = self._read_by(checkout, stage, asked)
            if name:
                rows = [row for row in at.rows(stage) if row["name"] == name]
                steps += [self._step(at, stage, row) for row in rows]
                if not rows:
                    self.gap(f"{stage} of {name}: its manifest is not here", f"`dvc pull {DATA_FOLDERS[stage]}`")
            else:
                steps.append(self.origins.of_program(at, stage))
        return steps

    def _labelled(self, checkout: Checkout, scene: Mapping[str, Any]) -> list[Document]:
        at = self._read_by(checkout, "autolabel", "merge")
        return [self._step(at, "autolabel", row) for row in at.rows("autolabel")
                if row["facts"]["scene_token"] == scene["token"]]

    def _message(self, checkout: Checkout, scene: Mapping[str, Any], row: Mapping[str, Any],
                 steps: list[Document]) -> Document:
        """topic, receive_ns and seq of the message that became the frame, from the index that sampling read."""
        drive = next((step for step in steps if step["stage"] == "ingest"), None)
        sampled = next((step for step in steps if step["stage"] == "sample"), {})
        topics = {one["channel"]: one["topic"] for one in drive["facts"]["channels"]} if drive else {}
        digest = sampled.get("inputs", {}).get("index") or (drive and drive["outputs"]["index.parquet"][0])
        path = digest and self.harness.store.find(digest)
        if not path:
            self.gap(f"the message of {row['filename']}: the index of {scene['drive']} ({digest or 'no digest'}) is "
                     "not in the store", "`dvc repro -f ingest` makes it again")
            return {}
        message = tables.read(path).filter((pl.col("channel") == row["channel"])
                                           & (pl.col("stamp_us") == row["stamp_us"])).row(0, named=True)
        return {"message": {"topic": topics.get(row["channel"]), "receive_ns": message["receive_ns"],
                            "seq": message["seq"], "recording": scene["drive"]}}

    def item(self, checkout: Checkout, stage: str, row: Mapping[str, Any], subject: Document) -> Document:
        """An item of a stage, or one of its files."""
        if stage in ("train", "evaluate"):
            return self.stage(checkout, stage, subject)
        if stage == "ingest":
            document = {"steps": [self._step(checkout, stage, row)]}
            drives = [{"drive": row["name"], "drive_token": row["facts"]["drive"]["drive_token"]}]
        else:
            scenes = checkout.find("scene", "token", row["facts"]["scene_token"])
            if not scenes:
                self.gap(f"{row['name']} is not in the merged dataset of {checkout.name}", "`dvc repro merge`")
                return {"kind": "item", "revision": checkout.name, "subject": subject,
                        "steps": [self._step(checkout, stage, row)]}
            steps = [self._step(checkout, stage, row), *self._scene_steps(checkout, scenes[0], stage)]
            document, drives = {"scenes": [self._scene(scenes[0])], "steps": steps}, scenes
            if stage == "sample":
                document["labels"] = self._boxes(checkout, scenes)
        return {"kind": ITEM_KINDS.get(stage, "item"), "revision": checkout.name, "subject": subject, **document,
                "recordings": self._of_drives(checkout, drives)}

    def stage(self, checkout: Checkout, stage: str, subject: Document, tokens: Collection[str] = ()) -> Document:
        """All that a stage made: a dataset, a model, scores, or the tables before them; of a dataset only the scenes of
        these tokens, where there are any."""
        steps, at = [], checkout
        for name in reversed(STAGES[:STAGES.index(stage) + 1]):
            at = self._read_by(at, name, stage)
            rows = at.rows(name) if name in ("train", "evaluate") else []
            steps += [self._step(at, name, row) for row in rows] if rows else [
                self.origins.of_stage(at, name) if name in ITEM_STAGES else self.origins.of_program(at, name)]
        document = {"kind": FOLDER_KINDS.get(stage, "stage"), "revision": checkout.name, "subject": subject,
                    "steps": steps}
        if stage not in FOLDER_KINDS:
            drives = [{"drive": row["name"], "drive_token": row["facts"]["drive"]["drive_token"]}
                      for row in self._read_by(checkout, "ingest", stage).rows("ingest")]
            return document | {"recordings": self._of_drives(checkout, drives)}
        merged = self._read_by(checkout, "merge", stage)
        table = merged.table("scene")
        if table is None:
            self.gap("the dataset's tables are not here", f"`dvc pull {DATA_FOLDERS['merge']}`")
            return document
        judged = checkout.tree.params.get("evaluate", {}).get("evaluate", {}).get("split", "")
        split, drives = {"train": "train", "evaluate": judged}.get(stage, ""), _drive_names(merged)
        scenes = [{**scene, "drive": drives[scene["drive_token"]]} for scene in table.to_dicts()
                  if scene["split"] == (split or scene["split"]) and (not tokens or scene["token"] in tokens)]
        labels = self._learned(merged, steps[0], scenes) if stage == "train" else self._boxes(merged, scenes)
        return document | {"scenes": [self._scene(scene) for scene in scenes], "labels": labels,
                           "recordings": self._of_drives(merged, scenes)}

    def scan(self, checkout: Checkout, name: str, subject: Document) -> Document:
        """The recordings that a scan found: the decision that they belong to the dataset."""
        found = [uses.Known(one, scan, ()) for scan, one in checkout.recordings() if scan == name]
        return {"kind": "scan", "revision": checkout.name, "subject": subject, "steps": [],
                "recordings": [self._recording(one) for one in found]}

    def recordings(self, known: list[uses.Known], gaps: list[Document]) -> Document:
        """Recordings of one name or digest, with all that was made from them."""
        found = []
        for digest in dict.fromkeys(one.recording.digest for one in known):
            same = [one for one in known if one.recording.digest == digest]
            used = uses.uses(digest, self.trees, self.objects)
            found += [self._recording(one) | {"listed_by": list(one.revs), **used} for one in same]
        steps = []
        for checkout in self.checkouts():
            rows = [row for row in checkout.rows("ingest") if row["name"] == known[0].recording.name
                    and row["facts"]["drive"]["recording_digest"] in {one["digest"] for one in found}] if known else []
            if rows:
                steps = [self._step(checkout, "ingest", row) for row in rows]
                break
        for one in gaps:
            self.gap(f"{one['path']} {one['md5']} of {', '.join(history.names(one['revs']))}", one["remedy"])
        return self.searched(found) | {"steps": steps}

    def searched(self, found: list[Document]) -> Document:
        """Recordings and how far the search for what was made of them went."""
        return {"kind": "recording", "recordings": found, "looked_into": uses.looked_into(self.trees, self.commits),
                "beyond": uses.beyond(self.root, self.commits)}

    # parts of documents -----------------------------------------------------------------------------------------------
    def _step(self, checkout: Checkout, stage: str, row: Mapping[str, Any]) -> Document:
        step = self.origins.of_item(checkout, stage, row)
        if step["evidence"] != "recorded":
            shown = ": what stands here is what is planned now" if step["evidence"] else ""
            self.gap(f"{stage} {row['name']}: its action is not in {self.harness.store.shared.where}{shown}",
                     "ask with the store that made it: ROADMILL_STORE=NAME roadmill lineage …")
        return step

    def _read_by(self, checkout: Checkout, stage: str, asked: str) -> Checkout:
        """The revision in which the stage made what the later stages read, up to the one that is asked of."""
        folder = DATA_FOLDERS[stage]
        for later in reversed(STAGES[STAGES.index(stage) + 1:STAGES.index(asked) + 1]):
            wanted = checkout.tree.deps.get(later, {}).get(folder, "")
            if wanted in ("", checkout.md5(folder)):
                continue
            tree = next((tree for tree in self.trees if tree.outs.get(folder) == wanted), None)
            if tree is None:
                self.gap(f"{later} read {folder} {wanted}, which no revision names; dvc.lock now has "
                         f"{checkout.md5(folder)}", f"`dvc repro {later}` brings them in step")
                tree = replace(checkout.tree, outs={**checkout.tree.outs, folder: wanted})
            return Checkout(self.root, tree, self.objects)
        return checkout

    def _scene(self, scene: Mapping[str, Any]) -> Document:
        return {key: scene[key] for key in ("name", "token", "split", "pack_digest", "drive")}

    def _of_drives(self, checkout: Checkout, scenes: list[Mapping[str, Any]]) -> list[Document]:
        """The recordings of the scenes' drives, each once, by name."""
        drives = {scene["drive_token"]: scene["drive"] for scene in scenes}
        known = {tables.token("drive", one.digest, one.name): (scan, one) for scan, one in checkout.recordings()}
        found = []
        for token, name in sorted(drives.items(), key=lambda item: item[1]):
            if token in known:
                found.append(self._recording(uses.Known(known[token][1], known[token][0], ())))
            else:
                self.gap(f"the recording of {name}: no list of this revision has it", "`dvc pull data/recordings`")
        return found

    def _recording(self, known: uses.Known) -> Document:
        one = known.recording
        members = {"members": [list(member) for member in one.members]} if one.members else {}
        return {"name": one.name, "digest": one.digest, "bytes": one.bytes, "scan": known.scan, "rig": one.rig,
                **members}

    def _boxes(self, checkout: Checkout, scenes: list[Mapping[str, Any]]) -> list[Document]:
        """Boxes of the scenes by source, with the files or actions that they come from."""
        table = checkout.table("sample_annotation")
        tokens = [scene["token"] for scene in scenes]
        counts = table.filter(pl.col("scene_token").is_in(tokens)).group_by("source").agg(
            boxes=pl.len(), scenes=pl.col("scene_token").unique()).sort("source").to_dicts()
        drives = {scene["token"]: scene["drive"] for scene in scenes}
        return [{"source": one["source"], "boxes": one["boxes"], "scenes": len(one["scenes"]), "files":
                 self._label_files(checkout, one["source"], [drives[token] for token in one["scenes"]])}
                for one in counts]

    def _learned(self, checkout: Checkout, step: Document, scenes: list[Mapping[str, Any]]) -> list[Document]:
        """What a model counted while it learned: key frames and boxes by source and category."""
        drives = [scene["drive"] for scene in scenes]
        return [{"source": source, "key_frames": frames, "category": category, "boxes": used, "boxes_ignored": ignored,
                 "files": self._label_files(checkout, source, drives)}
                for source, frames, category, used, ignored in step["facts"]["labels"]]

    def _label_files(self, checkout: Checkout, source: str, drives: list[str]) -> dict[str, str]:
        """path -> sha256 of the label files of these drives, where the source is one of files."""
        if source not in LABELLED_BY_FILES:
            return {}
        folder, at = DATA_FOLDERS["labels"], self._labels_at(checkout)
        names = [f"{source}/{drive}.json" for drive in sorted(set(drives))]
        paths = {name: at.path(folder, name) for name in names}
        if not any(paths.values()):
            self.gap(f"the {source} label files are not here", f"`dvc pull {folder}`")
        return {f"{folder}/{name}": digest_file(path) for name, path in paths.items() if path}

    def _labels_at(self, checkout: Checkout) -> Checkout:
        """The revision whose labels merge read."""
        folder = DATA_FOLDERS["labels"]
        wanted = checkout.tree.deps.get("merge", {}).get(folder, "")
        if wanted in ("", checkout.md5(folder)):
            return checkout
        return Checkout(self.root, replace(checkout.tree, outs={**checkout.tree.outs, folder: wanted}), self.objects)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _drive_names(checkout: Checkout) -> dict[str, str]:
    """drive token -> name, of the drives in the dataset."""
    log = checkout.table("log")
    return {} if log is None else dict(log.select("drive_token", "logfile").iter_rows())
