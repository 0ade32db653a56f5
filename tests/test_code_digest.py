"""The code digest covers what an operation runs, and nothing else."""

import os
import subprocess
import sys
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
        class Knobs(near.Half):
            limit: int = knob("a text")
        def run(cfg: int, out):
            """What it does."""
            # why
            return near.half(_inner(cfg))
        def _inner(cfg):
            return np.abs(cfg) + LIMIT
        def collect(cfg):
            return report.page(cfg)
        ''',
    "stages/lib/near.py": "from stages.lib import far\nclass Half: pass\ndef half(x):\n    return far.two(x)\n",
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
    changed("a text", "another text"),
], ids=["module docstring", "docstring", "comment", "annotation", "collect", "what only collect imports", "spaces",
        "a knob's text"])
def test_what_run_does_not_reach_changes_nothing(digest, change):
    assert digest() == digest(**change)


@pytest.mark.parametrize("change", [
    changed("LIMIT = 3", "LIMIT = 4"), changed("np.abs(cfg)", "np.abs(-cfg)"), changed("near.half", "near.third"),
    changed("x / 2", "x / 3", "stages/lib/far.py"),
], ids=["constant", "helper", "call", "import of an import"])
def test_what_run_reaches_changes_the_digest(digest, change):
    assert digest() != digest(**change)


OP = "def run(cfg):\n    return 1\n"


@pytest.mark.parametrize(("before", "after"), [
    ("class A:\n    def half(self):\n        return 1\ndef run(cfg):\n    return A()\n", ("return 1", "return 2")),
    ("LIMIT = 1\ndef run(cfg):\n    def inner():\n        return LIMIT\n    return inner()\n", ("= 1", "= 2")),
    ("A, B = 1, 2\ndef run(cfg):\n    return B\n", ("1, 2", "1, 3")),
    ("def deco(f):\n    return f\n@deco\ndef run(cfg):\n    return 1\n", ("return f", "return len")),
    ("RULES = []\ndef rule(f):\n    RULES.append(f)\n@rule\ndef first(x):\n    return 1\n"
     "def run(cfg):\n    return RULES\n", ("return 1", "return 2")),
    ("TABLE = {}\nTABLE['a'] = 1\ndef run(cfg):\n    return TABLE\n", ("= 1", "= 2")),
    ("import numpy\nnumpy.seterr(all='raise')\n" + OP, ("raise", "warn")),
    ("try:\n    import numpy as np\nexcept ImportError:\n    np = None\ndef run(cfg):\n    return np\n", ("None", "0")),
    ("if True:\n    LIMIT = 1\ndef run(cfg):\n    return LIMIT\n", ("= 1", "= 2")),
    ("LIMIT = 1\nLIMIT += 1\ndef run(cfg):\n    return LIMIT\n", ("+= 1", "+= 2")),
    ("class Knobs:\n    def half(self):\n        return 1\ndef run(cfg):\n    return cfg.half()\n", ("1", "2")),
    ("LIMIT = 1\nclass Part:\n    def half(self):\n        return LIMIT\nclass Knobs:\n    part: Part\n"
     "def run(cfg):\n    return cfg.part.half()\n", ("= 1", "= 2")),
    ("def run(cfg, limit=1):\n    return limit\n", ("=1", "=2")),
], ids=["method", "nested", "unpacked", "decorator", "register", "item", "side effect", "try", "if", "augmented",
        "knobs", "what knobs reach", "default"])
def test_all_that_python_lets_run_reach_changes_the_digest(digest, before, after):
    assert before.count(after[0]) == 1
    assert digest(stages__op=before) != digest(stages__op=before.replace(*after))


@pytest.mark.parametrize("line", [
    "import stages.lib.far as other", "from stages.lib import far as other", "from stages.lib.far import two as other",
    "from .lib import far as other", "from .lib.far import two as other", "from stages.lib.far import *",
], ids=str)
def test_every_way_to_import_is_followed(digest, line):
    op = f"{line}\ndef run(cfg):\n    return {'two' if '*' in line else 'other'}\n"
    assert digest(stages__op=op) != digest(stages__op=op, **changed("x / 2", "x / 3", "stages/lib/far.py"))
    inside = f"def run(cfg):\n    {line}\n    return other\n"
    assert "*" in line or digest(stages__op=inside) != digest(
        stages__op=inside, **changed("x / 2", "x / 3", "stages/lib/far.py"))


def test_the_digest_does_not_depend_on_the_order_of_sets(digest, tmp_path):
    expected = digest()
    script = ("import sys; from pathlib import Path; from stages.store import code; "
              f"print(code.code_digest(Path(sys.argv[1]), 'stages.op', 'run', {PINS}))")
    for seed in "01":
        ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], text=True, capture_output=True, check=True,
                             env={**os.environ, "PYTHONHASHSEED": seed})
        assert ran.stdout.strip() == expected


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
