"""The laws of curation."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest
import yaml

from stages import curate
from stages.lib import features as features_module
from stages.lib import knobs, tables
from stages.lib.errors import ConfigError, DataError
from stages.lib.features import FEATURES, features
from stages.lib.stage import Out, Upstream

START_US = 1_700_000_000_000_000  # Tuesday, 14 November 2023, 22:13:20 UTC
S = 1_000_000


def drive_row(name, start_us=START_US, seconds=50.0, **other):
    return {"drive_token": tables.token("drive", name), "drive_name": name, "recording_digest": "0" * 64, "rig": "sim",
            "vehicle": "car_1", "location": "north", "georeferenced": True, "start_us": start_us,
            "end_us": start_us + round(seconds * S), **other}


def motion_rows(drive, speed_mps=10.0, yaw_rate_radps=0.0, accel_mps2=0.0):
    """10 Hz from one second before the usable interval to one after it; the numbers may be functions of seconds."""
    stamps = np.arange(drive["start_us"] - S, drive["end_us"] + S + 1, S // 10)
    t = (stamps - drive["start_us"]) / S
    values = [np.array([v(x) for x in t]) if callable(v) else np.full(len(t), float(v))
              for v in (speed_mps, accel_mps2, yaw_rate_radps)]
    yaw = (0.1 * np.cumsum(values[2]) + math.pi) % (2 * math.pi) - math.pi
    return pl.DataFrame({"drive_token": [drive["drive_token"]] * len(t), "stamp_us": stamps,
                         "x_m": 0.1 * np.cumsum(values[0]), "y_m": np.zeros(len(t)), "yaw_rad": yaw,
                         "speed_mps": values[0], "accel_mps2": values[1], "yaw_rate_radps": values[2]},
                        schema=tables.MOTION)


def gap(drive, channel, start_s, end_s):
    return {"drive_token": drive["drive_token"], "channel": channel, "start_us": drive["start_us"] + round(start_s * S),
            "end_us": drive["start_us"] + round(end_s * S)}


def channel(drive, name, modality):
    return {"drive_token": drive["drive_token"], "channel": name, "modality": modality, "topic": "/" + name,
            "rate_hz": 10.0, "num_messages": 1, "num_duplicate": 0, "num_backward": 0, "num_dropped": 0,
            "max_gap_us": 0}


@pytest.fixture
def world(tmp_path):
    """write(drives, motion, gaps, channels) -> inputs of the stage."""
    def write(drives, motion, gaps=(), channels=()):
        folder = tmp_path / "ingest"
        tables.write(tables.frame(list(drives), tables.DRIVES), folder / "drives.parquet")
        tables.write(tables.frame(list(channels), tables.CHANNELS), folder / "channels.parquet")
        tables.write(tables.frame(list(gaps), tables.GAPS), folder / "gaps.parquet")
        tables.write(pl.concat(motion), folder / "motion.parquet")
        return {"ingest": Upstream(folder)}
    return write


@pytest.fixture
def run(tmp_path, request, monkeypatch):
    """run(inputs, rules, …) -> (Summary, scenes, dropped, Out); draws only for tests of report and bytes."""
    if "report" not in request.node.name and "bytes" not in request.node.name:
        monkeypatch.setattr(curate, "_histograms", lambda kept, dropped: b"\x89PNG\r\n")
    count = iter(range(100))

    def run_(inputs, rules, scene_s=20.0, min_scene_s=5.0):
        out = Out(*(tmp_path / f"out{next(count)}" / name for name in ("data", "results")))
        for folder in (out.data, out.results):
            folder.mkdir(parents=True)
        summary = curate.run(curate.Knobs(scene_s, min_scene_s, rules), inputs, out)
        return summary, tables.read(out.data / "scenes.parquet"), tables.read(out.data / "dropped.parquet"), out
    return run_


@pytest.fixture
def one_drive(world):
    drive = drive_row("north/d1")
    return world([drive], [motion_rows(drive)])


def fails_with(run, inputs, condition, kind=ConfigError):
    with pytest.raises(kind) as caught:
        run(inputs, {"mine": condition})
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_a_drive_is_cut_from_its_start_and_a_tail_of_min_scene_s_becomes_a_scene(run, one_drive):
    summary, scenes, dropped, _ = run(one_drive, {})
    assert (scenes["start_us"] - START_US).to_list() == [0, 20 * S, 40 * S]
    assert scenes["duration_s"].to_list() == [20.0, 20.0, 10.0]
    assert scenes["scene_name"][1] == f"north-d1-{START_US + 20 * S}"
    assert scenes["scene_token"][1] == tables.token("scene", scenes["drive_token"][1], START_US + 20 * S,
                                                    START_US + 40 * S)
    assert dropped.is_empty()
    assert run(one_drive, {}, scene_s=22.5, min_scene_s=5.0)[0].num_out == 3  # a tail of exactly 5 s
    assert (summary.num_in, summary.num_out, summary.unit, summary.unit_in) == (3, 3, "scenes", "candidates")


def test_a_shorter_tail_and_a_drive_without_usable_interval_are_dropped_by_min_scene_s(run, world):
    long, broken = drive_row("long", seconds=44.9), drive_row("broken", seconds=-1)
    summary, scenes, dropped, _ = run(world([long, broken], [motion_rows(long)]), {})
    assert scenes["drive_name"].to_list() == ["long", "long"]
    assert dropped.select("drive_name", "duration_s", "rule").rows() == [
        ("broken", 0.0, "min_scene_s"), ("long", pytest.approx(4.9), "min_scene_s")]
    assert summary.dropped == {"min_scene_s": 2}


def test_features_are_numbers_that_a_person_can_check(run, world):
    drive = drive_row("d", seconds=40)
    motion = motion_rows(drive, lambda t: 0.0 if t < 5 else 8.0, lambda t: 0.25 if t >= 20 else 0.0,
                         lambda t: -3.0 if 30 <= t < 31 else 0.0)
    inputs = world([drive], [motion], [gap(drive, "CAM_FRONT", 12, 12.5), gap(drive, "LIDAR_TOP", 19, 22)],
                   [channel(drive, "CAM_FRONT", "camera"), channel(drive, "CAM_BACK", "camera"),
                    channel(drive, "LIDAR_TOP", "lidar")])
    _, scenes, _, _ = run(inputs, {})
    stop, turn = scenes.rows(named=True)
    assert list(scenes.columns) == [*tables.SCENES, *FEATURES]
    assert stop["distance_m"] == pytest.approx(120.0 + 0.8)  # 15 s at 8 m/s; the step up to 5.0 s is driven at 8 m/s
    assert turn["distance_m"] == pytest.approx(160.0)
    assert (stop["mean_speed_mps"], stop["max_speed_mps"], stop["min_speed_mps"]) == (6.0, 8.0, 0.0)
    assert (stop["stop_ratio"], turn["stop_ratio"]) == (0.25, 0.0)
    assert (stop["max_abs_accel_mps2"], turn["max_abs_accel_mps2"]) == (0.0, 3.0)
    assert turn["mean_abs_accel_mps2"] == pytest.approx(0.15)
    assert turn["max_abs_yaw_rate_radps"] == 0.25
    assert turn["turn_rad"] == pytest.approx(5.0)  # more than half a circle, not wrapped
    assert (stop["num_gaps"], stop["max_gap_s"]) == (2, 1.0)
    assert (turn["num_gaps"], turn["max_gap_s"]) == (1, 2.0)
    assert turn["max_pose_gap_s"] == pytest.approx(0.1)
    assert (turn["num_cameras"], turn["num_lidars"]) == (2, 1)
    assert (turn["hour_utc"], turn["weekday_utc"]) == (22, 2)
    assert (turn["rig"], turn["vehicle"], turn["location"], turn["georeferenced"]) == ("sim", "car_1", "north", True)


def test_the_distances_of_a_drives_scenes_add_up_to_the_drive_and_no_other_drive_leaks_in(run, world):
    drives = [drive_row("a", seconds=40), drive_row("b", seconds=40)]
    inputs = world(drives, [motion_rows(drives[0], 10.0), motion_rows(drives[1], 3.0)])
    _, scenes, _, _ = run(inputs, {})
    assert scenes.group_by("drive_name").agg(pl.col("distance_m").sum()).sort("drive_name").rows() == [
        ("a", pytest.approx(400)), ("b", pytest.approx(120))]


def test_a_silence_of_the_pose_counts_up_to_the_edges_and_a_scene_without_pose_has_no_motion_features(run, world):
    drives = [drive_row("a", seconds=20), drive_row("b", seconds=20)]
    motion = motion_rows(drives[0])
    seconds = (pl.col("stamp_us") - START_US) / S
    _, scenes, _, _ = run(world(drives, [motion.filter(seconds < 17.5)]), {})
    assert scenes["max_pose_gap_s"].to_list() == [pytest.approx(2.6), 20.0]
    missing = scenes.row(1, named=True)
    assert [name for name in FEATURES if missing[name] is None] == [
        "distance_m", "mean_speed_mps", "max_speed_mps", "min_speed_mps", "stop_ratio", "mean_abs_accel_mps2",
        "max_abs_accel_mps2", "max_abs_yaw_rate_radps", "turn_rad"]
    _, scenes, _, _ = run(world(drives[:1], [motion.filter((seconds < 8) | (seconds >= 11))]), {})
    assert scenes["max_pose_gap_s"].to_list() == [pytest.approx(3.1)]


def test_features_do_not_depend_on_the_pieces_in_which_motion_is_read(monkeypatch):
    drives = [drive_row(f"d{i}", seconds=30 + i) for i in range(7)]
    motion = pl.concat([motion_rows(drive, 2.0 + i, 0.1 * i, i) for i, drive in enumerate(drives[1:], 1)])
    table = tables.frame(drives, tables.DRIVES)
    args = (curate.cut(table, 10.0), table, tables.frame([], tables.CHANNELS), tables.frame([], tables.GAPS))
    whole = features(*args, motion.lazy())
    rows_of = features_module.rows_of
    monkeypatch.setattr(features_module, "rows_of", lambda *given: rows_of(*given, num_rows=500))
    assert len(list(features_module.rows_of(args[0], motion.lazy(), []))) == 4
    assert features(*args, motion.lazy()).equals(whole)


def test_an_unknown_number_is_left_out_of_a_feature_not_counted_as_zero(run, world):
    drive = drive_row("a", seconds=20)
    motion = motion_rows(drive, accel_mps2=lambda t: math.nan if t < 10 else 2.0)
    assert run(world([drive], [motion]), {})[1]["mean_abs_accel_mps2"].to_list() == [2.0]


def test_motion_whose_drives_do_not_stand_together_is_refused():
    drives = [drive_row("a", seconds=20), drive_row("b", seconds=20)]
    motion = pl.concat([motion_rows(drives[0]), motion_rows(drives[1]), motion_rows(drives[0])])
    table = tables.frame(drives, tables.DRIVES)
    with pytest.raises(ValueError, match="do not stand together"):
        features(curate.cut(table, 20.0), table, tables.frame([], tables.CHANNELS), tables.frame([], tables.GAPS),
                 motion.lazy())


def test_every_dropped_candidate_has_the_first_rule_by_name_that_it_failed(run, world):
    slow, turning = drive_row("slow", seconds=20), drive_row("turning", seconds=20)
    fine = drive_row("fine", seconds=20)
    motion = [motion_rows(slow, 0.4, 0.1), motion_rows(turning, 9, 0.1), motion_rows(fine)]
    inputs = world([slow, turning, fine], motion)
    rules = {"b_straight": "abs(turn_rad) < 1", "a_moving": "mean_speed_mps > 1", "off": None}
    for order in (rules, dict(reversed(rules.items()))):
        summary, scenes, dropped, _ = run(inputs, order)
        assert scenes["drive_name"].to_list() == ["fine"]
        assert dropped.select("drive_name", "rule").rows() == [("slow", "a_moving"), ("turning", "b_straight")]
        assert summary.dropped == {"a_moving": 1, "b_straight": 1}
        assert dropped.columns == [*scenes.columns, "rule"]


def test_null_counts_as_failed_and_is_said(run, world):
    seen, lost = drive_row("seen", seconds=20), drive_row("unseen", seconds=20)
    summary, scenes, dropped, _ = run(world([seen, lost], [motion_rows(seen)]), {"moving": "max_speed_mps > 1"})
    assert scenes["drive_name"].to_list() == ["seen"]
    assert dropped["rule"].to_list() == ["moving"]
    assert summary.notes == ("1 scenes fail curate.rules.moving because it has no value (NULL)",)


def test_more_drives_change_nothing_for_a_candidate(run, world):
    rules = {"moving": "mean_speed_mps > 5"}
    drives = [drive_row(f"d{i}", START_US + i * 100 * S) for i in range(4)]
    motion = [motion_rows(drive, speed_mps=3.0 * i) for i, drive in enumerate(drives)]
    _, few, few_dropped, _ = run(world(drives[:3], motion[:3]), rules)
    _, more, more_dropped, _ = run(world(drives[::-1], motion[::-1]), rules)
    assert more.filter(pl.col("drive_name") != "d3").equals(few)
    assert more_dropped.filter(pl.col("drive_name") != "d3").equals(few_dropped)


def test_a_wrong_feature_name_is_one_message_with_a_near_miss_and_the_features(run, one_drive):
    text = fails_with(run, one_drive, "max_sped_mps > 1")
    assert text.startswith("curate.rules.mine is 'max_sped_mps > 1': no feature is called max_sped_mps, "
                           "did you mean max_speed_mps?")
    assert all(name in text for name in FEATURES)
    assert "no feature is called north (texts take 'single quotes')" in fails_with(run, one_drive, 'location = "north"')


@pytest.mark.parametrize(("condition", "what"), [
    ("max_speed_mps >", "syntax error"), ("", "SELECT clause without selection list"), ("location > 3", "VARCHAR"),
    ("duration_s > 1; SELECT true", "syntax error"), ("true); SELECT (true", "syntax error"),
    ("avg(duration_s) > 1", "cannot contain aggregates"), ("row_number() OVER () < 9", "cannot contain window"),
    ("max_speed_mps", "it gives DOUBLE, expected a condition that is true or false"),
    ("CAST(location AS DOUBLE) > 1", "Could not convert")])
def test_what_is_no_condition_is_a_config_error_that_names_the_rule(run, one_drive, condition, what):
    text = fails_with(run, one_drive, condition)
    assert text.startswith("curate.rules.mine is ")
    assert what in text


@pytest.mark.parametrize("condition", ["random() < 2", '"random"() < 2', "now() > '2020-01-01'", "uuid() <> location",
                                       "current_date > '2020-01-01'", "localtime > '00:00'",
                                       "duration_s >= (SELECT avg(duration_s) FROM candidates)"])
def test_a_rule_that_may_answer_otherwise_tomorrow_or_looks_at_other_scenes_is_refused(run, one_drive, condition):
    assert "is not allowed, a rule must say the same of a scene every time" in fails_with(run, one_drive, condition)


def test_a_word_in_a_text_is_no_function(run, one_drive):
    assert run(one_drive, {"mine": "location NOT IN ('now', 'today')"})[0].num_out == 3


def test_a_rule_reads_no_file_and_changes_no_setting(run, one_drive, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for table in (f"'{secret}'", f"read_csv('{secret}')", f"read_text('{secret}')"):
        assert "disabled by configuration" in fails_with(run, one_drive, f"EXISTS (SELECT * FROM {table})")
    for text in ("SET enable_external_access = true", "true); SET enable_external_access = true; SELECT (true"):
        assert "syntax error" in fails_with(run, one_drive, text)


def test_a_rule_sees_no_python_variable(run, one_drive, monkeypatch):
    monkeypatch.setattr(curate, "leaked", {"a": np.array([1])}, raising=False)
    assert "leaked does not exist" in fails_with(run, one_drive, "EXISTS (SELECT * FROM leaked)")


def test_an_empty_output_is_an_error_with_the_counts_and_the_knob(run, one_drive):
    text = fails_with(run, one_drive, "max_speed_mps > 99")
    assert text == ("curate: no scene is left of 3 candidates; dropped by mine 3\n"
                    "  loosen curate.rules.mine (max_speed_mps > 99) in conf/curate and run `roadmill compose`")
    assert "dropped by mine 3 (3 NULL)" in fails_with(run, one_drive, "max_speed_mps > 99 OR NULL")


def test_drives_that_are_all_too_short_are_an_error_that_names_min_scene_s(run, world):
    drive = drive_row("short", seconds=3)
    with pytest.raises(ConfigError, match=r"of 1 candidates; dropped by min_scene_s 1\n  loosen curate.min_scene_s in"):
        run(world([drive], [motion_rows(drive)]), {})


def test_a_min_scene_s_above_scene_s_is_an_error(run, one_drive):
    with pytest.raises(ConfigError, match=r"curate.min_scene_s is 9, more than curate.scene_s 5: no scene"):
        run(one_drive, {}, scene_s=5.0, min_scene_s=9.0)


def test_two_drives_that_give_one_scene_name_are_an_error_that_names_both(run, world):
    drives = [drive_row("a/b", seconds=20), drive_row("a-b", seconds=20)]
    with pytest.raises(DataError, match=r"drives a-b and a/b begin in the same µs .* a-b-1700000000000000"):
        run(world(drives, [motion_rows(drive) for drive in drives]), {})


def test_curate_gives_the_same_bytes_twice_and_leaves_nothing_else(run, world):
    drives = [drive_row("a"), drive_row("b", seconds=44)]
    motion = [motion_rows(drives[0]), motion_rows(drives[1], 2.0, 0.1)]
    inputs = world(drives, motion, [gap(drives[0], "LIDAR_TOP", 1, 3)])
    first, second = (run(inputs, {"straight": "abs(turn_rad) < 1"})[3] for _ in range(2))
    names = {"scenes.parquet", "dropped.parquet", "report.html"}
    for out in (first, second):
        assert {path.name for folder in (out.data, out.results) for path in folder.iterdir()} == names
    for kind in ("data", "results"):
        for path in getattr(first, kind).iterdir():
            assert path.read_bytes() == (getattr(second, kind) / path.name).read_bytes(), path.name


def test_the_report_shows_rules_counts_and_a_picture(run, world):
    slow, fine = drive_row("slow", seconds=20), drive_row("fine", seconds=20)
    out = run(world([slow, fine], [motion_rows(slow, 0.1), motion_rows(fine)]), {"moving": "mean_speed_mps > 1"})[3]
    page = (out.results / "report.html").read_text()
    assert "1 scenes kept, 1 dropped; 20 s kept, 20 s dropped." in page
    assert "mean_speed_mps &gt; 1" in page
    assert "data:image/png;base64," in page


def test_the_default_conf_loads_and_keeps_a_plain_drive(run, world, request):
    values = yaml.safe_load((request.config.rootpath / "conf/curate/default.yaml").read_text())
    cfg = knobs.load(curate.Knobs, values, "curate")
    drive = drive_row("a", seconds=40)
    inputs = world([drive], [motion_rows(drive)])
    assert run(inputs, **dataclasses.asdict(cfg))[0].num_out == 2
