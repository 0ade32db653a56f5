"""Long listings in slices at once: pages follow one another only within a slice."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from stages.store.objects import Listed

DIGITS = "0123456789abcdef"
PAGES_AHEAD = 32  # fetched and not yet asked for


def every_page(page: Callable[[str | None], list[Listed]], prefix: str, full: int) -> Iterator[Listed]:
    """All objects under the prefix, in any order.

    page(after)  the first of them by name that come after `after`, at most `full`; fewer mean that no more follow

    Where the first page is full and its names go on in hex digits, as digests do, the others come from one slice for
    each first digit, side by side. Each slice may cost one page that reaches into the next.
    """
    first = page(None)
    yield from first
    if len(first) < full:
        return
    last = first[-1].name
    starts = [last]
    if all(re.match(r"[0-9a-f]{2,}(/|\.|$)", found.name[len(prefix):]) for found in first):
        starts += [start for digit in DIGITS if (start := prefix + digit) > last]
    stops = [*starts[1:], None]
    yield from _side_by_side([_slice(page, start, stop, full) for start, stop in zip(starts, stops, strict=True)])


def _slice(page: Callable[[str | None], list[Listed]], start: str, stop: str | None,
           full: int) -> Iterator[list[Listed]]:
    """The pages of names after `start` up to `stop` itself, which the next slice leaves out."""
    while True:
        found = page(start)
        inside = [one for one in found if stop is None or one.name <= stop]
        yield inside
        if len(found) < full or len(inside) < len(found):
            return
        start = found[-1].name


def _side_by_side(slices: list[Iterator[list[Listed]]]) -> Iterator[Listed]:
    """What all slices give, each in a thread of its own; an error of one is raised here."""
    ready: queue.Queue = queue.Queue(PAGES_AHEAD)
    stopped = threading.Event()

    def put(item: list[Listed] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:  # whoever reads is slow, or has left: then `stopped` is set
                continue

    def fetch(pages: Iterator[list[Listed]]) -> None:
        try:
            for found in pages:
                if stopped.is_set():
                    return
                put(found)
            put(None)
        except BaseException as error:
            put(error)

    with ThreadPoolExecutor(len(slices), thread_name_prefix="list") as threads:
        for pages in slices:
            threads.submit(fetch, pages)
        try:
            running = len(slices)
            while running:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                running -= item is None
                yield from item or ()
        finally:
            stopped.set()
