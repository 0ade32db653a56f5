"""`roadmill store gc`: what nobody needs any more goes, a grace period after a tombstone said so."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

from stages.harness import Harness
from stages.lib.errors import ConfigError
from stages.store import gc
from stages.store.gc import Survey
from stages.store.store import Store
from stages.tools import roots

DAY_S = 86_400.0
MIN_GRACE_DAYS = 1.0
STEPS = {"goes": "deleted", "dooms": "doomed", "waits": "waiting"}
WOULD = {"goes": "would be deleted", "dooms": "would be doomed", "waits": "waiting"}


def collect(root: Path, clones: Sequence[Path], grace_days: float, dry_run: bool) -> list[str]:
    """Dooms what no ref of this clone and those named needs, deletes what was doomed a grace period ago; the lines that
    say so. A dry run only says what would happen.

    Raises ConfigError where the roots are not known for certain.
    """
    if grace_days < MIN_GRACE_DAYS:
        raise ConfigError(f"--grace={grace_days:g}: under {MIN_GRACE_DAYS:g} day a collection would take what a run is "
                          "about to use\n  give it longer than your longest run")
    store, clones = Harness(root).store, [root, *(clone.resolve() for clone in clones)]
    found = look(store, clones, grace_days)
    if not dry_run:
        gc.sweep(store, found)
        gc.bury(store, found)
    return [*table(found, WOULD if dry_run else STEPS), *_when(found), *_strangers(store, clones, found.now_s)]


def look(store: Store, clones: Sequence[Path], grace_days: float) -> Survey:
    """What a collection finds. Raises ConfigError where the roots are not known for certain, or name nothing."""
    live = roots.live(clones)
    if not live.results and next(iter(store.shared.names("ac/")), None):
        raise ConfigError(f"no ref of {', '.join(map(str, clones))} names any result, so all of {store.shared.where} "
                          "would go\n  --clone names the clones whose data it keeps")
    return gc.survey(store, live, grace_days * DAY_S)


def table(found: Survey, steps: dict[str, str]) -> list[str]:
    """A line for each step and op: results, blobs, GiB."""
    lines = [f"{'':<18}{'op':<12}{'results':>9}{'blobs':>9}{'GiB':>10}"]
    for (step, op), count in sorted(found.tally.items(), key=lambda one: (list(STEPS).index(one[0][0]), one[0][1])):
        lines.append(f"{steps[step]:<18}{op:<12}{count['results']:>9}{count['blobs']:>9}"
                     f"{count['bytes'] / 2**30:>10.3f}")
    return lines if len(lines) > 1 else ["nothing is dead"]


def _when(found: Survey) -> list[str]:
    lines = [f"waiting until {_day(one.made_s + found.grace_s)}: {len(one.doomed)} names" for one in found.waiting]
    if len(found.dooms):
        lines.append(f"doomed today: {len(found.dooms)} names; `roadmill store gc` after "
                     f"{_day(found.now_s + found.grace_s)} deletes what of them is still dead")
    return lines


def _strangers(store: Store, clones: Sequence[Path], now_s: float) -> list[str]:
    """Names the clones that ran stages on this store and were not told of."""
    told = {(platform.node(), str(clone)) for clone in clones}
    others = [f"  {host}:{folder}, last run {(now_s - used_s) / DAY_S:.0f} days ago"
              for host, folder, used_s in store.clones() if (host, folder) not in told]
    if not others:
        return []
    return ["other clones use this store; what only they have, and have not pushed to git and DVC, is dead to this "
            "collection: --clone names them", *others]


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
