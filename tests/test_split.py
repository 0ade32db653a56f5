"""The laws of the split."""

import json
from itertools import combinations

import numpy as np
import polars as pl
import pytest
import yaml
from scipy.spatial import cKDTree

from stages import split
from stages.lib import knobs, places, tables
from stages.lib.errors import ConfigError, DataError
from stages.lib.features import rows_of
from stages.lib.stage import Out, Upstream

START_US = 1_700_000_000_000_000
S = 1_000_000
QUOTAS = {"train": 0.6, "val": 0.25, "test": 0.15}


def drive(name, path, start_s=0.0, num_scenes=1, **other):
    """A drive of scenes of 10 s each, along path (N, 2) [m] at even speed."""
    start_us = START_US + round(start_s * S)
    row = {"drive_token": tables.token("drive", name), "drive_name": name,
           "recording_digest": tables.token("recording", name) * 2, "rig": "sim", "vehicle": "car_1",
           "location": "north", "georeferenced": True, "start_us": start_us,
           "end_us": start_us + num_scenes * 10 * S, **other}
    t = np.arange(0, num_scenes * 100 + 1) / (num_scenes * 100)
    xy = np.stack([np.interp(t, np.linspace(0, 1, len(path)), np.asarray(path, float)[:, axis]) for axis in (0, 1)], -1)
    motion = pl.DataFrame({
        "drive_token": [row["drive_token"]] * len(t), "stamp_us": start_us + np.arange(len(t)) * S // 10,
        "x_m": xy[:, 0], "y_m": xy[:, 1], **{name: np.zeros(len(t)) for name in list(tables.MOTION)[4:]}},
        schema=tables.MOTION)
    scenes = [{"scene_token": tables.token("scene", row["drive_token"], at), "scene_name": f"{name}-{at}",
               "drive_token": row["drive_token"], "drive_name": name, "start_us": at, "end_us": at + 10 * S}
              for at in range(start_us, row["end_us"], 10 * S)]
    return row, motion, scenes


def at(x, y=0.0):
    """A path of 8 m around (x, y)."""
    return [(x - 4, y), (x + 4, y)]


def apart(num, **other):
    """Drives of one scene each, one after the other in time, 1 km between them."""
    return [drive(f"d{i:02d}", at(1000 * i), 100 * i, **other) for i in range(num)]


@pytest.fixture
def write(tmp_path):
    count = iter(range(10_000))

    def write_(drives):
        ingest, curate = (tmp_path / f"in{next(count)}" / name for name in ("ingest", "curate"))
        tables.write(tables.frame([d[0] for d in drives], tables.DRIVES), ingest / "drives.parquet")
        tables.write(pl.concat([d[1] for d in drives]), ingest / "motion.parquet")
        tables.write(tables.frame([row for d in drives for row in d[2]], tables.SCENES), curate / "scenes.parquet")
        return {"ingest": Upstream(ingest), "curate": Upstream(curate)}
    return write_


@pytest.fixture
def run(tmp_path, write):
    """run(drives, …) -> (Summary, folder of the data); `of` reads a drive's splits from it."""
    count = iter(range(10_000))

    def run_(drives, quotas=None, cell_m=50.0, group_s=300.0):
        out = Out(*(tmp_path / f"out{next(count)}" / name for name in ("data", "results")))
        for folder in (out.data, out.results):
            folder.mkdir(parents=True)
        return split.run(split.Knobs(quotas or QUOTAS, cell_m, group_s), write(drives), out), out.data
    return run_


def of(data):
    """drive name -> the splits of its scenes in order of time, None for a dropped one."""
    found = pl.concat([tables.read(data / f"{name}.parquet") for name in ("scenes", "dropped")], how="diagonal")
    return {name: rows["split"].to_list() for (name,), rows in
            found.sort("drive_name", "start_us").group_by("drive_name", maintain_order=True)}


HALVES = {"train": 0.5, "val": 0.5}


def test_a_drive_apart_from_all_others_joins_the_split_furthest_below_its_quota(run):
    summary, data = run(apart(8))
    # shares before each: -, t 1, t .5 v .5, then thirds, t .5, t .6, t .5 v .33, t .57 v .29 e .14 (t .03 below)
    assert [splits[0] for splits in of(data).values()] == ["train", "val", "test", "train", "train", "val", "train",
                                                           "train"]
    assert (summary.num_in, summary.num_out, summary.dropped) == (8, 8, {})
    assert summary.notes[0] == "train 5, val 2, test 1"


