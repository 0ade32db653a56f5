"""`python -m tests.interrupted FOLDER SIGNAL:STEP ... `: one action of the train stage, attempt after attempt.

FOLDER/action is a pickled (cfg, item, inputs). Each word is an attempt that gets the signal once it has done the step,
the last attempt gets none and writes FOLDER/out. Prints how each ended, a line each.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

from stages import train
from stages.lib.checkpoints import Checkpoints
from stages.store.folder import Folder

EVERY_S = {"SIGKILL": 0.0, "SIGTERM": 1e9}


class Told(Checkpoints):
    """Checkpoints that say to a pipe which step was done."""

    def __init__(self, folder: Folder, every_s: float, pipe: int) -> None:
        super().__init__(folder, "0" * 64, every_s)
        self._pipe = pipe

    def offer(self, step, state) -> None:
        """The same, and the step."""
        os.write(self._pipe, bytes([step]))
        super().offer(step, state)


def attempt(folder: Path, out: Path, every_s: float, pipe: int) -> None:
    """Runs the action from its checkpoints on."""
    cfg, item, inputs = pickle.loads((folder / "action").read_bytes())
    out.mkdir(exist_ok=True)
    with Told(Folder(folder / "store"), every_s, pipe) as checkpoints:
        train.run(cfg, item, inputs, out, checkpoints)


def main() -> None:
    """Forks before torch has computed anything: each attempt is as fresh as a new process."""
    folder = Path(sys.argv[1])
    for name, _, step in (word.partition(":") for word in [*sys.argv[2:], ""]):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            attempt(folder, folder / ("torn" if name else "out"), EVERY_S.get(name, 1e9), writing)
            os._exit(0)
        os.close(writing)
        while seen := os.read(reading, 1):
            if name and seen[0] >= int(step):
                os.kill(pid, getattr(signal, name))
                name = ""
        os.close(reading)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
