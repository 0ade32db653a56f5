"""The code digest covers what an operation runs, and nothing else."""

import textwrap

import pytest

from stages.lib.errors import ConfigError
from stages.store import code

PINS = {"numpy": "1.26.4", "polars": "2.1.0"}
FILES = {
    "stages/__init__.py": "",
    "stages/lib/__init__.py": "",
    "stages/op.py": '''
        """An operation."""
        from __future__ import annotations
        import numpy as np
        from stages.lib import near, report
        LIMIT = 3
        def run(cfg: int, out):
            """What it does."""
            # why
            return near.half(_inner(cfg))
        def _inner(cfg):
            return np.abs(cfg) + LIMIT
        def collect(cfg):
            return report.page(cfg)
        ''',
    "stages/lib/near.py": "from stages.lib import far\ndef half(x):\n    return far.two(x)\n",
    "stages/lib/far.py": "def two(x):\n    return x / 2\n",
    "stages/lib/report.py": "import polars\ndef page(x):\n    return x\n",
}


@pytest.fixture
def digest(tmp_path):
    def of(pins=PINS, **changes):
        changed_files = {name.replace("__", "/") + ".py": text for name, text in changes.items()}
        for path, text in {**FILES, **changed_files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(textwrap.dedent(text))
        code._parse.cache_clear()
        return code.code_digest(tmp_path, "stages.op", "run", pins)
    return of


def changed(old: str, new: str, path: str = "stages/op.py") -> dict[str, str]:
    assert old in FILES[path]
    return {path.removesuffix(".py").replace("/", "__"): FILES[path].replace(old, new)}


@pytest.mark.parametrize("change", [
    changed('"""An operation."""', '"""Another text."""'), changed('"""What it does."""', '"""Told better."""'),
    changed("# why", "# because"), changed("cfg: int", "cfg: float"),
    changed("report.page(cfg)", "report.page(cfg, 2)"),
    changed("return x", "return x + 1", "stages/lib/report.py"), changed("LIMIT = 3", "LIMIT  =  3"),
], ids=["module docstring", "docstring", "comment", "annotation", "collect", "what only collect imports", "spaces"])
def test_what_run_does_not_reach_changes_nothing(digest, change):
    assert digest() == digest(**change)


@pytest.mark.parametrize("change", [
    changed("LIMIT = 3", "LIMIT = 4"), changed("np.abs(cfg)", "np.abs(-cfg)"), changed("near.half", "near.third"),
    changed("x / 2", "x / 3", "stages/lib/far.py"),
], ids=["constant", "helper", "call", "import of an import"])
def test_what_run_reaches_changes_the_digest(digest, change):
    assert digest() != digest(**change)


def test_a_version_counts_where_the_package_is_used(digest):
    assert digest() != digest(pins={**PINS, "numpy": "1.26.5"})
    assert digest() == digest(pins={**PINS, "polars": "2.2.0"})


def test_an_unpinned_package_is_an_error(digest):
    with pytest.raises(ConfigError, match="numpy is imported by a stage but not pinned"):
        digest(pins={})


def test_pins_are_read_without_local_part_marker_or_comment(tmp_path):
    (tmp_path / "c.txt").write_text("# pins\nTorch==2.13.0+cpu\nruamel.yaml==0.19 ; python_version > '3'\n\n")
    assert code.read_pins(tmp_path / "c.txt") == {"torch": "2.13.0", "ruamel-yaml": "0.19"}


def test_another_installed_version_is_refused():
    with pytest.raises(ConfigError, match=r"numpy \S+ is installed, constraints.txt pins 0.1(.|\n)*pip install -c"):
        code.check_installed({"numpy": "0.1"})
