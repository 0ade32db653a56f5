"""A wrong key or value is one line with what was expected."""

from dataclasses import dataclass

import pytest

from stages.lib import knobs
from stages.lib.errors import ConfigError
from stages.lib.knobs import knob


@dataclass(frozen=True)
class Inner:
    size_m: tuple[float, ...] = knob("sizes", above=0)


@dataclass(frozen=True)
class Knobs:
    rate_hz: float = knob("rate of key frames", above=0, high=30)
    mode: str = knob("how", choices=("fast", "exact"))
    workers: int | None = knob("how many", low=1, in_key=False)
    inner: dict[str, Inner] = knob("parts")


GOOD = {"rate_hz": 2, "mode": "fast", "workers": None, "inner": {"a": {"size_m": [1, 2.5]}}}


def test_values_become_the_declared_types():
    cfg = knobs.load(Knobs, GOOD, "sample")
    assert cfg == Knobs(2.0, "fast", None, {"a": Inner((1.0, 2.5))})
    assert isinstance(cfg.rate_hz, float)


def test_what_is_not_in_the_key_is_left_out():
    assert set(knobs.keyed(knobs.load(Knobs, GOOD, "sample"))) == {"rate_hz", "mode", "inner"}


@pytest.mark.parametrize(("change", "text"), [
    ({"rate": 2}, "sample.rate is not a knob, did you mean rate_hz?; knobs: rate_hz, mode, workers, inner"),
    ({"rate_hz": "fast"}, "sample.rate_hz is 'fast', expected float: rate of key frames"),
    ({"rate_hz": 0}, "sample.rate_hz is 0.0, expected more than 0: rate of key frames"),
    ({"rate_hz": 31}, "sample.rate_hz is 31.0, expected at most 30: rate of key frames"),
    ({"rate_hz": True}, "sample.rate_hz is True, expected float: rate of key frames"),
    ({"mode": "fat"}, "sample.mode is 'fat', expected one of fast, exact, did you mean fast?"),
    ({"workers": 0}, "sample.workers is 0, expected at least 1: how many"),
    ({"workers": False}, "sample.workers is False, expected int: how many"),
    ({"inner": 3}, "sample.inner is 3, expected mapping: parts"),
    ({"inner": {"a": {"size_m": [1, -1]}}}, r"sample.inner.a.size_m[1] is -1.0, expected more than 0: sizes"),
    ({"inner": {"a": {}}}, "sample.inner.a.size_m is missing: sizes\n  set it in conf/ and run `roadmill compose`"),
])
def test_a_wrong_knob_says_what_was_expected(change, text):
    with pytest.raises(ConfigError) as error:
        knobs.load(Knobs, {**GOOD, **change}, "sample")
    assert str(error.value) == text


def test_the_order_of_a_mapping_changes_nothing():
    """Neither DVC nor an action's key sees it."""
    @dataclass(frozen=True)
    class Ranges:
        range_m: dict[str, float] = knob("by class")

    one, other = ({"range_m": dict(pairs)} for pairs in ([("b", 2.0), ("a", 1.0)], [("a", 1.0), ("b", 2.0)]))
    assert list(knobs.load(Ranges, one, "x").range_m) == list(knobs.load(Ranges, other, "x").range_m) == ["a", "b"]
