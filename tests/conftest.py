"""Fixtures that more than one test file needs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.places", "tests.small_world"]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real recordings that ROADMILL_REAL_DATA names."""
    root = os.environ.get("ROADMILL_REAL_DATA")
    if not root:
        pytest.skip("ROADMILL_REAL_DATA is not set: no real recordings on this machine")
    return Path(root).resolve()


@pytest.fixture(scope="session", params=["moto", pytest.param("radosgw", marks=pytest.mark.radosgw)])
def s3_server(request, tmp_path_factory) -> Iterator:
    """A running S3 server; each test that uses it runs on every implementation."""
    from tests.servers import running

    with running(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path_factory):
    """The server, with AWS's own variables set for it and nothing else of this machine's AWS settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nothing = tmp_path_factory.mktemp("aws")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(nothing / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nothing / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    return s3_server
