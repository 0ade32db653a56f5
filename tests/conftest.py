"""Fixtures that more than one test file needs."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.small_world"]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real recordings that ROADMILL_REAL_DATA names."""
    root = os.environ.get("ROADMILL_REAL_DATA")
    if not root:
        pytest.skip("ROADMILL_REAL_DATA is not set: no real recordings on this machine")
    return Path(root).resolve()
