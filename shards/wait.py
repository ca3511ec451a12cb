"""Waiting for what other processes do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    *,
    timeout_s: float = math.inf,
    poll_s: float = 0.05,
    pause: Callable[[float], object] = time.sleep,
) -> bool:
    """Asks every `poll_s` seconds until `condition()` is true; returns whether it was within `timeout_s`.

    It is asked at least once, and once more when the time is over. `pause` sleeps between two questions.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        pause(min(poll_s, left))
    return True
