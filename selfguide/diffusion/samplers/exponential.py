"""Samplers that are exact where the data estimate stands still: DDIM and the DPM-Solvers.

sigma = b / a is infinite in pure noise and its logarithm in data: the formulas are written so that neither appears.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from selfguide.diffusion.paths import Path
from selfguide.diffusion.samplers.schedule import (
    Estimator,
    Point,
    Schedule,
    StepNoise,
    at_level,
    fixed_steps,
)
from shards.errors import UserError


@fixed_steps
def ddim(
    estimate: Estimator,
    x: Tensor,
    schedule: Schedule,
    seeds: Tensor | None,
    *,
    eta: float = 0.0,
    clip: float | None = None,
    clipped_noise: Literal["reread", "kept"] = "reread",
) -> Iterator[Tensor]:
    """x_s = a_s x0 + sqrt(b_s^2 - up^2) eps + up z, up = eta b_s sqrt(1 - (sigma_s / sigma_t)^2) (Song et al. 2021).

    On a variance-preserving path `up` is the sigma of the paper's eq. 16; eta = 1 is ancestral sampling. `clip` keeps
    the data estimate within +-clip; the noise beside it is read off it again, or kept as the network said it.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta} must be in [0, 1]: 0 deterministic, 1 ancestral")
    noise = StepNoise(f"ddim with eta={eta}", seeds, x) if eta else None
    for step in schedule.steps():
        now, then = step.now, step.then
        x0, eps, _ = estimate(x, now.tau)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            eps = (x - now.a * x0) / now.b if clipped_noise == "reread" else eps
        renewed = eta**2 * (1 - _ratio(now, then) ** 2)  # the share of the noise's variance
        x = then.a * x0 + then.b * math.sqrt(1 - renewed) * eps
        if noise is not None and renewed:
            x = x + then.b * math.sqrt(renewed) * noise(step.number)
        yield x


@fixed_steps
def dpm1(
    estimate: Estimator, x: Tensor, schedule: Schedule, seeds: Tensor | None
) -> Iterator[Tensor]:
    """DPM-Solver-1 (Lu et al. 2022, eq. 3.7), which is DDIM: (a_t / a_s) x - b_t (e^h - 1) eps = a_t x0 + b_t eps."""
    for step in schedule.steps():
        x0, eps, _ = estimate(x, step.now.tau)
        x = step.then.a * x0 + step.then.b * eps
        yield x


@fixed_steps
def dpm2(
    estimate: Estimator, x: Tensor, schedule: Schedule, seeds: Tensor | None
) -> Iterator[Tensor]:
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1), its midpoint halfway in lambda = ln(a / b).

    2N evaluations, one fewer for each end of the path where lambda is infinite (data, pure noise): a step from or to
    there has no midpoint and is of order 1.
    """
    for step in schedule.steps():
        x = _second_order(estimate, x, schedule.path, step.now, step.then)
        yield x


@fixed_steps
def dpm_fast(
    estimate: Estimator, x: Tensor, schedule: Schedule, seeds: Tensor | None
) -> Iterator[Tensor]:
    """DPM-Solver-fast (Lu et al. 2022, algorithm 2 and appendix D): steps of order 3, and a last one of order 2.

    3N - 1 evaluations; a step from or to an end where lambda is infinite is of order 1, as in `dpm2`.
    """
    path = schedule.path
    for step in schedule.steps():
        now, then = step.now, step.then
        if step.last or not now.a or not then.b:
            x = _second_order(estimate, x, path, now, then)
            yield x
            continue
        sigma, ratio = now.b / now.a, _ratio(now, then)
        h = -math.log(ratio)
        one, two = (at_level(path, sigma * ratio**share) for share in (1 / 3, 2 / 3))
        x0, eps, _ = estimate(x, now.tau)
        _, eps_one, _ = estimate(one.a * x0 + one.b * eps, one.tau)
        # phi(k) is (e^k - 1) / k - 1
        bent = two.a * x0 + two.b * eps - 2 * two.b * _phi(2 * h / 3) * (eps_one - eps)
        _, eps_two, _ = estimate(bent, two.tau)
        x = then.a * x0 + then.b * eps - 1.5 * then.b * _phi(h) * (eps_two - eps)
        yield x


@fixed_steps
def dpmpp(
    estimate: Estimator, x: Tensor, schedule: Schedule, seeds: Tensor | None
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) on the data estimate; first and last step are of order 1."""
    before: tuple[Tensor, float] | None = None  # the previous estimate, and the previous h
    for step in schedule.steps():
        now, then = step.now, step.then
        x0 = estimate(x, now.tau).x0
        ratio = _ratio(now, then)  # e^-h
        h = -math.log(ratio) if ratio else math.inf
        data = x0
        if before is not None and not step.last:
            previous, h_before = before
            # from pure noise h is infinite: nothing is extrapolated from there
            data = x0 + h / (2 * h_before) * (x0 - previous)
        x = then.b / now.b * x + then.a * (1 - ratio) * data
        before = x0, h
        yield x


def _second_order(estimate: Estimator, x: Tensor, path: Path, now: Point, then: Point) -> Tensor:
    """The state after a step of DPM-Solver-2, or of order 1 from pure noise or to pure data."""
    x0, eps, _ = estimate(x, now.tau)
    if not now.a or not then.b:
        return then.a * x0 + then.b * eps
    sigma = now.b / now.a
    middle = at_level(path, math.sqrt(sigma * then.b / then.a))
    _, eps, _ = estimate(middle.a * x0 + middle.b * eps, middle.tau)
    return then.a / now.a * x + (then.b - then.a * sigma) * eps


def _phi(h: float) -> float:
    return math.expm1(h) / h - 1


def _ratio(now: Point, then: Point) -> float:
    """sigma_then / sigma_now = e^-h with h the step in lambda; 0 where either end is pure."""
    return then.b * now.a / (then.a * now.b)
