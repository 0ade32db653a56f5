"""What git's refs say of the data: the manifests and tables of any commit, read without checking it out.

`dvc.lock` and `data/*.dvc` of a commit name folders by md5; DVC keeps a folder as a list of (file, md5), and each file
under its md5, in its cache and its remote. So what many commits share is read once. A file that lies in the working
tree with the wanted md5 needs neither.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages.harness import DATA_FOLDERS, ITEM_STAGES, MANIFEST
from stages.lib.errors import ConfigError
from stages.lib.secrets import redacted
from stages.tools.programs import say

WORKING_TREE = "working tree"
LOCK, TRACKED = "dvc.lock", ("data/recordings.dvc", "data/labels.dvc")
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
COMMIT = re.compile(r"[0-9a-f]{40}")


class Manifest(NamedTuple):
    """The manifest of one stage, which all of `revs` name; rows is None where its bytes can't be had."""

    revs: tuple[str, ...]
    stage: str
    rows: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Tree:
    """What one or more revisions say of their data, the newest first.

    revs    full names of refs, commits (40 digits) or WORKING_TREE
    outs    path -> md5 of what stages and scans made
    deps    stage -> path -> md5 of what it read
    params  stage -> the sections of params.yaml that it ran with
    fault   why dvc.lock or a .dvc file can't be read; "" else
    """

    revs: tuple[str, ...]
    outs: Mapping[str, str]
    deps: Mapping[str, Mapping[str, str]]
    params: Mapping[str, Mapping[str, Any]]
    fault: str = ""


def manifests(root: Path) -> Iterator[Manifest]:
    """Each distinct manifest that the working tree or a ref's tip names; rows None where it can't be had.

    Refs are all that git lists (branches, remotes' branches, tags, experiments, stashes), and every worktree's HEAD.
    """
    objects = Objects(root)
    found: dict[tuple[str, str], tuple[list[str], Path | None]] = {}

    def note(revs: Iterable[str], stage: str, md5: str, path: Path | None) -> None:
        found.setdefault((stage, md5), ([], path))[0].extend(revs)

    for tree in trees(root, tips(root)):
        for stage, folder in ((stage, DATA_FOLDERS[stage]) for stage in ITEM_STAGES):
            if tree.fault:
                note(tree.revs, stage, tree.fault, None)
            elif folder in tree.outs:
                members = objects.members(folder, tree.outs[folder]) or {}
                note(tree.revs, stage, members.get(MANIFEST, tree.outs[folder]),
                     objects.path(folder, tree.outs[folder], MANIFEST))
    for stage in ITEM_STAGES:
        path = root / DATA_FOLDERS[stage] / MANIFEST
        if path.exists():
            note([WORKING_TREE], stage, file_md5(path), path)
    for (stage, _), (revs, path) in found.items():
        yield Manifest(tuple(dict.fromkeys(revs)), stage, read_rows(path))


def read_rows(path: Path | None) -> list[dict[str, Any]] | None:
    """The lines of a manifest; None where there is none, or a damaged one."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return path and [json.loads(line) for line in path.read_text().splitlines()]
    return None


# git ------------------------------------------------------------------------------------------------------------------
def tips(root: Path) -> dict[str, str]:
    """Full name of every ref, and HEAD of every worktree -> commit."""
    refs = say(root, "git", "for-each-ref", "--format=%(refname)").splitlines()
    peeled = _batch(root, (f"{ref}^{{commit}}" for ref in refs), "--batch-check=%(objectname)")
    found = {ref: name for ref, name in zip(refs, peeled) if COMMIT.fullmatch(name)}  # a tag may be of something else
    heads = [line.split()[1] for line in say(root, "git", "worktree", "list", "--porcelain").splitlines()
             if line.startswith("HEAD ")]
    named = set(found.values())
    return found | {
        f"HEAD {commit[:12]}": commit for commit in heads if commit not in named and set(commit) != {"0"}}


def commits(root: Path) -> dict[str, str]:
    """Every commit that a tip reaches, the newest first, by the names of the refs at it, else by its own 40 digits."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, commit in tips(root).items():
        names[commit].append(name)
    reached = say(root, "git", "rev-list", *names).split() if names else []
    return {name: commit for commit in reached for name in names.get(commit, [commit])}


