"""How long a run will take: closed formulas for faults, checkpoints and time limits. Seconds throughout.

A job begins with `start_s` seconds before its first step. It saves after every `interval_s` seconds of training, which
takes `save_s`. Failures come at random, independently of each other, at `failures_per_s` while a job has its nodes; one
loses what is not saved. Preemptions do, too, and time limits come by the clock: both save first and lose nothing. What
follows either is the next job, `gap_s` seconds later.

With failures alone the time to train W seconds is Daly's, also for failures while a job starts: with M the mean time
between failures, M e^(S/M) (e^((T+C)/M) - 1) for each interval T with its save C (J. T. Daly, "A higher order estimate
of the optimum checkpoint interval for restart dumps", 2006, equation 13). Ends that lose nothing add a start and a save
each; how many of them are limits follows from how often a job lives so long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# until the number of jobs is found: each round adds the time that the jobs of the last one cost
_ROUNDS = 300
# time limits from which on their mean number will do
_MANY = 1000
# of an exponent, beyond which a run never ends
_NEVER = 700.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run has before it, and what things cost here."""

    # of training, saves and starts left out
    work_s: float
    # of training between two saves
    interval_s: float
    save_s: float
    start_s: float
    # from the end of a job to the beginning of the one that follows
    gap_s: float
    # from the beginning of a job until it is warned of its time limit; None without one
    limit_s: float | None = None
    # that the present job has had, its start included; None where none trains
    used_s: float | None = None
    failures_per_s: float = 0.0
    preemptions_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is to be expected; infinite where failures come faster than a job can save."""

    # until the last save, gaps between jobs included
    wall_s: float
    # of it, with nodes
    allocated_s: float
    # expected numbers of jobs, the present one included, and of how they end
    jobs: float
    failures: float
    preemptions: float
    limits: float
    # training that is kept, of all time
    effective: float


def forecast(costs: Costs) -> Forecast:
    """Returns what is to be expected of the run."""
    if costs.work_s <= 0:
        return _all(0.0, effective=1.0)
    again = _start_s(costs)
    if costs.limit_s is not None and costs.limit_s <= costs.start_s:
        return _NEVER_ENDS
    base = (again if costs.used_s is None else 0.0) + _with_failures(costs)
    if not math.isfinite(base):
        return _NEVER_ENDS
    allocated = base
    for _ in range(_ROUNDS):
        limits = _limits(costs, allocated)
        ends = limits + costs.preemptions_per_s * allocated
        found = base + ends * (costs.save_s + again)
        if math.isclose(found, allocated, rel_tol=1e-7) or found == math.inf:
            break
        allocated = found
    if not math.isclose(found, allocated, rel_tol=1e-7):
        return _NEVER_ENDS
    failures, preemptions = (
        rate * allocated for rate in (costs.failures_per_s, costs.preemptions_per_s)
    )
    ends = failures + preemptions + limits
    wall = allocated + costs.gap_s * ends
    return Forecast(
        wall_s=wall,
        allocated_s=allocated,
        jobs=1 + ends,
        failures=failures,
        preemptions=preemptions,
        limits=limits,
        effective=costs.work_s / wall,
    )


def _all(value: float, *, effective: float) -> Forecast:
    return Forecast(
        wall_s=value,
        allocated_s=value,
        jobs=value,
        failures=value,
        preemptions=value,
        limits=value,
        effective=effective,
    )


_NEVER_ENDS = _all(math.inf, effective=0.0)


def _start_s(costs: Costs) -> float:
    """With nodes, until a job has come to its first step, failures on the way included."""
    return _grown(costs.failures_per_s, costs.start_s)


def _with_failures(costs: Costs) -> float:
    """With nodes, for all intervals and their saves."""
    whole, rest = divmod(costs.work_s, costs.interval_s)
    if rest < 1e-6 * costs.interval_s:
        rest = 0.0
    found = whole * _interval_s(costs, costs.interval_s + costs.save_s)
    return found + (_interval_s(costs, rest + costs.save_s) if rest else 0.0)


def _interval_s(costs: Costs, length: float) -> float:
    """Until so many seconds went by without a failure in a job that trains."""
    rate = costs.failures_per_s
    if rate * (costs.start_s + length) > _NEVER:
        return math.inf
    return math.exp(rate * costs.start_s) * _grown(rate, length)


def _grown(rate: float, length: float) -> float:
    """M (e^(length / M) - 1), which is `length` without failures."""
    if rate * length > _NEVER:
        return math.inf
    return math.expm1(rate * length) / rate if rate else length


def _limits(costs: Costs, allocated: float) -> float:
    """The expected number of time limits that are reached: ends in between set the clock of a job back.

    A limit is reached at time t where nothing has ended a job for k times the limit before t, k = 1, 2, ...: from the
    beginning with probability e^(-h k L), and later at the density h e^(-h k L).
    """
    if costs.limit_s is None:
        return 0.0
    rate = costs.failures_per_s + costs.preemptions_per_s
    each = costs.limit_s + costs.save_s
    used = costs.used_s or 0.0
    if allocated > _MANY * each:
        return allocated * (rate / math.expm1(rate * each) if rate * each > 1e-9 else 1 / each)
    found, k = 0.0, 1
    while (left := allocated - k * each) > 0 or left + used > 0:
        lives = math.exp(-rate * k * each)
        # the present job is older
        first = math.exp(-rate * max(0.0, k * each - used)) if left + used > 0 else 0.0
        found += first + rate * max(0.0, left) * lives
        if lives < 1e-12:
            break
        k += 1
    return found


def best_interval_s(save_s: float, failures_per_s: float) -> float | None:
    """Returns the seconds of training between saves that cost least, None where nothing fails.

    Young's sqrt(2 C M) with Daly's higher-order terms (2006, equation 37).
    """
    if not failures_per_s:
        return None
    between = 1 / failures_per_s
    if save_s >= 2 * between:
        return between
    ratio = math.sqrt(save_s / (2 * between))
    return math.sqrt(2 * save_s * between) * (1 + ratio / 3 + ratio**2 / 9) - save_s


End = Literal["failure", "preemption"]


def given(costs: Costs, ends: Sequence[tuple[float, End]]) -> float:
    """Returns the seconds until the last save where it is known when jobs end, in seconds from now.

    An end that comes between two jobs, or with the end of one, ends none. Infinite where a job reaches its time limit
    before its first step.
    """
    if costs.limit_s is not None and costs.limit_s <= costs.start_s:
        return math.inf
    clock, saved, used = 0.0, 0.0, costs.used_s
    ahead = sorted(ends)
    while True:
        ahead = [each for each in ahead if each[0] > clock]
        at, kind = ahead[0] if ahead else (math.inf, "failure")
        if costs.limit_s is not None and (limit := clock + costs.limit_s - (used or 0.0)) < at:
            at, kind = limit, "preemption"
        begins = clock + (costs.start_s if used is None else 0.0)
        saved, clock = _job(costs, saved, begins, at, kind)
        if saved >= costs.work_s:
            return clock
        clock, used = clock + costs.gap_s, None


def _job(costs: Costs, saved: float, begins: float, ends: float, how: End) -> tuple[float, float]:
    """Training that is saved when a job is over, and when that is; it makes its first step at `begins`."""
    clock = begins
    while clock < ends:
        # saves stand where they would without any end
        whole = math.floor(saved / costs.interval_s + 1e-9) + 1
        part = min(whole * costs.interval_s, costs.work_s) - saved
        if clock + part + costs.save_s > ends:
            if how == "failure":
                return saved, ends
            part = min(part, ends - clock)
            return saved + part, clock + part + costs.save_s
        clock, saved = clock + part + costs.save_s, saved + part
        if costs.work_s - saved < 1e-9:
            return costs.work_s, clock
    return saved, ends
