"""Clones of this repository with a small world, for tests that run `dvc repro` as a user does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import yaml

from stages.tools import config

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OUTPUTS = ("data/ingest", "data/curate", "data/split", "data/sample", "data/autolabel", "data/merge", "models",
           "data/evaluate", "results")


def run(folder: Path, *command: str, code: int | None = 0, **environment: str) -> str:
    """What the command printed; asserts its exit code."""
    ran = subprocess.run(command, cwd=folder, env=shell(folder, **environment), text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
    assert code is None or ran.returncode == code, f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stdout}"
    return ran.stdout


def shell(folder: Path, **environment: str) -> dict[str, str]:
    """The environment of a user's shell with this interpreter's programs first and the clone's own code."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ROADMILL_", "DVC_", "PYTEST_"))}
    names = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@localhost", "GIT_COMMITTER_NAME": "t",
             "GIT_COMMITTER_EMAIL": "t@localhost", "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(folder)}
    return {**plain, **names, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment}


def new_clone(folder: Path, knobs: str) -> Path:
    """A commit of the working tree in a repository of its own, with `knobs` (YAML) as its selected experiment."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "conf/experiment/small.yaml").write_text("# @package _global_\n" + knobs)
    config.select(folder, "experiment", "small")
    config.write_params(folder)
    run(folder, "git", "init", "--quiet", "-b", "main")
    commit(folder, "small world")
    return folder


def set_knob(folder: Path, stage: str, knob: str, value: object) -> None:
    """Edits conf/ as a user does, and composes."""
    path = folder / "conf/experiment/small.yaml"
    values = yaml.safe_load(path.read_text())
    values.setdefault(stage, {})[knob] = value
    path.write_text("# @package _global_\n" + yaml.safe_dump(values))
    config.write_params(folder)


def commit(folder: Path, message: str) -> None:
    """Commits all that git sees."""
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "--quiet", "--allow-empty", "-m", message)


def copy(folder: Path, to: Path) -> Path:
    """The clone with all it has made, elsewhere; its store stays its own."""
    shutil.copytree(folder, to, symlinks=True)
    return to


def outputs(folder: Path) -> dict[str, str]:
    """path -> sha256 of every file that stages made, the run record left out."""
    found = {}
    for name in OUTPUTS:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and path.name not in ("run.json", ".gitignore"):
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def counters(folder: Path) -> dict[str, dict]:
    """stage -> its record in results/run.json."""
    return json.loads((folder / "results/run.json").read_text())


def num_rows(folder: Path, table: str = "data/merge/tables/scene.parquet", rev: str | None = None) -> int:
    """Rows of a table of the dataset, on disk or as a commit or experiment has it in DVC's cache."""
    if rev is None:
        return pl.read_parquet(folder / table).height
    lock = yaml.safe_load(run(folder, "git", "show", f"{rev}:dvc.lock"))
    outs = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    (out,) = [path for path in outs if table.startswith(f"{path}/")]
    members = {f"{out}/{one['relpath']}": one["md5"] for one in json.loads(_cached(folder, outs[out]).read_text())}
    return pl.read_parquet(_cached(folder, members[table])).height


def _cached(folder: Path, md5: str) -> Path:
    return folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
