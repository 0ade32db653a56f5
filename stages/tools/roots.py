"""What must stay in the store: all results that the manifests of some clones name, on any of their git refs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.harness import DATA_FOLDERS, ITEM_STAGES, MANIFEST
from stages.lib.errors import ConfigError
from stages.store.gc import Live
from stages.tools import history
from stages.tools.history import Manifest
from stages.tools.programs import say

WATCHED = ("refs/heads/", "refs/tags/", "refs/exps/")
NAMED = 3  # examples in an error's text


def live(clones: Iterable[Path]) -> Live:
    """Digests of all results and blobs that the clones' working trees and refs name.

    Raises ConfigError where that is not known for certain: a manifest can't be had, or a clone has not fetched what its
    git remotes have.
    """
    found, lost = Live(), []
    for clone in clones:
        _check(clone)
        for one in manifests(clone):
            if one.rows is None:
                lost += [f"{one.stage} of {rev} in {clone}" for rev in one.revs]
            for row in one.rows or ():
                if "outputs" in row:
                    found.add(row)
    if lost:
        raise ConfigError(f"{len(lost)} manifests that git names can't be read, so what they need is not known: "
                          f"{_some(lost)}\n  `dvc fetch --all-commits` and `dvc exp pull origin NAME` bring them, "
                          "after `dvc push --all-commits` and `dvc exp push origin NAME` where they were made; or "
                          "delete what names them")
    return found


def manifests(clone: Path) -> Iterator[Manifest]:
    """The manifests of all refs and of the working tree, and those that lie in its other working trees: git's, and
    those of experiments that run aside."""
    yield from history.manifests(clone)
    trees = [Path(line.partition(" ")[2]) for line in say(clone, "git", "worktree", "list", "--porcelain").splitlines()
             if line.startswith("worktree ")]
    for tree in {*trees, *(clone / ".dvc" / "tmp" / "exps").glob("*/")} - {clone.resolve(), clone}:
        for stage in ITEM_STAGES:
            path = tree / DATA_FOLDERS[stage] / MANIFEST
            if path.exists():
                yield Manifest((f"working tree {tree}",), stage, history.read_rows(path))


def _check(clone: Path) -> None:
    """Raises ConfigError where the folder is no clone, or a git remote of it has commits at its branches, tags or
    experiments that no ref here has."""
    if not (clone / "dvc.yaml").exists():
        raise ConfigError(f"{clone} is not a Roadmill repository: no dvc.yaml there\n  --clone takes a clone's folder")
    here = set(history.tips(clone).values())
    for remote in say(clone, "git", "remote").split():
        try:
            listed = say(clone, "git", "ls-remote", remote)
        except ConfigError as error:
            raise ConfigError(f"{clone}: its git remote {remote} does not answer, and may have refs that need what "
                              f"looks dead here: {str(error).splitlines()[0]}\n"
                              f"  `git ls-remote {remote}`; `git remote remove {remote}` if it is no more") from None
        there = {}
        for line in listed.splitlines():
            commit, ref = line.split("\t")
            there[ref.removesuffix("^{}")] = commit  # a tag's commit comes after the tag
        behind = sorted(ref for ref, commit in there.items() if ref.startswith(WATCHED) and commit not in here)
        if behind:
            raise ConfigError(
                f"{clone} lacks what its git remote {remote} has: {_some(behind)}\n"
                f"  `git fetch {remote} '+refs/heads/*:refs/remotes/{remote}/*' 'refs/tags/*:refs/tags/*' "
                "'refs/exps/*:refs/exps/*'` in it")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
