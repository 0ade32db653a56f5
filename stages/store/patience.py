"""How long a server is waited for."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """How long is waited for a server, and how often it is tried again.

    stalled_s  an answer of which nothing comes for this long is given up
    sending_s  a request with a body, until its answer begins; a part must have gone up by then
    retries    of one request, inside the client, until give_up_s have passed; a broken body is resumed
    attempts   of a whole operation, for what the client does not repeat
    """

    connect_s: float = 5.0
    stalled_s: float = 30.0
    sending_s: float = 120.0
    give_up_s: float = 120.0
    retries: int = 8
    attempts: int = 3
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0

    def wait(self, attempt: int) -> None:
        """Sleeps before attempt + 1: growing, and random, so that many workers do not come back at once."""
        time.sleep(min(self.longest_wait_s, self.first_wait_s * 2**attempt) * random.uniform(0.5, 1.0))
