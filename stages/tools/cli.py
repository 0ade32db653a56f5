"""`roadmill WORD`: what people type. Each word is a few lines over a function that does it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stages.__main__ import guarded
from stages.lib.errors import ConfigError, DataError
from stages.tools.programs import checkout as _root
from stages.tools.store_words import store_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Drive logs in; datasets, models and scores out. `dvc repro` runs the stages.")
app.add_typer(store_app)


def main() -> None:
    """The console script: our errors are lines, not tracebacks."""
    sys.exit(guarded(lambda: app(standalone_mode=True)))


def _say(lines: list[str]) -> None:
    typer.echo("\n".join(lines))


@app.command()
def compose() -> None:
    """Bring params.yaml up to date with conf/, and the code that dvc.yaml watches with the imports."""
    from stages.tools import config

    root = _root()
    written = {"params.yaml": config.write_params(root), "dvc.yaml": config.write_code_deps(root)}
    _say([f"{name:<12}  {'written' if changed else 'up to date'}" for name, changed in written.items()])


@app.command()
def scan(source: Annotated[str, typer.Argument(help="a folder or s3://bucket/prefix of recordings, or one recording")],
         rig: Annotated[str, typer.Option(help="conf/rig/RIG.yaml describes the vehicle")]) -> None:
    """Make the recordings under SOURCE part of the dataset; commit data/*.dvc to keep that decision."""
    from stages.tools.scan import scan as scan_source

    found = scan_source(_root(), source, rig)
    labels = ", ".join(f"{count} with {kind} labels" for kind, count in found.num_labels.items() if count)
    _say([f"scan {found.scan}: {found.num_recordings} recordings, {found.num_bytes / 2**30:.2f} GiB"
          + (f", {labels}" if labels else ""),
          f"  {len(found.added)} new, {len(found.changed)} changed, {len(found.gone)} gone since the last scan",
          "  `dvc repro` makes the dataset; `git add conf data/*.dvc params.yaml` and commit keep the decision"])


@app.command()
def upload(folder: Annotated[Path, typer.Argument(help="a vehicle's disk, or another folder with recordings")],
           url: Annotated[str, typer.Argument(help="s3://bucket/prefix, on the server of the store")],
           replace: Annotated[bool, typer.Option("--replace", help="what the bucket has other bytes of, too")] = False,
           ) -> None:
    """Copy each file of FOLDER to the bucket, verified, with its sha256; run again, it sends what is not there yet."""
    from stages.runners.run import exit_code, told
    from stages.tools.upload import upload as bring_home

    done = bring_home(_root(), folder, url, replace)
    for name, error in sorted(done.failed.items()):
        text = told(error) or f"{type(error).__name__}: {error}"
        typer.echo(f"{name if name.isprintable() else ascii(name)}: {text}", err=True)
    num, num_sent = len(done.verified), len(done.sent)
    _say([f"{done.where}: {num} files, {sum(done.verified.values()) / 2**30:.2f} GiB, each with its size and sha256: "
          f"{num_sent} sent, {num - num_sent} were there"])
    if done.failed:
        _say([f"  {len(done.failed)} files are not there as they are here; the same command tries them again"])
        raise typer.Exit(max(map(exit_code, done.failed.values())))
    _say([f"  `roadmill scan {done.where} --rig RIG` makes the recordings part of the dataset"])


@app.command()
def why(stage: Annotated[str | None, typer.Argument()] = None) -> None:
    """Say which stages will run, because of which knob, input or code, and what follows."""
    from stages.tools.why import why as reasons

    _say(reasons(_root(), stage))


@app.command()
def explain(name: Annotated[str, typer.Argument(metavar="SCENE", help="a scene, its token, or a drive")]) -> None:
    """Say for each step of one scene or drive whether its result is in the store, and what differs if not."""
    from stages.tools.why import explain as differences

    _say(differences(_root(), name))


@app.command()
def lineage(what: Annotated[str, typer.Argument(metavar="PATH|TOKEN", help="a file, a token, a sha256 or a name")],
            as_json: Annotated[bool, typer.Option("--json", help="the whole document")] = False) -> None:
    """Say what a file, frame, box, dataset or model was made from, and what was made from a recording."""
    import json

    from stages.tools import lineage_text
    from stages.tools.lineage import lineage as document_of

    document = document_of(_root(), what)
    _say([json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False)] if as_json
         else list(lineage_text.lines(document)))


@app.command()
def check(dataroot: Annotated[Path | None, typer.Argument(help="data/merge where left out")] = None) -> None:
    """Test a dataset by named rules: data/merge, or an exported nuScenes dataroot."""
    from stages.harness import Harness
    from stages.tools.check import check as findings_of

    if dataroot is None:
        dataroot = _root() / "data" / "merge"
        if not dataroot.is_dir():
            raise ConfigError(f"{dataroot} does not exist\n  `dvc repro merge` makes it, `dvc pull` fetches it; or "
                              "give a nuScenes dataroot: `roadmill check DATAROOT`")
    merged = (dataroot / "tables").is_dir()
    findings = findings_of(dataroot, open_pack=Harness(_root()).store.need if merged else None)
    for one in findings:
        first = f"{one.count}   first {one.token}: {one.sentence}" if one.count else "ok"
        typer.echo(f"{one.rule:<4} {one.name:<28} {first}")
    if any(one.count for one in findings):
        raise typer.Exit(DataError.exit_code)


@app.command()
def export(out: Path, split: Annotated[list[str], typer.Option(help="only these splits")] = [],  # noqa: B006
           scene: Annotated[list[str], typer.Option(help="only these scenes, by name or token")] = []) -> None:  # noqa: B006
    """Write the dataset, or a selection of its scenes, to OUT as a plain nuScenes dataroot."""
    from stages.harness import Harness
    from stages.tools.export import export as write_dataroot

    root = _root()
    done = write_dataroot(root / "data" / "merge", out, Harness(root).store.need, scenes=scene, splits=split)
    _say([f"{out}: {done.num_scenes} scenes, {done.num_files} files"])


@app.command()
def fetch(split: Annotated[list[str], typer.Option(help="only these splits")] = [],  # noqa: B006
          scene: Annotated[list[str], typer.Option(help="only these scenes, by name or token")] = []) -> None:  # noqa: B006
    """Bring the packs of the dataset, or of a selection, from the store to this machine."""
    from stages.tools.share import fetch as bring

    done = bring(_root(), split, scene)
    _say([f"{done.num_moved} packs fetched, {done.num_bytes / 2**30:.2f} GiB, {done.num_there} were here"])


@app.command()
def doctor() -> None:
    """Look at this machine, this checkout and this store, and say what is wrong and what helps."""
    from stages.tools.doctor import examine

    findings = examine(_root())
    _say([f"{'wrong' if text else 'ok':<6} {name}" + (f": {text}" if text else "") for name, text in findings])
    if any(text for _, text in findings):
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def record(name: str) -> None:
    """Keep the applied experiment: conf/experiment/NAME.yaml, a commit and the tag NAME."""
    from stages.tools.config import record as keep

    changes = keep(_root(), name)
    _say([f"recorded {name}: commit and tag, conf/experiment/{name}.yaml", *(f"  {line}" for line in changes)])


@app.command()
def simulate(out: Path, drives: int = 12, seconds: float = 20.0, seed: int = 0) -> None:
    """Write simulated drives to OUT: rosbag2 MCAP, with their truth and some human labels beside them."""
    from stages.tools.demo import simulate as write_drives

    write_drives(out, drives, seconds, seed)
    _say([f"{drives} drives in {out}", f"  `roadmill scan {out} --rig sim` makes them part of the dataset"])


@app.command()
def demo() -> None:
    """Simulate drives, scan them, run every stage and print the scores; recorded on the branch `demo`."""
    from stages.tools.demo import demo as show

    show(_root())
