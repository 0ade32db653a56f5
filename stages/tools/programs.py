"""git and DVC as programs: what they print, or an error that says why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stages.lib.errors import ConfigError

PROGRAMS = {"git": ["git"], "dvc": [sys.executable, "-m", "dvc"]}


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
