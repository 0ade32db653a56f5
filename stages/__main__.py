"""`python -m stages <stage>`: what dvc.yaml runs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from stages.harness import STAGES, Harness
from stages.lib.secrets import redacted
from stages.runners.local import die_with_parent
from stages.runners.run import exit_code, told


def guarded(work: Callable[[], None]) -> int:
    """The exit code of `work`: our errors become one to three lines, others keep their traceback."""
    try:
        work()
    except Exception as error:
        if not told(error) or os.environ.get("ROADMILL_TRACEBACK") == "1":
            print(redacted(traceback.format_exc()), file=sys.stderr)
        if told(error):
            print(told(error), file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("stopped; what was done is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    """Runs the stage that the command line names."""
    if len(sys.argv) != 2:
        print(f"usage: python -m stages STAGE, one of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    die_with_parent(os.getppid())
    return guarded(lambda: Harness(Path.cwd()).run(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
