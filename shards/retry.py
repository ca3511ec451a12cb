"""Trying again what may well work the next time: full jitter, within a budget, and then an error that says all.

The pause before try n + 1 is uniform on [0, min(longest, first * 2^n)], the "full jitter" of M. Brooker,
"Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): ranks that failed together do not come
back together.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shards.errors import StoreError

T = TypeVar("T")

# not the global generator, which a program may have seeded alike on all ranks
_jitter = random.SystemRandom()


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long one request is worth trying. Seconds, but for `attempts`."""

    attempts: int = 12
    seconds: float = 120.0  # from the first try to the start of the last
    unknown: float = 10.0  # the same while no connection has ever stood: its address may be wrong
    first: float = 0.1
    longest: float = 20.0
    connect: float = 5.0  # until a connection stands
    silence: float = 20.0  # between two bytes of an answer


class AgainError(Exception):
    """One try failed in a way that the next one may not; the message says what was seen."""


def persist(
    attempt: Callable[[], T], what: str, patience: Patience, budget: Callable[[], float]
) -> T:
    """`attempt()`, tried again while it raises AgainError; other errors pass through at once.

    Args:
        what: the object or place this is about, for the error.
        budget: seconds that may pass before the last try begins; asked after each failure.

    Raises:
        StoreError: the budget is spent. It names `what`, what was seen, and how often.
    """
    seen: Counter[str] = Counter()
    began = time.monotonic()
    while True:
        try:
            return attempt()
        except AgainError as error:
            seen[str(error)] += 1
            tries, spent = seen.total(), time.monotonic() - began
            bound = min(patience.longest, patience.first * 2.0 ** min(tries - 1, 60))
            pause = _jitter.uniform(0.0, bound)
            if tries >= patience.attempts or spent + pause > budget():
                reasons = ", ".join(f"{n} x {reason}" for reason, n in seen.most_common())
                raise StoreError(
                    f"{what}: gave up after {tries} tries in {spent:.1f} s; seen: {reasons}"
                ) from error
        time.sleep(pause)
