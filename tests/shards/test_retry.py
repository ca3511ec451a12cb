"""Trying again: pauses with full jitter, a budget of tries and of seconds, and an error that says all."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import StoreError
from shards.storage import retry
from shards.storage.retry import Effort, RetryPolicy, TransientError, with_retries


class _Clock:
    """Time that passes only in pauses and tries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pauses = 0.0, list[float]()
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.time, "sleep", self._pause)

    def _pause(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


def _failing(times: float, clock: _Clock, takes: float = 0.0) -> Callable[[], str]:
    done = 0

    def attempt() -> str:
        nonlocal done
        clock.now += takes
        done += 1
        if done <= times:
            raise TransientError(f"reason {done % 2}")
        return f"try {done}"

    return attempt


@given(failures=st.integers(0, 8), seconds=st.floats(1.0, 1e6))
def test_what_passes_within_the_budget_is_never_seen(failures: int, seconds: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock, policy = _Clock(patch), RetryPolicy(attempts=9, first=0.001, longest=0.01)
        found = with_retries(_failing(failures, clock), "it", policy, lambda: seconds)
        assert found == f"try {failures + 1}"
        assert len(clock.pauses) == failures
        bounds = [min(0.01, 0.001 * 2**n) for n in range(failures)]
        assert all(0 <= p <= bound for p, bound in zip(clock.pauses, bounds, strict=True))


def test_pauses_are_spread_over_all_of_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform on [0, bound]: mean 1/2 and variance 1/12 of it, within five standard errors of 2000 draws."""
    monkeypatch.setattr(retry, "_jitter", random.Random(0))
    clock, policy = _Clock(monkeypatch), RetryPolicy(attempts=2001, first=1.0, longest=1.0)
    with_retries(_failing(2000, clock), "it", policy, lambda: math.inf)
    mean = sum(clock.pauses) / 2000
    variance = sum((p - mean) ** 2 for p in clock.pauses) / 2000
    assert abs(mean - 0.5) < 5 * (1 / 12 / 2000) ** 0.5
    assert abs(variance - 1 / 12) < 5 * (1 / 180 / 2000) ** 0.5
    assert len(set(clock.pauses)) == 2000


def test_after_the_last_try_the_error_says_what_was_seen_and_how_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = _Clock(monkeypatch)
    with pytest.raises(StoreError) as raised:
        with_retries(_failing(99, clock), "s3://b/k", RetryPolicy(attempts=5), lambda: math.inf)
    assert str(raised.value).startswith("s3://b/k: gave up after 5 tries in ")
    assert str(raised.value).endswith("; seen: 3 x reason 1, 2 x reason 0")
    assert len(clock.pauses) == 4


def test_no_try_begins_after_the_budget_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    with pytest.raises(StoreError, match="gave up after 4 tries"):
        with_retries(_failing(99, clock, takes=3.0), "it", RetryPolicy(first=1e-6), lambda: 10.0)
    assert 12.0 <= clock.now < 12.1


def test_other_errors_pass_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)

    def attempt() -> None:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        with_retries(attempt, "it", RetryPolicy(), lambda: math.inf)
    assert clock.pauses == []


_LONG = RetryPolicy(attempts=99, seconds=1e9, first=1e6, longest=1e6)


@pytest.mark.timeout(60)
def test_what_one_thread_gave_up_all_give_up_and_nothing_is_begun_after() -> None:
    effort, began, never = Effort(), threading.Semaphore(0), []

    def away() -> None:
        began.release()
        raise TransientError("away")

    with ThreadPoolExecutor(2) as pool:
        asleep = [
            pool.submit(effort.do, lambda: with_retries(away, "it", _LONG, lambda: math.inf))
            for _ in range(2)
        ]
        for _ in asleep:
            began.acquire()  # both have tried, and would try again in days
        reason = PermissionError("refused")
        with pytest.raises(PermissionError) as raised:
            effort.do(lambda: (_ for _ in ()).throw(reason))
        late = pool.submit(effort.do, lambda: never.append(1))
        assert [future.exception() for future in [*asleep, late]] == [reason] * 3
    assert raised.value is reason and never == []
    assert Effort().do(lambda: 7) == 7  # another is none the worse


@pytest.mark.timeout(60)
def test_an_effort_ends_where_it_is_told_to_and_the_first_reason_stays() -> None:
    effort = Effort()
    threading.Timer(0.1, lambda: effort.end(ValueError("closed"))).start()
    with pytest.raises(ValueError, match="closed"):
        effort.do(lambda: with_retries(_always, "it", _LONG, lambda: math.inf))
    effort.end(KeyError("later"))
    with pytest.raises(ValueError, match="closed"):
        effort.do(int)


def _always() -> None:
    raise TransientError("away")
