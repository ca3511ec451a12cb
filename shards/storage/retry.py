"""Retries with full jitter within a budget, then raises an error that lists what was seen.

The pause before try n + 1 is uniform on [0, min(longest, first * 2^n)], the "full jitter" of M. Brooker,
"Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), so that ranks that failed together do not retry
together. Threads that work on one thing share an `Effort`: when one of them gives up, or `end` is called, all stop, and
none of them stays asleep.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from shards.errors import StoreError

T = TypeVar("T")

# not the global generator, which a program may have seeded alike on all ranks
_jitter = random.SystemRandom()


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long one request is worth trying. Seconds, but for `attempts`."""

    attempts: int = 12
    seconds: float = 120.0  # from the first try to the start of the last
    unknown: float = 10.0  # the same while no connection has ever stood: its address may be wrong
    first: float = 0.1
    longest: float = 20.0
    connect: float = 5.0  # until a connection stands
    silence: float = 20.0  # between two bytes of an answer


class TransientError(Exception):
    """One try failed in a way that the next one may not; the message says what was seen."""


class Effort:
    """Work in several threads that is given up together: with the first part that fails, or by `end`."""

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._over = threading.Event()

    def end(self, error: Exception) -> None:
        """Gives up what is under way, at its next pause, and what was not begun; the first `error` counts."""
        self._error = self._error or error
        self._over.set()

    def do(self, work: Callable[[], T]) -> T:
        """`work()`, unless the effort is over; then, as when `work` fails, raises why it is."""
        token = _effort.set(self)
        try:
            self.pause(0.0)
            return work()
        except Exception as error:
            self.end(error)
            self.pause(0.0)
            raise
        finally:
            _effort.reset(token)

    def pause(self, seconds: float) -> None:
        """Sleeps; raises why the effort is over as soon as it is."""
        if self._over.wait(seconds):
            assert self._error is not None
            raise self._error


_effort: ContextVar[Effort | None] = ContextVar("effort", default=None)


def pause(seconds: float) -> None:
    """Sleeps; as part of an `Effort` no longer than that lasts."""
    effort = _effort.get()
    if effort is None:
        time.sleep(seconds)
    else:
        effort.pause(seconds)


def with_retries(
    attempt: Callable[[], T], what: str, policy: RetryPolicy, budget: Callable[[], float]
) -> T:
    """`attempt()`, tried again while it raises TransientError; other errors pass through at once.

    Args:
        what: the object or place this is about, for the error.
        budget: seconds that may pass before the last try begins; asked after each failure.

    Raises:
        StoreError: the budget is spent. It names `what`, what was seen, and how often.
        Exception: the effort that this is part of is over; why it is.
    """
    seen: Counter[str] = Counter()
    began = time.monotonic()
    while True:
        try:
            return attempt()
        except TransientError as error:
            seen[str(error)] += 1
            tries, spent = seen.total(), time.monotonic() - began
            bound = min(policy.longest, policy.first * 2.0 ** min(tries - 1, 60))
            length = _jitter.uniform(0.0, bound)
            if tries >= policy.attempts or spent + length > budget():
                reasons = ", ".join(f"{n} x {reason}" for reason, n in seen.most_common())
                raise StoreError(
                    f"{what}: gave up after {tries} tries in {spent:.1f} s; seen: {reasons}"
                ) from error
        pause(length)
