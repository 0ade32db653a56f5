"""Where a machine's store is: settings that are right, and what is said of those that are not."""

import configparser
import shutil
from pathlib import Path

import pytest
import yaml

from stages.lib import site
from stages.lib.errors import ConfigError
from stages.store.places import open_store
from stages.tools.programs import say
from stages.tools.share import use

ROOT = Path(__file__).parents[1]
S3 = yaml.safe_load((ROOT / "conf/store/s3.yaml").read_text())


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.delenv("ROADMILL_STORE", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    say(tmp_path, "git", "init", "--quiet")
    say(tmp_path, "dvc", "init", "--quiet")
    return tmp_path


def write(clone: Path, **changes: object) -> None:
    (clone / "conf/store/s3.yaml").write_text(yaml.safe_dump({**S3, **changes}))


def test_every_store_of_conf_loads():
    for path in (ROOT / "conf/store").glob("*.yaml"):
        assert site.read_store(ROOT, path.stem)


def test_the_store_is_local_until_the_team_uses_another_or_the_environment_names_one(clone, monkeypatch):
    assert site.load(clone).store_folder == clone / "data/store"
    use(clone, "s3")
    assert site.load(clone).store.url == S3["url"]
    assert site.load(clone).store_folder == clone / ".roadmill/cache"
    monkeypatch.setenv("ROADMILL_STORE", "local")
    assert site.load(clone).store_folder == clone / "data/store"
    monkeypatch.delenv("ROADMILL_STORE")
    use(clone, "local")
    assert site.load(clone).store_folder == clone / "data/store"


def test_the_bucket_is_said_in_one_place_and_dvc_is_told(clone):
    write(clone, endpoint="http://localhost:9000", region="eu-west-1", sse="AES256")
    use(clone, "s3")
    use(clone, "s3")
    config = configparser.ConfigParser()
    config.read(clone / ".dvc/config")
    assert config["core"]["remote"] == "s3"
    assert dict(config["'remote \"s3\"'"]) == {"url": S3["dvc_remote"], "endpointurl": "http://localhost:9000",
                                               "region": "eu-west-1", "sse": "AES256"}
    write(clone)
    use(clone, "s3")
    config = configparser.ConfigParser()
    config.read(clone / ".dvc/config")
    assert dict(config["'remote \"s3\"'"]) == {"url": S3["dvc_remote"]}


def test_opening_a_store_asks_nothing_of_anybody(clone):
    write(clone, endpoint="http://localhost:1")
    store = open_store(site.read_store(clone, "s3"), clone)
    assert store.shared.where == S3["url"]
    assert store.cache_bytes == 100 * 2**30
    assert not (clone / ".roadmill").exists()


@pytest.mark.parametrize(("changes", "text"), [
    ({"dvc_remote": S3["url"]}, "lie in one another: `dvc gc -c` would delete the scene store"),
    ({"dvc_remote": "s3://my-bucket/roadmill"}, "lie in one another"),
    ({"dvc_remote": S3["url"] + "/dvc"}, "lie in one another"),
    ({"url": "https://my-bucket.s3.amazonaws.com/x"}, "store.url is not s3://bucket/prefix"),
    ({"url": "s3://AKIA:hunter2@my-bucket/x"}, "store.url is not s3://bucket/prefix"),
    ({"endpoint": "http://me:hunter2@localhost:9000"}, "store.endpoint is not http"),
    ({"endpoint": "http://localhost:9000/?sig=hunter2"}, "store.endpoint is not http"),
    ({"aws_secret_access_key": "hunter2"}, "store.aws_secret_access_key does not belong in a file that git keeps"),
    ({"sse": "yes"}, "store.sse is 'yes', expected one of AES256, aws:kms"),
    ({"cache_gib": 0}, "store.cache_gib is 0.0, expected more than 0"),
])
def test_wrong_settings_of_a_store_are_named_without_repeating_a_secret(clone, changes, text):
    write(clone, **changes)
    with pytest.raises(ConfigError) as error:
        site.read_store(clone, "s3")
    assert text in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_store_that_conf_does_not_have_is_named_with_those_it_has(clone):
    with pytest.raises(ConfigError, match=r"the store is called 'S3' \(ROADMILL_STORE\).*conf/store has local, s3"):
        site.read_store(clone, "S3")
