"""curate: the scenes worth learning from, and every dropped candidate with the rule that dropped it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import matplotlib
import matplotlib.style
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from stages.lib import report, tables
from stages.lib.errors import ConfigError, DataError
from stages.lib.features import FEATURES, features
from stages.lib.knobs import knob, near_miss
from stages.lib.stage import Out, Summary, Upstream
from stages.lib.tables import SCENES

INPUTS = ("ingest",)
TOO_SHORT = "min_scene_s"
COUNTS = {"rule": pl.String, "condition": pl.String, "dropped": pl.Int64, "failed": pl.Int64, "no_value": pl.Int64}
KNOWN = (*FEATURES, "scene_name", "drive_name", "start_us", "end_us")
SHOWN = ("duration_s", "mean_speed_mps", "max_abs_accel_mps2", "turn_rad", "stop_ratio", "max_gap_s")
COLORS = ("#3b75af", "#d1605e")


@dataclass(frozen=True)
class Knobs:
    scene_s: float = knob("length of a scene", low=1, high=30)
    min_scene_s: float = knob("a shorter rest at the end of a drive is no scene", above=0, high=30)
    rules: dict[str, str | None] = knob("name -> SQL condition over the features that a scene must meet; null is off")


def run(cfg: Knobs, inputs: Mapping[str, Upstream], out: Out) -> Summary:
    """data: scenes.parquet (SCENES and FEATURES), dropped.parquet (the same and `rule`), sorted by drive and start.

    Each drive's [start_us, end_us) is cut from its start into scenes of scene_s; every drive has one candidate or more.
    The rules are tried in the order of their names; `rule` is the first that is not true. Each candidate is judged by
    its own features alone, so more drives change nothing for it.
    Raises ConfigError for a condition that is not one, and where nothing is left.
    """
    if cfg.min_scene_s > cfg.scene_s:
        raise ConfigError(f"curate.min_scene_s is {cfg.min_scene_s:g}, more than curate.scene_s {cfg.scene_s:g}: "
                          "no scene is that long; lower curate.min_scene_s")
    folder = inputs["ingest"].folder
    drives, channels, gaps = (tables.read(folder / f"{name}.parquet") for name in ("drives", "channels", "gaps"))
    candidates = features(cut(drives, cfg.scene_s), drives, channels, gaps, tables.scan(folder / "motion.parquet"))
    rules = {name: condition for name, condition in sorted(cfg.rules.items()) if condition is not None}
    judged, counts = judge(candidates, rules, cfg.min_scene_s, out.data / "candidates.parquet")
    kept, dropped = judged.filter(pl.col("rule").is_null()).drop("rule"), judged.filter(pl.col("rule").is_not_null())
    if kept.is_empty():
        raise ConfigError(_nothing_left(counts, len(candidates)))
    tables.write(kept, out.data / "scenes.parquet")
    tables.write(dropped, out.data / "dropped.parquet")
    _report(kept, dropped, counts, out.results / "report.html")
    return Summary(len(candidates), len(kept), "scenes", "candidates",
                   {row["rule"]: row["dropped"] for row in counts.iter_rows(named=True) if row["dropped"]},
                   tuple(f"{row['no_value']} scenes fail curate.rules.{row['rule']} because it has no value (NULL)"
                         for row in counts.iter_rows(named=True) if row["no_value"]))


def cut(drives: pl.DataFrame, scene_s: float) -> pl.DataFrame:
    """The candidates (SCENES): each drive's [start_us, end_us) in pieces of scene_s, the last one shorter.

    A drive without a usable interval has one candidate of no length, so that it is not lost without a word.
    """
    scene_us = round(scene_s * 1e6)
    start_us, end_us = pl.col("start_us"), pl.max_horizontal("start_us", "end_us")
    num = pl.max_horizontal(1, -((start_us - end_us) // scene_us))
    pieces = (drives.sort("drive_name", "start_us").with_columns(end_us=end_us)
              .with_columns(start_us=pl.int_ranges(0, num) * scene_us + start_us).explode("start_us")
              .with_columns(end_us=pl.min_horizontal("end_us", start_us + scene_us)))
    tokens = [tables.token("scene", *row) for row in pieces.select("drive_token", "start_us", "end_us").iter_rows()]
    pieces = pieces.with_columns(
        pl.Series("scene_token", tokens, pl.String),
        scene_name=pl.col("drive_name").str.replace_all("/", "-", literal=True) + "-" + start_us.cast(pl.String))
    twins = pieces.filter(pl.col("scene_name").is_duplicated())
    if len(twins):
        one, other = twins.sort("scene_name", "drive_name")["drive_name"][:2]
        raise DataError(f"drives {one} and {other} begin in the same µs and give the same scene name "
                        f"{twins['scene_name'].min()}\n  rename or remove one of them and run `roadmill scan` again")
    return pieces.select(*SCENES)


def judge(candidates: pl.DataFrame, rules: Mapping[str, str], min_scene_s: float,
          scratch: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(the candidates with `rule`, null where all are met; COUNTS, a row per rule in the order they are tried).

    failed: scenes that fail the rule whichever rule dropped them; no_value: those of them where it is NULL.
    scratch  a file that duckdb reads the candidates from; it is removed
    """
    short = candidates["duration_s"] < min_scene_s
    judged = candidates.with_columns(rule=pl.when(short).then(pl.lit(TOO_SHORT)))
    rows = [(TOO_SHORT, f"duration_s >= {min_scene_s:g}", int(short.sum()), int(short.sum()), 0)]
    tables.write(candidates.filter(~short), scratch)
    try:
        with duckdb.connect(config={"threads": 1, "autoinstall_known_extensions": "false",
                                    "temp_directory": ""}) as database:
            database.execute("CREATE TABLE candidates AS SELECT * FROM read_parquet(?)", [str(scratch)])
            for setting in ("TimeZone = 'UTC'", "enable_external_access = false",
                            "python_enable_replacements = false", "lock_configuration = true"):
                database.execute(f"SET {setting}")
            for name, condition in rules.items():
                failed = _failed(database, name, condition)
                fails = pl.col("scene_token").is_in(failed["scene_token"].implode())
                before = judged["rule"].null_count()
                judged = judged.with_columns(rule=pl.when(pl.col("rule").is_null() & fails).then(pl.lit(name))
                                             .otherwise("rule"))
                rows.append((name, condition, before - judged["rule"].null_count(), len(failed),
                             int(failed["no_value"].sum())))
    finally:
        scratch.unlink()
    return judged, pl.DataFrame(rows, COUNTS, orient="row")


