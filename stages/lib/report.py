"""Report pages: one HTML file that opens offline, tables and pictures inside, the same bytes for the same input."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import polars as pl

_KINDS = ((b"\x89PNG\r\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"<svg", "image/svg+xml"),
          (b"<?xml", "image/svg+xml"))


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order.

    text      plain text; an empty line begins a new paragraph
    table     numbers are right-aligned with as many decimals as the column's largest needs; null and NaN show as a dash
    pictures  (caption, bytes of a PNG, JPEG or SVG)
    """

    title: str
    text: str = ""
    table: pl.DataFrame | None = None
    pictures: tuple[tuple[str, bytes], ...] = ()


def write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """The page at `path`. Everything is escaped, and a content security policy forbids it to load anything."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    page = environment.from_string(_PAGE).render(title=title, style=_STYLE, sections=[
        {"title": section.title, "paragraphs": [p.strip() for p in section.text.split("\n\n") if p.strip()],
         "columns": _columns(section.table),
         "pictures": [(caption, _data_uri(picture)) for caption, picture in section.pictures]}
        for section in sections])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _data_uri(picture: bytes) -> str:
    kind = next((kind for magic, kind in _KINDS if picture.startswith(magic)), None)
    if kind is None:
        raise ValueError(f"a picture of a report begins with {picture[:8]!r}, expected PNG, JPEG or SVG")
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def _columns(table: pl.DataFrame | None) -> list[dict] | None:
    if table is None:
        return None
    return [{"name": column.name, "number": column.dtype.is_numeric(), "cells": _cells(column)} for column in table]


def _cells(column: pl.Series) -> list[str]:
    values = column.to_list()
    if column.dtype.is_float():
        largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
        decimals = min(max(3 - math.floor(math.log10(largest)), 0), 6) if largest else 0
        return ["–" if v is None or math.isnan(v) else f"{v:.{decimals}f}" for v in values]
    return [_cell(value) for value in values]


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value)


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5a6675; --paper: #ffffff; --line: #d9dfe6; --band: #f4f6f9;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #9aa7b5; --paper: #14181d; --line: #333c47;
  --band: #1c2229; --link: #74b6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
nav { color: var(--soft); font-size: .9rem; }
nav a { color: var(--link); margin-right: 1rem; white-space: nowrap; }
p { max-width: 48rem; margin: .5rem 0; white-space: pre-line; }
.scroll { overflow-x: auto; max-height: 40rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--band); font-weight: 600; }
tr:hover td { background: var(--band); }
.number { text-align: right; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: .5rem 0; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .25rem; }
@media print { .scroll { max-height: none; overflow: visible; } nav { display: none; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if sections | length > 2 %}
<nav>{% for section in sections %}<a href="#s{{ loop.index }}">{{ section.title }}</a> {% endfor %}</nav>
{% endif %}
{% for section in sections %}
<section id="s{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% if section.columns is not none %}
<div class="scroll"><table>
<thead><tr>
{% for column in section.columns %}
<th{% if column.number %} class="number"{% endif %}>{{ column.name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in range(section.columns[0].cells | length if section.columns else 0) %}
<tr>
{%- for column in section.columns -%}
<td{% if column.number %} class="number"{% endif %}>{{ column.cells[row] }}</td>
{%- endfor -%}
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if section.pictures %}
<div class="pictures">
{% for caption, uri in section.pictures %}
<figure><img src="{{ uri }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""