def test_the_quota_counts_scenes_not_drives(run):
    long, *short = [drive("long", [(0, 0), (900, 0)], 0, num_scenes=9), *apart(12)[2:]]
    _, data = run([long, *short], {"train": 0.5, "val": 0.5})
    counts = tables.read(data / "scenes.parquet")["split"].value_counts().sort("split").rows()
    assert counts == [("train", 10), ("val", 9)]
    assert of(data)["d11"] == ["train"]


def test_a_drive_joins_the_split_of_the_cells_it_shares_whatever_the_quota(run):
    _, data = run([*apart(2), *(drive(f"again{i}", at(0), 1000 + i) for i in range(5))], HALVES)
    assert {name: splits[0] for name, splits in of(data).items() if splits[0] == "train"}.keys() == {
        "d00", *(f"again{i}" for i in range(5))}


def test_a_drive_through_two_splits_joins_the_one_it_shares_more_with_and_its_other_scenes_are_dropped(run):
    # scenes of 200 m: 0 to 400 is train's, 690 to 700 is val's
    drives = [drive("t", [(0, 0), (400, 0)], 0, num_scenes=2), drive("v", [(690, 0), (700, 0)], 100),
              drive("both", [(0, 0), (800, 0)], 200, num_scenes=4)]
    summary, data = run(drives, HALVES)
    assert of(data)["both"] == ["train", "train", "train", None]
    assert summary.dropped == {"place_of_other_split": 1}
    dropped = tables.read(data / "dropped.parquet")
    assert dropped.columns == [*tables.SCENES, "rule"]
    assert dropped["rule"].to_list() == ["place_of_other_split"]
    assert dropped["start_us"].to_list() == [START_US + 230 * S]


def test_a_drive_joins_the_split_it_shares_more_with_even_if_another_was_there_first(run):
    drives = [drive("t", at(0), 0), drive("v", [(400, 0), (800, 0)], 100),
              drive("both", [(0, 0), (800, 0)], 200, num_scenes=4)]
    assert of(run(drives, HALVES)[1])["both"] == [None, "val", "val", "val"]


def test_a_tie_goes_to_the_split_that_was_there_first(run):
    ends = {"west": at(0), "east": at(1000)}
    for first, second in (("west", "east"), ("east", "west")):
        drives = [drive(first, ends[first], 0), drive(second, ends[second], 100), drive("again", ends[first], 150),
                  drive("both", [(0, 0), (1000, 0)], 200, num_scenes=10)]
        _, data = run(drives, HALVES)
        splits = of(data)
        assert (splits[first], splits[second]) == (["train"], ["val"])
        kept = ["train"] * 9
        assert splits["both"] == ([*kept, None] if first == "west" else [None, *kept])


def test_a_dropped_scene_makes_no_cell_its_splits(run):
    # the dropped scene of `both` also passes (300, 0), where nobody else is: the last drive is free to go to val
    drives = [drive("t", [(0, 0), (200, 0)], 0), drive("v", at(400), 100),
              drive("both", [(0, 0), (400, 0)], 200, num_scenes=2), drive("late", at(310), 300)]
    _, data = run(drives, HALVES, cell_m=20.0)
    assert of(data) == {"t": ["train"], "v": ["val"], "both": ["train", None], "late": ["val"]}


