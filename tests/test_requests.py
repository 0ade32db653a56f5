"""What a stage of many scenes asks of a bucket, all requests counted: pages, and what each scene that runs needs."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import harness
from stages.harness import Harness
from stages.lib.stage import Item, Summary
from stages.store import store as module
from stages.store.folder import Folder
from stages.store.store import Store
from tests import memory
from tests.memory import Memory
from tests.test_harness import Knobs, set_gain

NAMES_A_PAGE, DOCUMENTS_A_PAGE, NUM_SCENES = 10, 100, 250


def run_item(cfg, item, inputs, out):
    for file in ("pack", "table"):
        (out / file).write_text(f"{file} of {item.params['n']}")
    return {"n": item.params["n"]}


class Team:
    """A bucket, and a checkout with a stage of many scenes, each with two files; `machine` runs it."""

    def __init__(self, root: Path) -> None:
        self.root, self.bucket, self.machine, self.scenes = root, Memory(), 0, list(range(NUM_SCENES))

    def open_store(self, settings, root, rebuild) -> Store:
        return Store(Folder(self.root / f"machine{self.machine}"), self.bucket, rebuild=rebuild)

    def run(self) -> dict[str, int]:
        """The requests of a run."""
        harness._harness_of_worker.cache_clear()
        self.bucket.requests.clear()
        Harness(self.root).run("ingest")
        return dict(self.bucket.requests)


@pytest.fixture
def team(tmp_path, monkeypatch):
    team = Team(tmp_path)
    stage = SimpleNamespace(
        Knobs=Knobs, INPUTS=(), run=run_item,
        plan=lambda cfg, inputs: [Item(f"{n:04}", {"n": n}, {}) for n in team.scenes],
        collect=lambda cfg, results, out: Summary(len(results), sum(one.facts["n"] >= 0 for one in results), "scenes"))
    monkeypatch.setattr(harness, "module_of", lambda name: stage)
    monkeypatch.setattr(harness.code, "code_digest", lambda *where: "c0de")
    monkeypatch.setattr(harness, "open_store", team.open_store)
    monkeypatch.setattr(Harness, "pins", {})
    monkeypatch.setattr(harness.local, "perform", lambda function, tasks, **how: (
        (index, function(task)) for index, task in enumerate(tasks)))
    monkeypatch.setattr(memory, "PAGE_NAMES", NAMES_A_PAGE)
    for name, value in {"PAGE_DOCUMENTS": DOCUMENTS_A_PAGE, "PAGE_MIN_DOCUMENTS": 20, "PAGES_SOUGHT": 10,
                        "LISTED_AT_ONCE": NAMES_A_PAGE}.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "conf").symlink_to(Path(__file__).parents[1] / "conf")
    set_gain(tmp_path, 1)
    return team


KEPT = {"LIST": 2, "PUT": 2}  # gc/ and pages/ are listed once; the run's record and the clone are noted
PAGES = {"LIST": NUM_SCENES // NAMES_A_PAGE}


def together(*counts: dict[str, int]) -> dict[str, int]:
    return functools.reduce(lambda one, other: {
        name: one.get(name, 0) + other.get(name, 0) for name in one | other}, counts)


def test_a_warm_stage_costs_pages_and_no_request_per_scene(team):
    """100,000 scenes: 100 pages of names (by slices up to 16 more), 5 pages of results, 2 listings and 2 records."""
    team.run()
    made = (team.root / "data/ingest/manifest.jsonl").read_bytes()
    assert team.run() == together(PAGES, KEPT)
    team.machine += 1
    assert team.run() == together(PAGES, KEPT, {"GET": 3}), "another machine reads three pages of results"
    assert team.run() == together(PAGES, KEPT), "and has them then"
    assert (team.root / "data/ingest/manifest.jsonl").read_bytes() == made


def test_a_scene_that_runs_costs_its_files_and_three_puts_and_one_listing(team):
    """Its files, the result document, the action document and the AC entry are put; what it gave is listed."""
    team.run()
    team.scenes[7] = 1000
    assert team.run() == together(PAGES, KEPT, {"PUT": 2 + 3, "LIST": 1 + 1}), "its own and, once more, the pages"
    team.scenes[8:11] = 2000, 2001, 2002
    pages_of_253 = {"LIST": 26}  # the bucket has what the first of them gave, too
    assert team.run() == together(pages_of_253, KEPT, {"PUT": 3 * (2 + 3), "LIST": 3 + 1})


def test_a_first_run_costs_a_scenes_files_and_three_puts_and_one_listing_of_all(team):
    pages = 3
    assert team.run() == together(PAGES, {"LIST": 1}, {"LIST": 2, "PUT": 2}, {"PUT": NUM_SCENES * (2 + 3) + 2 * pages})


def test_results_that_came_few_at_a_time_get_a_page_when_they_are_many(team, monkeypatch):
    monkeypatch.setattr(module, "PAGE_MIN_DOCUMENTS", NUM_SCENES + 1)
    team.run()
    team.scenes.append(1000)
    assert team.run()["PUT"] == 2 + 3 + 2 + 2 * 3, "three pages and their names"
    team.machine += 1
    assert team.run() == together(PAGES, {"LIST": 1}, KEPT, {"GET": 3})
