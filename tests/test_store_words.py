"""Pins and salt as people type them: what conf/ and params.yaml then say."""

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stages.lib.errors import ConfigError
from stages.tools import config
from stages.tools.cli import app

ROOT = Path(__file__).parents[1]
OLD = "0123456789abcdef" * 4


@pytest.fixture
def root(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    config.write_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store(*words: str) -> str:
    """What `roadmill store WORDS` prints."""
    return CliRunner().invoke(app, ["store", *words], catch_exceptions=False).output


def cache(root: Path) -> dict:
    return yaml.safe_load((root / "params.yaml").read_text())["cache"]


def test_a_pin_stands_in_params_until_it_is_taken_back(root):
    before = (root / "params.yaml").read_text()
    assert f"cache.code_pins.sample={OLD}\n  `roadmill store unpin sample` takes" in store("pin", "sample", OLD)
    assert cache(root) == {"salt": "", "code_pins": {"sample": OLD}}
    store("pin", "ingest", OLD)
    assert store("unpin", "sample") == "sample is no longer pinned\n"
    assert cache(root)["code_pins"] == {"ingest": OLD}
    assert store("unpin", "sample") == "sample is not pinned\n"
    store("unpin", "ingest")
    assert (root / "params.yaml").read_text() == before
    assert "# stage -> older code digest" in (root / "conf/config.yaml").read_text(), "comments are kept"


@pytest.mark.parametrize("word", ["pin", "unpin"])
def test_a_stage_that_is_none_is_named_and_nothing_changes(root, word):
    before = (root / "params.yaml").read_text()
    with pytest.raises(ConfigError, match="'sampel' is not a stage, did you mean sample"):
        store(word, "sampel", *[OLD][:word == "pin"])
    assert (root / "params.yaml").read_text() == before


def test_a_salt_stands_in_params_and_waits_for_an_applied_experiment_to_be_kept(root):
    assert "cache.salt='poisoned'\n" in store("salt", "poisoned")
    assert cache(root) == {"salt": "poisoned", "code_pins": {}}
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace("poisoned", "by hand"))
    with pytest.raises(ConfigError, match=r"not the composition of conf/, so cache\.salt cannot be changed"):
        store("salt", "other")
