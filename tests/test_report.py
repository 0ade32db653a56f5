"""Report pages: whole, offline, escaped, the same bytes."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from stages.lib import report
from stages.lib.report import Section

PNG = b"\x89PNG\r\n\x1a\n not much of one"
JPEG = b"\xff\xd8\xff\xe0 not much of one"
SECTIONS = [
    Section("First <b>", "One & two.\n\nThree.", pl.DataFrame(
        {"name": ["<i>", None], "count": [1, 20], "ratio": [0.5, float("nan")], "yes": [True, False],
         "list": [[1, 2], []]})),
    Section("Second", pictures=(("a \"caption\"", PNG), ("a photo", JPEG), ("a drawing", b"<svg></svg>"))),
    Section("Third", table=pl.DataFrame({"none": pl.Series([], dtype=pl.Float64)}))]


def page(tmp_path: Path, sections: list[Section] = SECTIONS) -> str:
    report.write(tmp_path / "page.html", "A <title> & more", sections)
    return (tmp_path / "page.html").read_text()


class Elements(HTMLParser):
    """The tags of a page with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_same_sections_give_the_same_bytes(tmp_path: Path) -> None:
    report.write(tmp_path / "one.html", "t", SECTIONS)
    report.write(tmp_path / "sub" / "two.html", "t", SECTIONS)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "sub" / "two.html").read_bytes()


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "://" not in text
    elements = Elements(text).found
    links = [value for _, attrs in elements for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert links
    assert all(link.startswith(("data:image/", "#s")) for link in links)
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object", "base"}
    assert "@import" not in text
    policies = [attrs["content"] for _, attrs in elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_what_is_given_is_text_and_never_markup(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "<title>A &lt;title&gt; &amp; more</title>" in text
    assert "<h2>First &lt;b&gt;</h2>" in text
    assert "<p>One &amp; two.</p>\n<p>Three.</p>" in text
    assert "<td>&lt;i&gt;</td>" in text
    assert '<figcaption>a &#34;caption&#34;</figcaption>' in text


def test_numbers_stand_right_and_gaps_are_dashes(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert re.findall(r"<tr>(<td.*)</tr>", text) == [
        '<td>&lt;i&gt;</td><td class="number">1</td><td class="number">0.5000</td><td>yes</td><td>1, 2</td>',
        '<td>–</td><td class="number">20</td><td class="number">–</td><td>no</td><td></td>']


@pytest.mark.parametrize(("values", "cells"), [
    ([1234.567, 0.1], ["1235", "0"]), ([12.345, -1.0], ["12.35", "-1.00"]), ([0.01234, 0.0], ["0.01234", "0.00000"]),
    ([0.0, 0.0], ["0", "0"]), ([float("inf"), 2.5], ["inf", "2.500"]), ([1e-9], ["0.000000"])])
def test_a_column_has_as_many_decimals_as_its_largest_number_needs(values: list[float], cells: list[str],
                                                                  tmp_path: Path) -> None:
    text = page(tmp_path, [Section("s", table=pl.DataFrame({"v": values}))])
    assert re.findall(r'<td class="number">(.*?)</td>', text) == cells


def test_pictures_are_inside_the_page_whole(tmp_path: Path) -> None:
    sources = [attrs["src"] for tag, attrs in Elements(page(tmp_path)).found if tag == "img"]
    kinds, contents = zip(*(source.removeprefix("data:").split(";base64,") for source in sources))
    assert kinds == ("image/png", "image/jpeg", "image/svg+xml")
    assert [base64.b64decode(content) for content in contents] == [PNG, JPEG, b"<svg></svg>"]


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begins with b'hello', expected PNG, JPEG or SVG"):
        page(tmp_path, [Section("s", pictures=(("c", b"hello"),))])