def short(rev: str) -> str:
    """A revision's name for people: `branch main`, `tag v1`, `experiment slow`, origin/main, 12 digits of a commit."""
    for prefix, kind in (("refs/heads/", "branch "), ("refs/tags/", "tag "), ("refs/remotes/", ""),
                         ("refs/exps/", "experiment ")):
        if rev.startswith(prefix):
            name = rev.removeprefix(prefix)
            return kind + ("/".join(name.split("/")[2:]) or name if prefix == "refs/exps/" else name)
    return f"commit {rev[:12]}" if COMMIT.fullmatch(rev) else rev


def names(revs: Iterable[str]) -> list[str]:
    """The revisions' short names, those that have a name of their own first."""
    return [short(rev) for rev in sorted(revs, key=lambda rev: bool(COMMIT.fullmatch(rev)))]


def is_shallow(root: Path) -> bool:
    """Whether this clone lacks the older commits."""
    return say(root, "git", "rev-parse", "--is-shallow-repository") == "true"


def trees(root: Path, revs: Mapping[str, str]) -> list[Tree]:
    """The distinct trees of the working tree and of `revs` (name -> commit), the working tree's first."""
    prefix = say(root, "git", "rev-parse", "--show-prefix")
    files = (LOCK, *TRACKED)
    asked = [f"{commit}:{prefix}{file}" for commit in dict.fromkeys(revs.values()) for file in files]
    blobs = dict(zip(asked, (line.split()[0] if line.endswith(" blob") else "" for line in _batch(
        root, asked, "--batch-check=%(objectname) %(objecttype)"))))
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, commit in revs.items():
        shared[tuple(blobs[f"{commit}:{prefix}{file}"] for file in files)].append(name)
    texts = _blobs(root, {blob for key in shared for blob in key if blob})
    here = tuple((root / file).read_bytes() if (root / file).exists() else b"" for file in files)
    found: dict[tuple[bytes, ...], list[str]] = {here: [WORKING_TREE]}
    for key, names in shared.items():
        found.setdefault(tuple(texts.get(blob, b"") for blob in key), []).extend(names)
    return [_tree(tuple(names), *texts) for texts, names in found.items()]


def _tree(revs: tuple[str, ...], lock: bytes, *tracked: bytes) -> Tree:
    try:
        stages = (yaml.load(lock, yaml.CSafeLoader) or {}).get("stages", {})
        outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ())}
        for name, text in zip(TRACKED, tracked):
            for out in (yaml.load(text, yaml.CSafeLoader) or {}).get("outs", ()):
                outs[(Path(name).parent / out["path"]).as_posix()] = out["md5"]
        deps = {name: {dep["path"]: dep["md5"] for dep in stage.get("deps", ())} for name, stage in stages.items()}
        params = {name: stage.get("params", {}).get("params.yaml", {}) for name, stage in stages.items()}
        return Tree(revs, outs, deps, params)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        return Tree(revs, {}, {}, {}, f"dvc.lock or data/*.dvc is damaged: {' '.join(str(error).split())[:100]}")


def _batch(root: Path, asked: Iterable[str], mode: str) -> list[str]:
    ran = subprocess.run(["git", "cat-file", mode], cwd=root, input="".join(f"{one}\n" for one in asked), text=True,
                         capture_output=True)
    if ran.returncode:
        raise ConfigError(f"`git cat-file` failed: {ran.stderr.strip()[-300:]}\n  `git fsck` looks for the cause")
    return ran.stdout.splitlines()


