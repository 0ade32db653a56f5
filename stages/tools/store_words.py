"""`roadmill store WORD`: what people type about the scene store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.lib.errors import RemoteError
from stages.tools.programs import checkout

Clones = Annotated[list[Path], typer.Option(help="another clone whose refs and working tree need the store; this one "
                                                 "always counts")]
Grace = Annotated[float, typer.Option(metavar="DAYS", help="how long after its tombstone what is dead is deleted: "
                                                           "longer than your longest run")]
store_app = typer.Typer(name="store", no_args_is_help=True, help="Look after the scene store.")


@store_app.command()
def use(name: Annotated[str, typer.Argument(help="conf/store/NAME.yaml")]) -> None:
    """Make NAME the store of all clones, and its dvc_remote DVC's remote; commit .dvc/config to tell the team."""
    from stages.tools.share import use as choose

    choose(checkout(), name)
    typer.echo(f"the team's store is {name}\n"
               "  `git add .dvc/config conf/store` and commit tell the team; ROADMILL_STORE overrides it on a machine")


@store_app.command()
def copy(source: str, target: str,
         ref: Annotated[str, typer.Option(help="the git ref whose dataset is copied")] = "HEAD") -> None:
    """Copy what a git ref needs from one store to another (names of conf/store); what is there is passed over."""
    from stages.tools.share import copy as bring

    done = bring(checkout(), source, target, ref)
    typer.echo(f"{done.num_moved} results copied, {done.num_bytes / 2**30:.2f} GiB, {done.num_there} were there")


@store_app.command()
def explain(name: Annotated[str, typer.Argument(metavar="SCENE", help="a scene, its token, or a drive")]) -> None:
    """The same as `roadmill explain`."""
    from stages.tools.why import explain as differences

    typer.echo("\n".join(differences(checkout(), name)))


@store_app.command()
def pin(stage: str, digest: Annotated[str | None, typer.Argument(help="of the code; default: what made the stage's "
                                                                  "data as it is now")] = None) -> None:
    """Go on using the results of older code of a stage: "same results, trust me"."""
    from stages.tools import config
    from stages.tools.why import code_in_use

    root = checkout()
    digest = digest or code_in_use(root, stage)
    config.set_cache(root, "code_pins", {**config.cache(root)["code_pins"], stage: digest})
    typer.echo(f"cache.code_pins.{stage}={digest}\n  `roadmill store unpin {stage}` takes the code as it is")


@store_app.command()
def unpin(stage: str) -> None:
    """Take the code of a stage as it is again."""
    from stages.harness import known_stage
    from stages.tools import config

    root, stage = checkout(), known_stage(stage)
    pins = config.cache(root)["code_pins"]
    config.set_cache(root, "code_pins", {name: digest for name, digest in pins.items() if name != stage})
    typer.echo(f"{stage} is {'no longer' if stage in pins else 'not'} pinned")


@store_app.command()
def salt(text: Annotated[str, typer.Argument(help="any other than before; '' is the first")]) -> None:
    """Disown every result made before, for everybody who takes this commit: nothing made with another salt is used."""
    from stages.tools import config

    root = checkout()
    config.set_cache(root, "salt", text)
    typer.echo(f"cache.salt={text!r}\n  `dvc repro` makes everything again; what was made before stays in the store")


@store_app.command()
def gc(clone: Clones = [],  # noqa: B006
       grace: Grace = 30.0,
       dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would happen")] = False) -> None:
    """Doom what no git ref needs, and delete what was doomed a grace period ago and that nobody has used since."""
    from stages.tools.collect import collect

    typer.echo("\n".join(collect(checkout(), clone, grace, dry_run)))


@store_app.command()
def stats(clone: Clones = [],  # noqa: B006
          grace: Grace = 30.0) -> None:
    """Say who needs how much of the store, and what a gc would free."""
    from stages.tools.stats import stats as count

    typer.echo("\n".join(count(checkout(), clone, grace)))


@store_app.command()
def fsck(repair: Annotated[bool, typer.Option("--repair", help="bring back what can be had, forget the rest")] = False
         ) -> None:
    """Read every byte of the store, and say what is damaged, missing or nobody's."""
    from stages.tools.damage import examine

    lines, is_right = examine(checkout(), repair)
    typer.echo("\n".join(lines))
    if not is_right:
        raise typer.Exit(RemoteError.exit_code)
