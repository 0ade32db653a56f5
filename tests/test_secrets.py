"""What only the environment may know stands in no log, no file and no error text, whatever fails."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from stages.lib import secrets, site
from stages.lib.errors import ConfigError
from stages.sim.sensors import Spec
from stages.sim.simulate import simulate
from tests import clones
from tests.clones import run
from tests.servers import running

ROOT = Path(__file__).parents[1]
S3 = yaml.safe_load((ROOT / "conf/store/s3.yaml").read_text())
PASSWORD, SIGNATURE = "Pw-of-the-proxy-77", "5ignature0f0neLink"
LINK = f"https://anna:{PASSWORD}@store.example:9000/drives?X-Amz-Credential=AKIA%2F1&X-Amz-Signature={SIGNATURE}"
SESSION, KEY = "FwoGZXIvYXdzEPr//session+token==", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
ENVIRONMENT = {"AWS_SECRET_ACCESS_KEY": KEY, "AWS_SESSION_TOKEN": SESSION, "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
               "AWS_DEFAULT_REGION": "us-east-1", "ROADMILL_SOURCE": LINK}
KNOBS = "curate: {scene_s: 1.0, min_scene_s: 1.0, rules: {moving: null}}\n"
COARSE = Spec(width_px=96, height_px=54, num_beams=16, num_azimuths=360)
HIDDEN = (KEY, SESSION, PASSWORD, SIGNATURE)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> Path:
    """A clone in which six short drives were scanned."""
    folder = clones.new_clone(tmp_path_factory.mktemp("secrets"), KNOBS)
    shutil.rmtree(folder / "tests")  # this file names the secrets
    simulate(folder / "data/raw/bags", len(FAULTS), 2.0, 0, workers=2, spec=COARSE)
    run(folder, "roadmill", "scan", "data/raw/bags", "--rig", "sim")
    return folder


@pytest.fixture
def clone(scanned, tmp_path) -> Path:
    """A copy of it."""
    return clones.copy(scanned, tmp_path / "clone")


def typed(folder: Path, *command: str, **environment: str) -> str:
    """What a command printed, that may fail; asserts that neither it nor any file of the folder has a secret."""
    text = run(folder, *command, code=None, **{**ENVIRONMENT, **environment})
    secret = [value for value in (*HIDDEN, environment.get("AWS_SECRET_ACCESS_KEY", KEY)) if value in text]
    assert not secret, text
    assert not list(leaks(folder, environment.get("AWS_SECRET_ACCESS_KEY", KEY)))
    return text


def leaks(folder: Path, *more: str) -> list[Path]:
    """Files of the folder that hold a secret."""
    wanted = [value.encode() for value in (*HIDDEN, *more)]
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(value in path.read_bytes() for value in wanted):
            found.append(path)
    return found


def plant(folder: Path, stage: str, statements: list[str]) -> None:
    """Makes the stage's `run` begin with the statements; what they quote comes from the environment."""
    path = folder / f"stages/{stage}.py"
    tree = ast.parse(path.read_text())
    (run_,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    run_.body[:0] = ast.parse("import os\n" + "\n".join(statements)).body
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))