def _blobs(root: Path, names: set[str]) -> dict[str, bytes]:
    """blob -> its bytes."""
    ran = subprocess.run(["git", "cat-file", "--batch"], cwd=root, input="".join(f"{name}\n" for name in sorted(names))
                         .encode(), capture_output=True)
    found, at, data = {}, 0, ran.stdout
    for name in sorted(names):
        end = data.index(b"\n", at)
        size = int(data[at:end].split()[2])
        found[name] = data[end + 1:end + 1 + size]
        at = end + 1 + size + 1
    return found


# DVC ------------------------------------------------------------------------------------------------------------------
class Objects:
    """Files of DVC's folders by md5, from the working tree, DVC's cache or its remote; every byte is verified.

    remote_fault  what kept the remote from being asked; "" else
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.remote_fault = ""
        self._found: dict[str, Path | None] = {}
        self._folders: dict[str, dict[str, str] | None] = {}
        self._here: dict[str, dict[str, str]] = {}

    def path(self, folder: str, md5: str, file: str) -> Path | None:
        """Where `file` of the folder with this md5 can be read here; None where it can't, or the folder lacks it."""
        members = self.members(folder, md5)
        return self._find(members[file], self.root / folder / file) if members and file in members else None

    @property
    def has_remote(self) -> bool:
        """Whether DVC has a remote to ask."""
        return self._repo is not None and self._remote is not None

    def members(self, folder: str, md5: str) -> dict[str, str] | None:
        """file -> md5 of all in the folder with this md5; None where that can't be known."""
        if md5 not in self._folders:
            path = self._find(md5)
            if path is not None:
                self._folders[md5] = {one["relpath"]: one["md5"] for one in json.loads(path.read_bytes())}
            else:
                here = self._lying_here(folder)
                self._folders[md5] = here if _folder_md5(here) == md5 else None
        return self._folders[md5]

    def _lying_here(self, folder: str) -> dict[str, str]:
        if folder not in self._here:
            place = self.root / folder
            self._here[folder] = {path.relative_to(place).as_posix(): file_md5(path)
                                  for path in sorted(place.rglob("*")) if path.is_file()}
        return self._here[folder]

    def _find(self, md5: str, here: Path | None = None) -> Path | None:
        if md5 not in self._found:
            places = self._places(md5, here) if MD5.fullmatch(md5) else ()
            self._found[md5] = next((path for path in places
                                     if path.is_file() and file_md5(path) == md5.removesuffix(".dir")), None)
        return self._found[md5]

    def _places(self, md5: str, here: Path | None) -> Iterator[Path]:
        if here is not None:
            yield here
        if self._repo is None:
            return
        yield Path(self._repo.cache.local.oid_to_path(md5))
        if self._remote is not None:
            path = Path(self._scratch.name) / md5
            try:
                self._remote.fs.get_file(self._remote.oid_to_path(md5), str(path))
            except FileNotFoundError:
                return
            except Exception as error:  # DVC's file systems end in errors of many libraries
                self._blame_remote(error)
                return
            yield path

    @functools.cached_property
    def _repo(self) -> Any:
        from dvc.repo import Repo  # a second to import, and seldom needed

        return Repo(str(self.root)) if (self.root / ".dvc").is_dir() else None

    @functools.cached_property
    def _remote(self) -> Any:
        """The object store of DVC's default remote; None where there is none, or it does not open."""
        if not self._repo.config["remote"]:
            return None
        try:
            return self._repo.cloud.get_remote_odb()
        except Exception as error:
            self._blame_remote(error)
            return None

    def _blame_remote(self, error: Exception) -> None:
        self._remote = None  # asked once, not for every file
        self.remote_fault = redacted(" ".join(str(error).split()))[:200] or type(error).__name__

    @functools.cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="roadmill-history-")


def file_md5(path: Path) -> str:
    """md5 of a file's bytes, as DVC takes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _folder_md5(members: Mapping[str, str]) -> str:
    """What DVC calls a folder of these files."""
    listed = [{"md5": md5, "relpath": name} for name, md5 in sorted(members.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"
