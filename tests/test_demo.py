"""The demo's record: a commit on a branch of its own, which never takes anything of the user's along."""

import subprocess

import pytest

from stages.lib.errors import ConfigError
from stages.tools import demo


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one commit, two recorded files that changed, and a file of the user's; nobody's identity."""
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "--quiet", "-b", "main")
    (folder / "params.yaml").write_text("a: 1\n")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "start")
    for name in ("params.yaml", "dvc.lock", "mine.txt"):
        (folder / name).write_text("b: 2\n")
    return folder


def git(folder, *words) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("start", ["main", "--detach"])
def test_the_demo_records_what_it_decided_and_nothing_else(root, start):
    git(root, "checkout", "--quiet", start)
    demo._want_branch(root)
    demo._record(root)
    assert git(root, "branch", "--show-current") == "demo"
    assert git(root, "show", "--name-only", "--format=%s|%P", "HEAD").split("\n") == [
        f"{demo.SUBJECT}|{git(root, 'rev-parse', 'main')}", "", "dvc.lock", "params.yaml"]
    assert git(root, "status", "--porcelain") == "?? mine.txt"
    demo._record(root)
    assert git(root, "rev-list", "--count", "HEAD") == "2", "a second demo with the same result records nothing"
    git(root, "checkout", "--quiet", "main")
    (root / "dvc.lock").write_text("c: 3\n")
    demo._want_branch(root)
    demo._record(root)
    assert git(root, "show", "HEAD:dvc.lock") == "c: 3"


def test_a_branch_with_the_users_own_commits_is_not_replaced(root):
    git(root, "branch", "demo")
    with pytest.raises(ConfigError, match=r"it ends with 'start'\n  `git branch -m demo NAME`"):
        demo._want_branch(root)
