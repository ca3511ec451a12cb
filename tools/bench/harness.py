"""Honest timing: variants in turn within one run, medians and spread, ratios to a base, an A/A control.

Two cores differ from run to run by more than most effects, so numbers are compared within one run only, and a
difference smaller than what the base shows against itself is called none.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Variant:
    """Something to time; its ratio is to the variant named `base`, or to the first of a run."""

    name: str
    run: Callable[[], object]
    base: str | None = None


@dataclass(frozen=True)
class Row:
    """Seconds per unit: median, quartiles, and the median of ratios to the base of the same turn.

    `interval` is where that median lies with 95 % by bootstrap over the turns; None where there is one figure alone.
    """

    name: str
    median: float
    low: float
    high: float
    ratio: float
    verdict: str
    interval: tuple[float, float] | None = None


def measure(
    variants: list[Variant],
    *,
    repeats: int = 15,
    warmup: int = 3,
    units: int = 1,
    fence: Callable[[], object] = lambda: None,
    rest: Callable[[], object] = lambda: None,
    progress: Callable[[int, int], object] = lambda done, of: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Times every variant once per turn; the first is timed twice, as the A/A control.

    Args:
        units: of work in one run of a variant; rows state the seconds of one.
        fence: called before and after each run, a barrier where several ranks time the same work.
        rest: called before each run, outside its time: ends what the run before left to be done.
        clock: seconds; `time.process_time` where others use the machine, and waiting for them is no part of the work.
    """
    base = variants[0]
    turn = [base, Variant(f"{base.name} again (A/A)", base.run), *variants[1:]]
    seconds: dict[str, list[float]] = {v.name: [] for v in turn}
    for number in range(warmup + repeats):
        # so that no variant always follows the same one; alike on all ranks
        for variant in random.Random(number).sample(turn, len(turn)):
            rest()
            fence()
            start = clock()
            variant.run()
            fence()
            if number >= warmup:
                seconds[variant.name].append((clock() - start) / units)
        progress(number + 1, warmup + repeats)
    bases = {variant.name: variant.base or base.name for variant in turn}
    return _rows(seconds, bases, control=turn[1].name)


def seconds_of(work: Callable[[], object]) -> float:
    """Of wall clock, that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def part(name: str, seconds: Sequence[float], whole: float) -> Row:
    """What was timed within runs of a variant; the ratio is its share of `whole` seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    shares = [each / whole for each in seconds]
    return Row(name, middle, low, high, middle / whole, "", bootstrapped(shares))


def _rows(
    seconds: Mapping[str, Sequence[float]], bases: Mapping[str, str], control: str
) -> list[Row]:
    ratios = {
        name: [x / b for x, b in zip(taken, seconds[bases[name]], strict=True)]
        for name, taken in seconds.items()
    }
    low, _, high = statistics.quantiles(ratios[control], n=4)
    # the control's own quartiles, never narrower than one per cent
    floor, ceiling = min(low, 0.99), max(high, 1.01)
    rows = []
    for name, taken in seconds.items():
        ratio = statistics.median(ratios[name])
        first, _, third = statistics.quantiles(taken, n=4)
        verdict = "faster" if ratio < floor else "slower" if ratio > ceiling else "no difference"
        rows.append(
            Row(
                name,
                statistics.median(taken),
                first,
                third,
                ratio,
                verdict,
                bootstrapped(ratios[name]),
            )
        )
    return rows


def bootstrapped(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The interval that holds the median with 95 % (Efron 1979): its percentiles over turns drawn anew."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)
