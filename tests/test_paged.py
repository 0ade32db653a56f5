"""Long listings: everything once, in few pages, whatever the names."""

import pytest

from stages.store.objects import Listed
from stages.store.paged import every_page

FULL = 10


def listing(names: list[str]) -> tuple[list, list]:
    """A fake server's page(after), and the list of its calls."""
    names, calls = sorted(names), []

    def page(after: str | None) -> list[Listed]:
        calls.append(after)
        return [Listed(name, 0, 0.0) for name in names if after is None or name > after][:FULL]

    return page, calls


@pytest.mark.parametrize("names", [
    [], ["p/a"], [f"p/{i:02d}" for i in range(FULL)], [f"p/{i:02d}" for i in range(FULL + 1)],
    [f"p/{i * 7 % 256:02x}/{i:04x}.r" for i in range(700)], [f"p/{i:04x}" for i in range(0, 65536, 300)],
    [f"p/0{i:03x}/x" for i in range(300)], [f"p/f{i:03x}/x" for i in range(300)],
    [f"p/{i:02x}/k" for i in range(30)] + ["p/zz/1", "p/readme", "p/3", "p/f"], [f"p/scene-{i}" for i in range(95)],
    [f"p/drive {i}/räder.bag" for i in range(25)],
], ids=lambda names: f"{len(names)}")
def test_every_name_comes_exactly_once(names):
    page, _ = listing(names)
    assert sorted(found.name for found in every_page(page, "p/", FULL)) == sorted(names)


def test_slices_cost_at_most_one_page_each_more_than_one_after_another():
    names = [f"p/{i * 40503 % 65536:04x}" for i in range(5000)]
    page, calls = listing(names)
    assert len(list(every_page(page, "p/", FULL))) == 5000
    assert 500 <= len(calls) <= 500 + 17


def test_a_short_first_page_is_the_only_request():
    page, calls = listing([f"p/{i:02x}" for i in range(FULL - 1)])
    list(every_page(page, "p/", FULL))
    assert calls == [None]


def test_names_that_are_no_digests_follow_one_another_without_waste():
    page, calls = listing([f"p/drive-{i:03d}" for i in range(95)])
    list(every_page(page, "p/", FULL))
    assert len(calls) == 10


def test_a_failing_slice_is_raised_and_a_listing_may_be_left_early():
    page, _ = listing([f"p/{i:04x}" for i in range(0, 65536, 100)])

    def broken(after):
        if after and after.startswith("p/a"):
            raise OSError("slice a")
        return page(after)

    with pytest.raises(OSError, match="slice a"):
        list(every_page(broken, "p/", FULL))
    one = every_page(page, "p/", FULL)
    for _ in range(FULL + 1):
        next(one)
    one.close()  # returns, and so do its threads
