"""Knobs: the types and ranges of a stage's settings. Values live in YAML; there are no defaults in code."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.lib.errors import ConfigError


def knob(doc: str, *, low: float | None = None, high: float | None = None, above: float | None = None,
         choices: tuple[Any, ...] = (), in_key: bool = True) -> Any:
    """A dataclass field with its meaning and range.

    low, high  inclusive bounds; above is an exclusive lower one. For a tuple or dict they hold for each value.
    in_key     False for what only `plan` and `collect` read: changing it re-runs no item
    """
    return dataclasses.field(metadata={
        "doc": doc, "low": low, "high": high, "above": above, "choices": choices, "in_key": in_key})


def load(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of the frozen dataclass `cls` from plain YAML values; `where` is the dotted prefix used in messages.

    Raises ConfigError for an unknown, missing, ill-typed or out-of-range knob, with what was expected.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {values!r}, expected a section with the knobs {_names(cls)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}.{name} is not a knob{near_miss(str(name), fields)}; knobs: {_names(cls)}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is missing: {fields[missing[0]].metadata.get('doc', '')}\n"
                          "  set it in conf/ and run `roadmill compose`")
    return cls(**{name: _convert(hints[name], values[name], f"{where}.{name}", field.metadata)
                  for name, field in fields.items()})


def read(path: Path, remedy: str) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError, ending in `remedy`, where it is missing, damaged or empty."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist\n  {remedy}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}{f', line {where.line + 1}' if where else ''}: not YAML, "
                          f"{getattr(error, 'problem', None) or error}\n  {remedy}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {'nothing' if values is None else type(values).__name__}, expected sections\n"
                          f"  {remedy}")
    return values


def keyed(cfg: Any) -> dict[str, Any]:
    """The knobs that are part of an action's key, as plain JSON values."""
    plain = dataclasses.asdict(cfg)
    return {f.name: plain[f.name] for f in dataclasses.fields(cfg) if f.metadata.get("in_key", True)}


def near_miss(name: str, known: typing.Iterable[str]) -> str:
    """', did you mean x?' where a known name is close, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _convert(hint: Any, value: Any, where: str, meta: Mapping[str, Any]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        return _convert(inner[0], value, where, meta)
    if dataclasses.is_dataclass(hint):
        return load(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise ConfigError(f"{where} has {len(value)} values, expected {len(args)}: {meta.get('doc', '')}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(kind, v, f"{where}[{i}]", meta) for i, (kind, v) in enumerate(zip(kinds, value)))
    if origin is dict and isinstance(value, Mapping):
        # sorted: neither DVC nor an action's key sees the order of a mapping, so no result may hang on it
        return {str(k): _convert(args[1], v, f"{where}.{k}", meta) for k, v in sorted(value.items(), key=str)}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if origin is not None or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kind = hint.__name__ if origin is None else {tuple: "list", dict: "mapping"}.get(origin, str(hint))
        raise ConfigError(f"{where} is {value!r}, expected {kind}: {meta.get('doc', '')}")
    _check_range(value, where, meta)
    return value


def _check_range(value: Any, where: str, meta: Mapping[str, Any]) -> None:
    if meta.get("choices") and value not in meta["choices"]:
        wanted = ", ".join(map(str, meta["choices"]))
        hint = near_miss(str(value), map(str, meta["choices"]))
        raise ConfigError(f"{where} is {value!r}, expected one of {wanted}{hint}")
    bounds = [(meta.get("low"), "at least", lambda v, b: v >= b), (meta.get("above"), "more than", lambda v, b: v > b),
              (meta.get("high"), "at most", lambda v, b: v <= b)]
    for bound, words, holds in bounds:
        if bound is not None and isinstance(value, (int, float)) and not holds(value, bound):
            raise ConfigError(f"{where} is {value!r}, expected {words} {bound:g}: {meta.get('doc', '')}")