def _failed(database: duckdb.DuckDBPyConnection, name: str, condition: str) -> pl.DataFrame:
    """scene_token of the candidates for which the condition is not true, and no_value: it is NULL there."""
    where = f"curate.rules.{name} is {condition!r}"
    unstable = database.execute("SELECT DISTINCT function_name FROM duckdb_functions() "
                                "WHERE stability <> 'CONSISTENT'").fetchall()
    forbidden = {row[0] for row in unstable} | {
        "candidates", "current_time", "current_timestamp", "localtime", "localtimestamp"}
    for word in re.findall(r"\w+", re.sub(r"'[^']*'", "", condition)):
        if word.lower() in forbidden:
            raise ConfigError(f"{where}: {word} is not allowed, a rule must say the same of a scene every time, "
                              f"from its own features alone\n  features: {', '.join(KNOWN)}")
    scene = "(SELECT * FROM candidates) AS scene"
    try:
        duckdb.extract_statements(f"SELECT {condition}")
        kind = database.execute(f"SELECT (\n{condition}\n) FROM {scene} LIMIT 0").description[0][1]
        if str(kind) != "BOOLEAN":
            raise ConfigError(f"{where}: it gives {kind}, expected a condition that is true or false, "
                              "like max_speed_mps >= 1")
        rows = database.execute(f"SELECT scene_token, (\n{condition}\n) IS NULL FROM {scene} "
                                f"WHERE (\n{condition}\n) IS NOT TRUE").fetchall()
    except duckdb.Error as error:
        raise ConfigError(f"{where}: {_what(error)}\n  features: {', '.join(KNOWN)}") from None
    return pl.DataFrame(rows, schema={"scene_token": pl.String, "no_value": pl.Boolean}, orient="row")


def _what(error: duckdb.Error) -> str:
    unknown = re.search(r'column "([^"]*)" not found', str(error))
    if unknown:
        return f"no feature is called {unknown[1]}{near_miss(unknown[1], KNOWN)} (texts take 'single quotes')"
    return str(error).partition("\n")[0]


def _nothing_left(counts: pl.DataFrame, num: int) -> str:
    drops = ", ".join(f"{row['rule']} {row['dropped']}" + (f" ({row['no_value']} NULL)" if row["no_value"] else "")
                      for row in counts.iter_rows(named=True) if row["dropped"])
    worst = counts.sort("dropped", descending=True, maintain_order=True).row(0, named=True)
    knob_ = f"rules.{worst['rule']} ({worst['condition']})" if worst["rule"] != TOO_SHORT else TOO_SHORT
    return (f"curate: no scene is left of {num} candidates; dropped by {drops or 'none'}\n"
            f"  loosen curate.{knob_} in conf/curate and run `roadmill compose`"
            + ("; results/ingest/report.html says why drives are short" if worst["rule"] == TOO_SHORT else ""))


def _report(kept: pl.DataFrame, dropped: pl.DataFrame, counts: pl.DataFrame, path: Path) -> None:
    meaning = pl.DataFrame([{"feature": name, "meaning": text} for name, (_, text) in FEATURES.items()])
    seconds = f"{kept['duration_s'].sum():.0f} s kept, {dropped['duration_s'].sum():.0f} s dropped."
    report.write(path, "curate", [
        report.Section("Candidates", f"{len(kept)} scenes kept, {len(dropped)} dropped; {seconds}",
                       pictures=(("kept and dropped candidates by feature", _histograms(kept, dropped)),)),
        report.Section("Rules", "dropped: this was the first rule that the scene failed. failed: all scenes that fail "
                       "it. no_value: those of them where the condition is NULL.", counts),
        report.Section("Features", "What a rule can ask for.", meaning)])


def _histograms(kept: pl.DataFrame, dropped: pl.DataFrame) -> bytes:
    """PNG: stacked histograms of the features SHOWN, the same bytes for the same tables."""
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(12, 6), dpi=80)
        figure.subplots_adjust(left=0.05, right=0.99, bottom=0.09, top=0.93, wspace=0.18, hspace=0.3)
        for axes, name in zip(figure.subplots(2, 3).flat, SHOWN):
            values = [table[name].drop_nulls().to_numpy() for table in (kept, dropped)]
            bars = axes.hist(values, np.histogram_bin_edges(np.concatenate(values), 30), stacked=True, color=COLORS)[2]
            axes.set_xlabel(name)
        figure.legend(bars, ("kept", "dropped"), loc="upper center", ncols=2)
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
