"""The checkout that a command is given in, and git and DVC as programs: what they print, or why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stages.lib.errors import ConfigError

PROGRAMS = {"git": ["git"], "dvc": [sys.executable, "-m", "dvc"]}


def checkout() -> Path:
    """The repository that the working directory is in. Raises ConfigError."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists():
            return folder
    raise ConfigError(f"{here} is not in a Roadmill repository: no dvc.yaml here or above\n  `cd` into your clone")


def say(root: Path, program: str, *words: str) -> str:
    """What `git` or this environment's `dvc` prints. Raises ConfigError where it fails."""
    try:
        ran = subprocess.run([*PROGRAMS[program], *words], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"{program} is not installed\n  `apt install {program}`") from None
    if ran.returncode:
        told = " ".join((ran.stderr or ran.stdout).split())
        raise ConfigError(f"`{program} {' '.join(words)[:100]}` failed: {told[-400:]}\n"
                          "  `roadmill doctor` looks for the cause")
    return ran.stdout.strip()


def has_identity(root: Path) -> bool:
    """Whether git knows who commits."""
    return subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], cwd=root, capture_output=True).returncode == 0
