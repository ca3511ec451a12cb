"""How long runs take: the closed formulas against textbook values, and against a simulation that knows none of them."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from launcher.reconcile.forecast import Costs, best_interval_s, forecast, given

PLAIN = Costs(work_s=3600.0, interval_s=600.0, save_s=5.0, start_s=30.0, gap_s=10.0)


def simulated(costs: Costs, draw: random.Random) -> float:
    """Seconds of one run, second by second of what happens in it: jobs, steps of training, saves, faults."""
    step = 1.0
    clock = done = kept = 0.0
    while True:
        age = 0.0
        phase, left = "start", costs.start_s
        ended = ""
        asked = False
        while not ended:
            # at most one fault a step, by the chance that one comes in it
            length = min(step, left)
            clock, age, left = clock + length, age + length, left - length
            if phase == "train":
                done += length
            if draw.random() < -math.expm1(-costs.failures_per_s * length):
                ended = "failure"
                continue
            asked = asked or draw.random() < -math.expm1(-costs.preemptions_per_s * length)
            asked = asked or (costs.limit_s is not None and age >= costs.limit_s)
            if asked and phase == "train":
                phase, left = "last save", costs.save_s
            elif asked and phase == "start":
                ended = "asked"
            elif left <= 1e-9:
                if phase in ("save", "last save"):
                    kept = done
                    if kept >= costs.work_s - 1e-6:
                        return clock
                    if phase == "last save" or asked:
                        ended = "asked"
                    phase = "train"
                elif phase == "train":
                    phase, left = "save", costs.save_s
                else:
                    phase = "train"
                if phase == "train":
                    whole = math.floor(done / costs.interval_s + 1e-9) + 1
                    left = min(whole * costs.interval_s, costs.work_s) - done
        done = kept
        clock += costs.gap_s


CASES = {
    "nothing happens": PLAIN,
    "failures": replace(PLAIN, failures_per_s=1 / 900),
    "often, and slow to start": replace(
        PLAIN, failures_per_s=1 / 400, start_s=90.0, interval_s=200.0
    ),
    "failures and slow saves": replace(
        PLAIN, failures_per_s=1 / 600, save_s=60.0, interval_s=200.0
    ),
    "limits": replace(PLAIN, limit_s=1000.0),
    "preemptions": replace(PLAIN, preemptions_per_s=1 / 500),
    "all of it": replace(
        PLAIN, limit_s=1500.0, failures_per_s=1 / 1200, preemptions_per_s=1 / 1500, gap_s=60.0
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forecast_is_the_mean_of_a_simulation(name: str) -> None:
    draw, costs = random.Random(1), CASES[name]
    runs = 1 if name in ("nothing happens", "limits") else 60
    mean = sum(simulated(costs, draw) for _ in range(runs)) / runs
    assert forecast(costs).wall_s == pytest.approx(mean, rel=0.1)


def test_forecast_with_failures_alone_is_dalys_formula() -> None:
    costs = replace(PLAIN, failures_per_s=1 / 900, gap_s=0.0)
    m, restart, length, count = 900.0, 30.0, 605.0, 6
    daly = m * math.exp(restart / m) * (math.exp(length / m) - 1) * count
    # and the first start
    assert forecast(costs).wall_s == pytest.approx(daly + m * math.expm1(restart / m))


def test_forecast_without_failures_counts_whole_jobs() -> None:
    found = forecast(PLAIN)
    assert found.wall_s == found.allocated_s == 30 + 3600 + 6 * 5
    assert (found.jobs, found.failures) == (1, 0)
    assert found.effective == pytest.approx(3600 / 3660)
    # 1000 - 30 s a job are for training and saves
    limited = forecast(replace(PLAIN, limit_s=1000.0))
    assert (limited.jobs, limited.limits) == (4, 3)
    assert limited.wall_s == pytest.approx(3660 + 3 * (30 + 5 + 10))
    # the present job has begun, and its limit is near
    running = forecast(replace(PLAIN, limit_s=1000.0, used_s=900.0))
    assert running.jobs == 5


def test_forecast_is_infinite_where_failures_come_faster_than_saves() -> None:
    found = forecast(replace(PLAIN, failures_per_s=1.0, interval_s=1e4))
    assert found.wall_s == math.inf and found.effective == 0
    short = replace(PLAIN, limit_s=PLAIN.start_s)
    assert forecast(short).wall_s == given(short, []) == math.inf
    assert forecast(replace(PLAIN, preemptions_per_s=1.0)).wall_s == math.inf


def test_forecast_of_a_very_long_run_has_limits_at_their_mean_rate() -> None:
    costs = replace(PLAIN, limit_s=1000.0, work_s=1e7)
    assert forecast(costs).jobs == pytest.approx(1e7 * (605 / 600) / 970, rel=2e-3)
    faulty = replace(costs, failures_per_s=1e-4)
    found = forecast(faulty)
    assert found.limits == pytest.approx(found.allocated_s * 1e-4 / math.expm1(1e-4 * 1005))


@pytest.mark.parametrize("save_s", [0.2, 5.0, 60.0])
@pytest.mark.parametrize("between_s", [300.0, 5000.0])
def test_best_interval_costs_least_of_all(save_s: float, between_s: float) -> None:
    costs = replace(PLAIN, save_s=save_s, failures_per_s=1 / between_s, work_s=1e6)
    best = best_interval_s(save_s, 1 / between_s)
    assert best is not None
    at_best = forecast(replace(costs, interval_s=best)).wall_s
    found = min(forecast(replace(costs, interval_s=best * 1.02**i)).wall_s for i in range(-80, 81))
    assert at_best == pytest.approx(found, rel=2e-3)


def test_best_interval_without_failures_is_none() -> None:
    assert best_interval_s(5.0, 0.0) is None


def test_given_ends_cost_what_they_lose() -> None:
    alone = given(PLAIN, [])
    assert alone == 3660
    # at 1,000 s: 30 s start, a save at 635, 365 s since are lost, 10 s gap, 30 s start
    assert given(PLAIN, [(1000.0, "failure")]) == pytest.approx(alone + 365 + 40)
    # a preemption saves what it has
    assert given(PLAIN, [(1000.0, "preemption")]) == pytest.approx(alone + 5 + 40)
    # in a save, which is finished
    assert given(PLAIN, [(632.0, "preemption")]) == pytest.approx(alone + 40)
    # in the gap, nothing is there to end
    assert given(PLAIN, [(1000.0, "failure"), (1005.0, "failure")]) == pytest.approx(alone + 405)
    # in the start
    assert given(PLAIN, [(20.0, "failure")]) == pytest.approx(alone + 30)
    assert (
        given(replace(PLAIN, limit_s=1000.0), []) == forecast(replace(PLAIN, limit_s=1000.0)).wall_s
    )


def test_given_random_ends_are_on_average_the_forecast() -> None:
    draw, costs = random.Random(2), CASES["all of it"]
    runs, walls = 300, []
    for _ in range(runs):
        clock, ends = 0.0, []
        while clock < 30 * costs.work_s:
            rates = costs.failures_per_s, costs.preemptions_per_s
            clock += draw.expovariate(sum(rates))
            kind = "failure" if draw.random() < rates[0] / sum(rates) else "preemption"
            ends.append((clock, kind))
        walls.append(given(costs, ends))
    assert sum(walls) / runs == pytest.approx(forecast(costs).wall_s, rel=0.1)
