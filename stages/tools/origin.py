"""How data was made: the action of an item, the settings and inputs of a stage, whose code, in which run."""

from __future__ import annotations

import functools
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.harness import DATA_FOLDERS, Harness
from stages.lib.errors import RoadmillError
from stages.store import code
from stages.store.action import Action
from stages.tools import history
from stages.tools.checkout import Checkout
from stages.tools.history import Tree
from stages.tools.programs import say

CODE = ("stages", "constraints.txt")
RUN = ("started", "seconds", "host", "platform", "python", "commit")


class Origins:
    """Finds how things were made, in the store's actions and git's history; makes nothing.

    trees  of the working tree and of every commit, as `history.trees` gives them
    """

    def __init__(self, harness: Harness, trees: list[Tree], commits: Mapping[str, str]) -> None:
        self._harness, self._trees, self._commits = harness, trees, commits
        self._root = harness.root
        self._digests: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}

    # steps ------------------------------------------------------------------------------------------------------------
    def of_item(self, checkout: Checkout, stage: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The step that gave one row of a manifest (an item with its outputs)."""
        document, evidence = self._document(checkout, stage, row)
        step = {"stage": stage, "item": row["name"], "evidence": evidence, "outputs": row["outputs"],
                "facts": row["facts"]}
        if document is None:
            return step | {"action": None}
        action = Action(**document)
        found = next((one for one in self._harness.store.runs(stage)
                      if one.get("actions", {}).get(row["name"]) == action.key), None)
        return step | document | {"action": action.key, "code": self.code(stage, action.code),
                                  "run": found and {name: found.get(name) for name in RUN}}

    def of_stage(self, checkout: Checkout, stage: str) -> dict[str, Any]:
        """The step of a stage of many items, which share knobs, code and salt."""
        rows = checkout.rows(stage)
        step = {"stage": stage, "items": len(rows)}
        if rows:
            first = self.of_item(checkout, stage, rows[0])
            step |= {name: first.get(name) for name in ("evidence", "code", "salt", "knobs")}
        return step | {"output_md5": checkout.md5(DATA_FOLDERS[stage])}

    def of_program(self, checkout: Checkout, stage: str) -> dict[str, Any]:
        """The step of a whole-stage program, as dvc.lock has it: settings, md5 of its code and of what it read."""
        deps = checkout.tree.deps.get(stage, {})
        code_md5 = {path: md5 for path, md5 in deps.items() if path.startswith("stages/") or path == CODE[1]}
        changed = sorted(path for path, md5 in code_md5.items() if not (self._root / path).is_file()
                         or history.file_md5(self._root / path) != md5)
        commits = self._naming(DATA_FOLDERS[stage], checkout)
        return {"stage": stage, "evidence": "dvc.lock" if deps else "",
                "code": {"files": code_md5, "changed_since": changed, "commits": commits},
                "knobs": checkout.tree.params.get(stage, {}).get(stage, {}),
                "inputs": {path: md5 for path, md5 in deps.items() if path not in code_md5},
                "output_md5": checkout.md5(DATA_FOLDERS[stage])}

    def _document(self, checkout: Checkout, stage: str, row: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """(action, where it was found): the newest recorded one that gave these outputs, else the planned one."""
        store = self._harness.store
        for document in reversed(store.history(stage, row["name"])):
            action = Action(**document)
            result = store.lookup(action) if row.get("action") in (None, action.key) else None
            if result is not None and result["outputs"] == row["outputs"]:
                return document, "recorded"
        if checkout.objects is None and self._is_as_it_ran(checkout.tree, stage):
            planned = self.plan(stage).get(row["name"])
            return (planned.action.document, "planned") if planned else (None, "")
        return None, ""

    def _is_as_it_ran(self, tree: Tree, stage: str) -> bool:
        """Whether dvc.lock says that the stage ran with this checkout's code and settings, on these data."""
        deps, params = tree.deps.get(stage, {}), tree.params.get(stage, {})
        return bool(deps) and all(
            tree.outs.get(path) == md5 if path.startswith("data/") or path == DATA_FOLDERS["train"] else
            (self._root / path).is_file() and history.file_md5(self._root / path) == md5 for path, md5 in deps.items()
        ) and all(self._harness.params.get(section) == values for section, values in params.items())

    def earlier(self, stage: str, item: str, key: str) -> dict[str, Any] | None:
        """The row that the item's earlier action of this key gave; None where the store has none, or not its result."""
        for document in self._harness.store.history(stage, item):
            action = Action(**document)
            if action.key == key and (result := self._harness.store.lookup(action)) is not None:
                return {"name": item, "action": key, **result}
        return None

    def plan(self, stage: str) -> Mapping[str, Any]:
        """The items that params.yaml and the files on disk ask for now; none where they don't suffice."""
        try:
            return self._harness.plan(stage)
        except RoadmillError:
            return {}

    # code -------------------------------------------------------------------------------------------------------------
    def code(self, stage: str, digest: str) -> dict[str, Any]:
        """Whose code has this digest: this checkout's (own), that of commits whose dvc.lock says it ran; and the
        versions of the packages that the digest covers, where the code is known."""
        own, packages = self._own(stage)
        if own == digest:
            return {"digest": digest, "own": True, "commits": self._head(), "packages": packages}
        for commit in self._candidates(stage):
            found, packages = self._digest_at(stage, commit)
            if found == digest:
                return {"digest": digest, "own": False, "commits": [commit], "packages": packages}
        return {"digest": digest, "own": False, "commits": [], "packages": {}}

    @functools.cache  # noqa: B019 - as long as one question
    def _own(self, stage: str) -> tuple[str, dict[str, str]]:
        return _digest(self._root, stage)

    @functools.cache  # noqa: B019
    def _head(self) -> list[str]:
        """HEAD, where its code is the code on disk."""
        changed = say(self._root, "git", "--no-optional-locks", "status", "--porcelain", "--", *CODE)
        return [] if changed else [say(self._root, "git", "rev-parse", "HEAD")]

    def _candidates(self, stage: str) -> Iterable[str]:
        """A commit or two for each state of the stage's code that some dvc.lock says ran."""
        seen = set()
        for tree in self._trees:
            ran = frozenset(item for item in tree.deps.get(stage, {}).items() if not item[0].startswith("data/"))
            named = [self._commits[rev] for rev in tree.revs if rev in self._commits]
            if named and ran not in seen:
                seen.add(ran)
                yield from dict.fromkeys((named[-1], named[0]))

    def _digest_at(self, stage: str, commit: str) -> tuple[str, dict[str, str]]:
        if (stage, commit) not in self._digests:
            with tempfile.TemporaryDirectory(prefix="roadmill-code-") as folder:
                ran = subprocess.run(["git", "archive", commit, "--", *CODE], cwd=self._root, capture_output=True)
                try:
                    with tarfile.open(fileobj=io.BytesIO(ran.stdout)) as tar:
                        tar.extractall(folder, filter="data")
                    self._digests[stage, commit] = _digest(Path(folder), stage)
                except (tarfile.TarError, RoadmillError, SyntaxError, OSError):  # code of another age
                    self._digests[stage, commit] = "", {}
        return self._digests[stage, commit]

    def _naming(self, folder: str, checkout: Checkout) -> list[str]:
        """The commits whose dvc.lock has the same folder, oldest and newest."""
        md5 = checkout.md5(folder)
        found = [self._commits[rev] for tree in self._trees if md5 and tree.outs.get(folder) == md5
                 for rev in tree.revs if rev in self._commits]
        return list(dict.fromkeys((found[-1], found[0]))) if found else []


def _digest(root: Path, stage: str) -> tuple[str, dict[str, str]]:
    return code.digest_and_packages(root, f"stages.{stage}", "run", code.read_pins(root / CODE[1]))