LINK_, KEY_, SESSION_ = (f"os.environ['{name}']" for name in
                         ("ROADMILL_SOURCE", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
FAULTS = [f"raise __import__('stages.lib.errors').lib.errors.DataError('no drive at ' + {LINK_} + {KEY_})",
          f"raise RuntimeError({LINK_} + ' answered ' + {KEY_})",
          f"raise PermissionError(13, 'denied', {LINK_})",
          f"raise ValueError({SESSION_}) from OSError({LINK_} + {KEY_})",
          f"raise type('Odd', (Exception,), {{}})({LINK_} + {KEY_})",
          f"raise SystemExit({SESSION_})"]


def test_what_succeeds_keeps_no_secret(clone):
    assert "6 recordings -> 6 drives" in typed(clone, sys.executable, "-m", "stages", "ingest")
    assert "split" not in typed(clone, sys.executable, "-m", "stages", "curate")
    assert (clone / "results/run.json").exists()
    assert list(clone.glob("data/store/runs/*/*.json"))
    for words in (("doctor",), ("explain", "drive_0000")):
        typed(clone, "roadmill", *words)


@pytest.mark.parametrize("traceback", ["", "1"], ids=["lines", "traceback"])
def test_what_fails_in_a_worker_tells_no_secret(clone, traceback):
    faults = [f"if item.name == 'drive_{number:04}': {fault}" for number, fault in enumerate(FAULTS)]
    plant(clone, "ingest", faults)
    text = typed(clone, sys.executable, "-m", "stages", "ingest", ROADMILL_TRACEBACK=traceback)
    assert len(re.findall(r"^ingest: drive_000\d: .*\*\*\*", text, re.MULTILINE)) == len(FAULTS)
    assert ("Traceback" in text) or not traceback


@pytest.mark.parametrize("fault", FAULTS[:3], ids=["ours", "a bug", "the disk"])
def test_what_fails_in_a_stage_tells_no_secret(clone, fault):
    typed(clone, sys.executable, "-m", "stages", "ingest")
    plant(clone, "curate", [fault])
    text = typed(clone, sys.executable, "-m", "stages", "curate", ROADMILL_TRACEBACK="1")
    assert "Traceback" in text
    assert secrets.HIDDEN in text


def test_a_recording_that_is_not_there_is_told_without_the_link(clone):
    shutil.rmtree(clone / "data/raw")
    text = typed(clone, sys.executable, "-m", "stages", "ingest", ROADMILL_TRACEBACK="1")
    assert "is not on this machine: " in text
    assert "set ROADMILL_SOURCE to the folder" in text


@pytest.mark.parametrize("words", [("scan", LINK, "--rig", "sim"), ("upload", "data/raw", LINK), ("export", LINK),
                                   ("store", "copy", "local", LINK), ("lineage", LINK), ("fetch",)],
                         ids=lambda words: " ".join(words[:2])[:10].strip())
def test_words_that_get_a_link_do_not_repeat_it(scanned, words):
    text = typed(scanned, "roadmill", *words, ROADMILL_TRACEBACK="1", ROADMILL_STORE=LINK)
    assert "Traceback" in text, "it failed, and said all it may"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running("moto", tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.mark.parametrize("case", ["right", "wrong key", "no bucket", "no server"])
def test_a_store_on_s3_keeps_and_tells_no_secret(clone, server, case):
    bucket = server.make_bucket() if case != "no bucket" else "never-made"
    endpoint = server.endpoint if case != "no server" else "http://127.0.0.1:9"
    settings = {**S3, "url": f"s3://{bucket}/team/store", "dvc_remote": f"s3://{bucket}/team/dvc", "endpoint": endpoint}
    (clone / "conf/store/s3.yaml").write_text(yaml.safe_dump(settings))
    shell = {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret, "AWS_SESSION_TOKEN": "",
             "ROADMILL_SOURCE": "", "ROADMILL_STORE": "s3"}
    if case == "wrong key":
        shell |= {"AWS_SECRET_ACCESS_KEY": KEY}
    for command in ((sys.executable, "-m", "stages", "ingest"), ("roadmill", "doctor")):
        typed(clone, *command, **shell, ROADMILL_TRACEBACK="1")
    if case == "right":
        client = server.client()
        for row in client.list_objects_v2(Bucket=bucket)["Contents"]:
            body = client.get_object(Bucket=bucket, Key=row["Key"])["Body"].read()
            assert server.secret.encode() not in body + row["Key"].encode()


# conf/store -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [
    {"aws_secret_access_key": KEY}, {"credentials": {"aws_session_token": SESSION}}, {"password": PASSWORD},
    {"cache": {"secret": KEY}}, {"url": f"s3://anna:{PASSWORD}@bucket/store"}, {"endpoint": LINK},
    {"endpoint": f"https://anna:{PASSWORD}@store.example"}, {"endpoint": f"https://store.example?sig={SIGNATURE}"},
    {"dvc_remote": f"s3://bucket/dvc?X-Amz-Signature={SIGNATURE}"}], ids=lambda change: next(iter(change)))
def test_a_store_with_credentials_is_refused_without_repeating_them(tmp_path, change):
    (tmp_path / "s3.yaml").write_text(yaml.safe_dump({**S3, **change}))
    with pytest.raises(ConfigError, match=r"store\.\w+ (does not belong in a file that git keeps|is not )") as found:
        site.read_store(tmp_path, "s3.yaml")
    assert not [value for value in HIDDEN if value in str(found.value)]


def test_a_store_file_that_is_no_yaml_mapping_is_not_repeated(tmp_path):
    (tmp_path / "s3.yaml").write_text(f"aws_secret_access_key={KEY}\n")
    with pytest.raises(ConfigError, match=r"s3\.yaml holds str, expected sections") as found:
        site.read_store(tmp_path, "s3.yaml")
    assert KEY not in str(found.value)


# redacted -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "kept"), [
    (LINK, "https://***@store.example:9000/drives?***"),
    (f"GET {LINK} failed", "GET https://***@store.example:9000/drives?*** failed"),
    (f"path '/a?X-Amz-Signature={SIGNATURE}&x=1'", "path '/a?X-Amz-Signature=***&x=1'"),
    ("s3://bucket/prefix/cas/ab/abcd", "s3://bucket/prefix/cas/ab/abcd"),
    ("`git config user.email YOU@HOST` and 10.5 m/s", "`git config user.email YOU@HOST` and 10.5 m/s"),
    (f"key {KEY}.", "key ***."), ("token wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCYEXAMPLEKEY", "token ***"),
    ("https://token-alone@host/x", "https://***@host/x"),
    (f"/conf/{Path(LINK)}", "/conf/https:/***@store.example:9000/drives?***")])
def test_a_text_keeps_all_but_its_secrets(monkeypatch, text, kept):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    assert secrets.redacted(text) == kept


def test_short_values_are_words(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "ingest")
    assert secrets.redacted("ingest failed") == "ingest failed"


def test_the_environment_of_programs_is_not_printed():
    """A law: no module prints or keeps os.environ as a whole."""
    for path in (ROOT / "stages").rglob("*.py"):
        assert not re.search(r"(print|dumps|repr|str)\((dict\()?os\.environ\)?", path.read_text()), path