def random_world(rng, num=20):
    """Crossing streets, some turning, of one to four scenes; some drives begin at the same time; some are local."""
    drives = []
    for i in range(num):
        start = rng.uniform(-300, 300, 2)
        heading, length = rng.uniform(-np.pi, np.pi, 3), rng.uniform(20, 150, 3)
        path = start + np.cumsum([[0, 0], *np.stack([length * np.cos(heading), length * np.sin(heading)], -1)], 0)
        drives.append(drive(f"d{i}", path, 100 * (i // 2), int(rng.integers(1, 5)),
                            georeferenced=bool(rng.random() < 0.8), location=str(rng.choice(["north", "south"]))))
    return sorted(drives, key=lambda d: (d[0]["start_us"], d[0]["drive_token"]))


SHARES = {"train": 0.5, "val": 0.3, "test": 0.2}


def assigned(drives, cell_m=50.0):
    """scene_token -> split or None, through the stage's functions: a world may leave a split empty."""
    rows = tables.frame([d[0] for d in drives], tables.DRIVES)
    scenes = tables.frame([row for d in drives for row in d[2]], tables.SCENES)
    order = np.repeat(np.arange(len(drives)), [len(d[2]) for d in drives])
    where = split.cells(scenes, rows, pl.concat([d[1] for d in drives]).lazy(), cell_m)
    found, _ = split.assign(order, where, np.array(list(SHARES.values())))
    return dict(zip(scenes["scene_token"], [None if k < 0 else list(SHARES)[k] for k in found.tolist()]))


def test_adding_later_drives_moves_no_scene():
    moved = 0
    for seed in range(25):
        drives = random_world(np.random.default_rng(seed))
        whole = assigned(drives)
        for num in range(1, len(drives)):
            fewer = assigned(drives[:num])
            assert fewer == {token: whole[token] for token in fewer}
        moved += len(set(whole.values())) == 4
    assert moved > 12  # the worlds are not trivial: all splits and dropped scenes


def test_a_later_drive_appends_to_the_scenes_and_changes_no_row(run):
    drives = [*apart(5), drive("both", [(0, 0), (1000, 0)], 5000, num_scenes=4)]
    before, after = (tables.read(run(some)[1] / "scenes.parquet") for some in (drives[:5], drives))
    assert after[:5].equals(before)
    assert len(after) > 5


def test_split_never_puts_one_drive_in_two_splits_and_no_cell_is_in_two_splits():
    for seed in range(60):
        drives = random_world(np.random.default_rng(seed))
        found = assigned(drives)
        for _, _, scenes in drives:
            assert len({found[row["scene_token"]] for row in scenes} - {None}) <= 1
        scenes = tables.frame([row for d in drives for row in d[2]], tables.SCENES)
        where = split.cells(scenes, tables.frame([d[0] for d in drives], tables.DRIVES),
                            pl.concat([d[1] for d in drives]).lazy(), 50.0)
        splits = pl.Series([found[token] for token in scenes["scene_token"]]).gather(where["scene"])
        owners = where.with_columns(split=splits).drop_nulls().group_by("cell").agg(pl.col("split").n_unique())
        assert owners["split"].max() == 1


def test_scenes_of_two_splits_never_come_closer_than_cell_m_where_georeferenced():
    checked = 0
    for seed in range(25):
        drives = [d for d in random_world(np.random.default_rng(100 + seed), 20)
                  if d[0]["georeferenced"] and d[0]["location"] == "north"]
        found = assigned(drives, cell_m=40.0)
        paths = {}
        for _, motion, scenes in drives:
            for scene in scenes:
                rows = motion.filter(pl.col("stamp_us").is_between(scene["start_us"], scene["end_us"]))
                fine = np.linspace(0, len(rows) - 1, 1000)
                xy = np.stack([np.interp(fine, np.arange(len(rows)), rows[axis]) for axis in ("x_m", "y_m")], -1)
                paths.setdefault(found[scene["scene_token"]], []).append(xy)
        trees = [cKDTree(np.concatenate(paths[name])) for name in SHARES if name in paths]
        for one, other in combinations(trees, 2):
            assert one.query(other.data, p=np.inf)[0].min() >= 40.0 - 1e-6
            checked += 1
    assert checked > 30


def test_the_shares_end_within_a_scene_of_the_quotas_where_all_drives_are_apart(run):
    _, data = run(apart(60))
    shares = tables.read(data / "scenes.parquet")["split"].value_counts()
    for name, count in shares.iter_rows():
        assert abs(count - 60 * QUOTAS[name]) <= 1


def test_two_scenes_five_centimetres_on_either_side_of_a_border_are_one_place(run):
    for border in (0.0, 25.0, 50.0, 100.0):
        drives = [drive("left", at(border - 4.025), 0), drive("right", at(border + 4.025), 1),
                  drive("far", at(9999), 2)]
        _, data = run(drives, HALVES)
        assert of(data) == {"left": ["train"], "right": ["train"], "far": ["val"]}, border


def scene_of(points):
    """(scenes, motion) of one scene over points (N, 2), 10 Hz."""
    stamps = START_US + np.arange(len(points)) * S // 10
    motion = pl.DataFrame({"drive_token": ["d"] * len(points), "stamp_us": stamps,
                           "x_m": points[:, 0], "y_m": points[:, 1]})
    scenes = pl.DataFrame({"drive_token": ["d"], "start_us": [START_US], "end_us": [int(stamps[-1]) + 1]})
    return scenes, motion.lazy()


def test_the_cells_of_a_scene_are_those_within_half_a_cell_of_its_path():
    table = places.cells(*scene_of(np.array([[60.0, 10.0], [70.0, 10.0]])), 50.0)
    assert table.rows() == [(0, 0, -1), (0, 0, 0), (0, 1, -1), (0, 1, 0)]  # x from 35 to 95, y from -15 to 35
    table = places.cells(*scene_of(np.array([[60.0, 10.0], [80.0, 10.0]])), 50.0)
    assert sorted(set(table["ix"])) == [0, 1, 2]  # to 105


def test_no_cell_that_is_passed_between_two_points_is_left_out():
    rng = np.random.default_rng(0)
    for _ in range(60):
        points = np.cumsum(rng.normal(0, rng.choice([5, 40, 300]), (6, 2)), 0)
        found = set(places.cells(*scene_of(points), 50.0).select("ix", "iy").rows())
        fine = np.linspace(0, len(points) - 1, 2001)
        xy = np.stack([np.interp(fine, np.arange(len(points)), points[:, axis]) for axis in (0, 1)], -1)
        around = np.concatenate([xy + np.array([dx, dy]) for dx in (-25, 25) for dy in (-25, 25)])
        wanted = set(map(tuple, (around // 50).astype(int).tolist()))
        assert wanted <= found
        assert len(found) <= 2 * len(wanted) + 4


def test_a_scene_has_the_cells_up_to_the_points_just_outside_it_and_none_of_the_rest_of_its_drive():
    _, motion, scenes = drive("d", [(30, 0), (3030, 0)], num_scenes=3)
    table = places.cells(tables.frame(scenes, tables.SCENES), motion.lazy(), 50.0)
    # 10 m a step; the second scene reaches from 1020 to 2030, half a cell more at each end
    second = table.filter(pl.col("scene") == 1)["ix"]
    assert (second.min(), second.max()) == ((1020 - 25) // 50, (2030 + 25) // 50)


def test_cells_do_not_depend_on_the_pieces_in_which_motion_is_read(monkeypatch):
    drives = apart(9)
    scenes = tables.frame([row for d in drives for row in d[2]], tables.SCENES)
    motion = pl.concat([d[1] for d in drives]).lazy()
    whole = places.cells(scenes, motion, 50.0)
    monkeypatch.setattr(places, "rows_of", lambda *given: rows_of(*given, num_rows=150))
    assert places.cells(scenes, motion, 50.0).equals(whole)


def test_two_local_frames_that_both_begin_at_0_0_are_not_one_place(run):
    drives = [drive(f"d{i}", at(0), i, georeferenced=False) for i in range(4)]
    summary, data = run(drives, HALVES)
    assert sorted(splits[0] for splits in of(data).values()) == ["train", "train", "val", "val"]
    assert summary.notes[1] == (
        "4 of 4 drives split by drive alone (not georeferenced): one place may be in two splits")
    assert json.loads((data / "policy.json").read_text())["by"] == "drive"


def test_the_same_recording_under_two_names_stays_in_one_split_without_georeference(run):
    drives = [drive(f"d{i}", at(0), i, georeferenced=False, recording_digest=digest * 64)
              for i, digest in enumerate("aabab")]
    _, data = run(drives, HALVES)
    assert [splits[0] for splits in of(data).values()] == ["train", "train", "val", "train", "val"]


def test_equal_coordinates_at_two_locations_are_not_one_place(run):
    drives = [drive("here", at(0), 0, location="north"), drive("there", at(0), 1, location="south")]
    assert of(run(drives, HALVES)[1]) == {"here": ["train"], "there": ["val"]}


def test_the_policy_says_by_what_it_was_split_for_the_card(run):
    drives = [*apart(3), drive("local", at(0), 900, georeferenced=False)]
    summary, data = run(drives)
    assert json.loads((data / "policy.json").read_text()) == {
        "by": "mixed", "num_drives_by_place": 3, "num_drives_by_drive_alone": 1, "cell_m": 50.0, "quotas": QUOTAS,
        "num_scenes_dropped": 0, "splits": {
            "train": {"num_scenes": 2, "num_drives": 2, "duration_s": 20.0},
            "val": {"num_scenes": 1, "num_drives": 1, "duration_s": 10.0},
            "test": {"num_scenes": 1, "num_drives": 1, "duration_s": 10.0}}}
    assert summary.notes[1].startswith("1 of 4 drives split by drive alone")
    summary, data = run(apart(3))
    assert json.loads((data / "policy.json").read_text())["by"] == "place"
    assert summary.notes[1] == "split by place: scenes of different splits are at least 50 m apart"


def test_the_order_is_that_of_the_first_stamps_then_of_tokens_never_that_of_the_tables(run):
    late_row_first = [drive("late", at(1000), 100), drive("early", at(0), 0)]
    assert of(run(late_row_first, HALVES)[1]) == {"early": ["train"], "late": ["val"]}
    twins = [drive("a", at(0), 0), drive("b", at(1000), 0)]
    first = min(twins, key=lambda d: d[0]["drive_token"])[0]["drive_name"]
    for order in (twins, twins[::-1]):
        assert of(run(order, HALVES)[1])[first] == ["train"]


def test_an_empty_split_that_was_asked_for_is_an_error(run):
    with pytest.raises(ConfigError) as caught:
        run([*apart(2), drive("again", at(0), 900)])
    assert str(caught.value) == (
        "split.quotas.test is 0.15 but no scene came there: 3 drives lie in 2 places of their own, 0 scenes dropped\n"
        "  scan more drives, lower split.cell_m (50), or set split.quotas.test to 0")


def test_a_split_with_quota_0_is_not_asked_for(run):
    assert of(run(apart(1), {"train": 1.0, "val": 0.0, "test": 0.0})[1]) == {"d00": ["train"]}


@pytest.mark.parametrize(("quotas", "text"), [
    ({"train": 0.6, "val": 0.3}, "split.quotas add up to 0.9, expected 1: train 0.6, val 0.3\n"
                                 "  change one of them in conf/split and run `roadmill compose`"),
    ({"train": 0.6, "vall": 0.4}, "split.quotas.vall is not a split, did you mean val?; splits: train, val, test")])
def test_quotas_that_are_none_are_an_error(run, quotas, text):
    with pytest.raises(ConfigError) as caught:
        run(apart(3), quotas)
    assert str(caught.value) == text


def test_a_georeferenced_drive_without_a_pose_is_an_error_not_a_place_of_its_own(run):
    good, bad = apart(2)
    with pytest.raises(DataError, match=r"d01: its rig says georeferenced but motion.parquet has no pose of it"):
        run([good, (bad[0], bad[1].clear(), bad[2])], HALVES)


def test_a_group_is_neighbours_of_one_recording_up_to_group_s(run):
    drives = [drive("long", [(0, 0), (70, 0)], 0, num_scenes=7), *apart(3)[1:]]
    scenes = tables.read(run(drives, HALVES, group_s=30.0)[1] / "scenes.parquet")
    assert scenes.columns == list(tables.SPLIT)
    assert scenes["group"].to_list() == [0, 0, 0, 1, 1, 1, 2, 3, 4]
    scenes = tables.read(run(drives, HALVES, group_s=5.0)[1] / "scenes.parquet")
    assert scenes["group"].to_list() == list(range(9))


def test_split_gives_the_same_bytes_twice_and_whatever_the_order_of_tables_and_quotas(run):
    drives = [*apart(6), drive("both", [(0, 0), (1000, 0)], 5000, num_scenes=4)]
    quotas = {"train": 0.5, "val": 0.25, "test": 0.25}
    first = run(drives, quotas)[1]
    for other in (run(drives, quotas)[1], run(drives[::-1], dict(reversed(quotas.items())))[1]):
        assert {path.name for path in first.iterdir()} == {"scenes.parquet", "dropped.parquet", "policy.json"}
        for path in first.iterdir():
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_the_default_conf_loads_and_splits(run, request):
    values = yaml.safe_load((request.config.rootpath / "conf/split/default.yaml").read_text())
    cfg = knobs.load(split.Knobs, values, "split")
    assert run(apart(3), cfg.quotas, cfg.cell_m, cfg.group_s)[0].num_out == 3
