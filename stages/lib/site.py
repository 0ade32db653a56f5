"""The site: where this machine keeps its store and recordings, and how much it works at once.

It says where, never what: nothing of it is in params.yaml, in a manifest or in an action. ROADMILL_STORE and
ROADMILL_RUNNER name files of conf/store and conf/runner, or give the path of another YAML file (default: the team's
store, else local); ROADMILL_SOURCE names the folder or s3://bucket/prefix that recordings are relative to. Relative
paths are taken against the root of the repository, so that an experiment in a temporary folder meets the same store and
recordings.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from stages.lib import knobs
from stages.lib.errors import ConfigError
from stages.lib.knobs import knob
from stages.lib.secrets import NAMED

SOURCES = "data/sources.yaml"


@dataclass(frozen=True)
class FolderStore:
    """conf/store/*.yaml of a store in a folder."""

    root: str = knob("folder of the scene store")


@dataclass(frozen=True)
class BucketStore:
    """conf/store/*.yaml of a store on S3. Credentials come from AWS's own chain, never from here."""

    url: str = knob("s3://bucket/prefix of the scene store")
    dvc_remote: str = knob("s3://bucket/prefix of DVC's remote, neither within `url` nor around it")
    endpoint: str | None = knob("URL of another S3 server; null for AWS")
    region: str | None = knob("region of the bucket; null as AWS's own settings say")
    profile: str | None = knob("profile of ~/.aws/config; null as AWS's own settings say")
    sse: str | None = knob("server-side encryption; null as the bucket does by itself",
                           choices=("AES256", "aws:kms", None))
    sse_kms_key: str | None = knob("key of aws:kms; null for the account's own")
    cache: str = knob("folder where blobs are made and read")
    cache_gib: float = knob("its limit; the least recently used go", above=0)


@dataclass(frozen=True)
class RunnerSite:
    """conf/runner/*.yaml"""

    workers: int | None = knob("worker processes; null for one per core", low=1)
    timeout_s: dict[str, float] = knob("longest time for one item, by stage, or `default`", above=0)


@dataclass(frozen=True)
class Site:
    """Where things are here."""

    root: Path
    store: FolderStore | BucketStore
    workers: int
    timeout_s: dict[str, float]
    sources: dict[str, str]

    def timeout_of(self, stage: str) -> float:
        """Longest time for one item of the stage [s]."""
        return self.timeout_s.get(stage, self.timeout_s["default"])

    @property
    def store_folder(self) -> Path:
        """The store's folder on this machine: all of it, or the cache of one on S3."""
        return self.root / (self.store.root if isinstance(self.store, FolderStore) else self.store.cache)


def load(root: Path) -> Site:
    """The site of this process in the checkout `root`, or in DVC_ROOT, of which it is a copy. Raises ConfigError."""
    root = Path(os.environ.get("DVC_ROOT") or root).resolve()
    store = read_store(root, os.environ.get("ROADMILL_STORE"))
    runner = knobs.load(RunnerSite, _read("runner", os.environ.get("ROADMILL_RUNNER", "local"), root), "runner")
    if "default" not in runner.timeout_s:
        raise ConfigError("runner.timeout_s has no `default`: longest time for one item, in s\n"
                          "  conf/runner/local.yaml shows how; ROADMILL_RUNNER names the file that is read")
    workers = runner.workers or len(os.sched_getaffinity(0))
    return Site(root, store, workers, runner.timeout_s, read_sources(root))


def read_store(root: Path, name: str | None) -> FolderStore | BucketStore:
    """The store that conf/store/NAME.yaml (or another YAML file) describes; of None, the team's. Raises ConfigError."""
    values = _read("store", name or team_store(root) or "local", root)
    secret = next((key for key in _keys(values) if NAMED.search(key)), None)
    if secret:
        raise ConfigError(f"store.{secret} does not belong in a file that git keeps\n"
                          "  credentials come from AWS's own settings: ~/.aws, the environment, a role")
    if "url" not in values:
        return knobs.load(FolderStore, values, "store")
    store = knobs.load(BucketStore, values, "store")
    for knob_, url in (("url", store.url), ("dvc_remote", store.dvc_remote)):
        if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[\w.~-]+)*", url):
            raise ConfigError(f"store.{knob_} is not s3://bucket/prefix\n  correct it in conf/store")
    if store.endpoint and not re.fullmatch(r"https?://[\w.-]+(:\d+)?/?", store.endpoint):
        raise ConfigError("store.endpoint is not http(s)://host:port, without user, password or query\n"
                          "  credentials belong to AWS's own settings: ~/.aws, the environment, a role")
    if f"{store.url}/".startswith(f"{store.dvc_remote}/") or f"{store.dvc_remote}/".startswith(f"{store.url}/"):
        raise ConfigError(f"store.dvc_remote {store.dvc_remote} and store.url {store.url} lie in one another: "
                          "`dvc gc -c` would delete the scene store\n  give each a prefix of its own in conf/store")
    return store


def _keys(values: object) -> Iterator[str]:
    """The keys of a YAML value, and those within."""
    for inner in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _keys(inner)
    if isinstance(values, dict):
        yield from map(str, values)


def team_store(root: Path) -> str | None:
    """The store that `roadmill store use` chose for all clones: DVC's default remote has its name."""
    config = configparser.ConfigParser()
    config.read(root / ".dvc" / "config")
    name = config.get("core", "remote", fallback=None)
    return name if name and (root / "conf" / "store" / f"{name}.yaml").exists() else None


def read_sources(root: Path) -> dict[str, str]:
    """scan -> folder or s3://bucket/prefix that its recordings are relative to; ROADMILL_SOURCE comes first, as ''."""
    env = os.environ.get("ROADMILL_SOURCE")
    named = {"": env, **_known_sources(root)} if env else _known_sources(root)
    return {scan: where.rstrip("/") if is_url(where) else str(root / where) for scan, where in named.items()}


def is_url(where: str) -> bool:
    """Whether this is s3://bucket/prefix, and no folder of this machine."""
    return where.startswith("s3://")


def remember_source(root: Path, scan: str, where: str) -> None:
    """Notes the folder or URL where the recordings of a scan are found from this machine."""
    path, known = root / SOURCES, _known_sources(root)
    known[scan] = str(Path(where).relative_to(root)) if Path(where).is_relative_to(root) else where
    part = root / ".roadmill" / "sources.part"
    for place in (path, part):
        place.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("# where this machine keeps the recordings of each scan; written by `roadmill scan`\n"
                    + yaml.safe_dump(known))
    part.replace(path)


def _known_sources(root: Path) -> dict[str, str]:
    path = root / SOURCES
    remedy = f"remove it; `roadmill scan` writes it again, and ROADMILL_SOURCE does without it: rm {path}"
    return knobs.read(path, remedy) if path.exists() else {}


def _read(group: str, name: str, root: Path) -> dict:
    path = root / name if name.endswith(".yaml") else root / "conf" / group / f"{name}.yaml"
    if not path.exists():
        choices = sorted(found.stem for found in (root / "conf" / group).glob("*.yaml"))
        raise ConfigError(f"the {group} is called {name!r} (ROADMILL_{group.upper()}), but {path} does not exist; "
                          f"conf/{group} has {', '.join(choices)}")
    return knobs.read(path, f"conf/{group}/local.yaml shows what belongs there")
