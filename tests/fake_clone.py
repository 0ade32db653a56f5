"""A clone with manifests as stages and DVC would leave them, for tests that need no stage to run."""

import hashlib
import json
import shutil
from pathlib import Path

import yaml

from stages.harness import DATA_FOLDERS
from stages.lib.digests import canonical
from tests.clones import ROOT, run


class FakeClone:
    """A git repository whose dvc.lock names manifests that lie in DVC's cache; its store is `store`."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder = folder
        for name in ("conf/runner/local.yaml", "conf/store/local.yaml", "dvc.yaml", "params.yaml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "conf/store/local.yaml").write_text(f"root: {store}\n")
        (folder / ".dvc").mkdir()
        (folder / ".dvc/config").touch()
        (folder / ".gitignore").write_text("/data/\n/.dvc/cache/\n/.dvc/tmp/\n")
        run(folder, "git", "init", "--quiet", "-b", "main")

    def git(self, *words: str) -> str:
        """What git prints."""
        return run(self.folder, "git", *words)

    def commit(self, manifests: dict[str, list[dict]]) -> None:
        """A commit whose dvc.lock names these manifests (stage -> rows) alone; they lie in the working tree too."""
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        stages = {}
        for stage, rows in manifests.items():
            path = self.folder / DATA_FOLDERS[stage] / "manifest.jsonl"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"".join(canonical(row) + b"\n" for row in rows))
            listed = json.dumps([{"md5": self.cache(path.read_bytes()), "relpath": "manifest.jsonl"}], sort_keys=True)
            stages[stage] = {"cmd": f"python -m stages {stage}", "outs": [
                {"path": DATA_FOLDERS[stage], "md5": self.cache(listed.encode(), ".dir")}]}
        (self.folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
        self.git("add", "-A")
        self.git("commit", "--quiet", "--allow-empty", "-m", "data")

    def cache(self, data: bytes, suffix: str = "") -> str:
        """Keeps bytes in DVC's cache; their md5."""
        md5 = hashlib.md5(data).hexdigest() + suffix
        path = self.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return md5
