"""JSON documents that come with the data: labels, calibrations, results. Bounded in size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.lib.errors import DataError

# An hour of labels at 2 Hz with 100 objects in view takes 2e8 bytes. Parsed, a document takes ten times as much.
MAX_BYTES = 2**28


def read(path: Path, remedy: str) -> Any:
    """What a JSON file says. Raises DataError, ending in `remedy`, where it is too large or deep, or not JSON."""
    num_bytes = path.stat().st_size
    if num_bytes > MAX_BYTES:
        raise DataError(f"{path}: is {num_bytes} bytes of JSON, at most {MAX_BYTES} are read\n  {remedy}")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise DataError(f"{path}: is JSON nested too deep to be read\n  {remedy}") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})\n  {remedy}") from None
