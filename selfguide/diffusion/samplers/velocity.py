"""Samplers that step along the velocity: Euler, Heun, the SDE of SiT and REPA, and an adaptive Runge-Kutta."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import Path, RectifiedFlow, VarianceExploding, VariancePreserving
from selfguide.diffusion.samplers.schedule import (
    Callback,
    DataEstimate,
    Estimator,
    Point,
    Schedule,
    StepNoise,
    at_level,
    estimator,
    fixed_steps,
    ignore,
    within,
)
from selfguide.spec.suggest import check_known
from shards.errors import UserError

LAST_STEP = 0.04  # euler_maruyama's, of drift only (SiT, REPA)
RENEWED = 0.1  # share of the noise that one step of `sbdm` exchanges at most


@fixed_steps
def euler(
    estimate: Estimator, x: Tensor, schedule: Schedule, seeds: Tensor | None
) -> Iterator[Tensor]:
    """x += (s' - s) dx/ds in the path's clock s: noise-time, or sigma on VE and EDM."""
    path = schedule.path
    for step in schedule.steps():
        s, ds = _clock(path, step.now.tau)
        following, _ = _clock(path, step.then.tau)
        x = x + (following - s) / ds * estimate(x, step.now.tau).v
        yield x


@fixed_steps
def heun(
    estimate: Estimator,
    x: Tensor,
    schedule: Schedule,
    seeds: Tensor | None,
    *,
    churn: float = 0.0,
    churn_sigma: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
) -> Iterator[Tensor]:
    """EDM's algorithm 2 (Karras et al. 2022) in the path's clock: 2N - 1 evaluations, the last step is Euler's.

    `churn` raises the noise level before each step inside `churn_sigma`; it is defined where that is the clock.
    """
    path = schedule.path
    if churn and not isinstance(path, VarianceExploding):
        raise UserError(
            f"churn={churn} raises the noise level, which {type(path).__name__} does not step in; "
            "take an EDM or VE path, or ddim with eta=1"
        )
    noise = StepNoise(f"heun with churn={churn}", seeds, x) if churn else None
    for step in schedule.steps():
        tau, sigma = step.now.tau, step.now.b
        if noise is not None and churn_sigma[0] <= sigma <= churn_sigma[1]:
            raised = sigma * (1 + min(churn / (len(schedule.times) - 1), math.sqrt(2) - 1))
            spread = math.sqrt(raised**2 - sigma**2) * churn_noise
            x = x + spread * noise(step.number)
            tau = at_level(path, raised).tau
        s, ds = _clock(path, tau)
        following, ds_following = _clock(path, step.then.tau)
        slope = estimate(x, tau).v / ds
        ahead = x + (following - s) * slope
        if not step.last:
            slope = (slope + estimate(ahead, step.then.tau).v / ds_following) / 2
            ahead = x + (following - s) * slope
        x = ahead
        yield x


@fixed_steps
def euler_maruyama(
    estimate: Estimator,
    x: Tensor,
    schedule: Schedule,
    seeds: Tensor | None,
    *,
    diffusion: Literal["sit", "repa", "sbdm"] = "sit",
) -> Iterator[Tensor]:
    """dx = (v - w score / 2) dtau + sqrt(w) dW backwards (Ma et al. 2024, eq. 4): N - 1 steps, then one of drift only.

    w is 2 b (SiT's default), 2 tau (REPA, Yu et al. 2025), or 2 (b b' - b^2 a' / a) (`sbdm`, the diffusion of Song et
    al. 2021). That one grows without end towards pure noise: a step of width h multiplies the noise by 1 - c and adds
    2 c b^2 of variance, c = w h / (2 b^2), which is 3.9 of rectified flow's noise at tau = 0.999 and 250 steps. Every
    w >= 0 has the same marginals, so where c would pass 0.1 a smaller w is taken. `even_times` is their schedule.
    """
    path = schedule.path
    check_known("diffusion", diffusion, ("sit", "repa", "sbdm"))
    if not isinstance(path, RectifiedFlow | VariancePreserving):
        raise UserError(
            f"euler_maruyama steps evenly in noise-time, which {type(path).__name__} does not take; "
            "take ddim with eta=1"
        )
    noise = StepNoise("euler_maruyama", seeds, x)
    for step in schedule.steps():
        tau, width = step.now.tau, step.now.tau - step.then.tau
        w = _noise_weight(diffusion, path, step.now, width)
        _, eps, v = estimate(x, tau)
        x = x - width * (v + w / (2 * step.now.b) * eps)  # score = -eps / b
        if not step.last:
            x = x + math.sqrt(w * width) * noise(step.number)
        yield x


@torch.no_grad()
def dopri5(
    denoiser: Denoiser | DataEstimate,
    x: Tensor,
    schedule: Schedule,
    *,
    seeds: Tensor | None = None,
    callback: Callback = ignore,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """Adaptive Runge-Kutta 4(5) of torchdiffeq from the first noise-time to `schedule.last`, in steps of its own.

    It takes no noise, so `seeds` are not read. The step control looks at the whole batch: fix the batch's make-up where
    results must be found again. Unlike the plain call, no step looks beyond the end, where a path may not exist.
    """
    # it takes a second to import, and every rank imports this module
    from torchdiffeq import odeint

    estimate, first = estimator(denoiser, schedule.path), float(schedule.times[0])
    last = float(schedule.times[-1]) if schedule.last is None else schedule.last
    ends = torch.tensor([first, last], dtype=torch.float64, device=x.device)
    accepted: list[float] = []

    def slope(tau: Tensor, state: Tensor) -> Tensor:
        return estimate(state, float(tau)).v

    def accept(tau: Tensor, state: Tensor, _: Tensor) -> None:
        # torchdiffeq reports where an accepted step began: there the one before it ended
        if accepted:
            callback(len(accepted) - 1, float(tau), state)
        accepted.append(float(tau))

    slope.callback_accept_step = accept  # type: ignore[attr-defined]
    options = {"step_t": ends[1:]}
    try:
        x = odeint(slope, x, ends, method="dopri5", rtol=rtol, atol=atol, options=options)[-1]
    except AssertionError as error:
        if "underflow in dt" not in str(error):
            raise
        where = accepted[-1] if accepted else first
        raise UserError(
            f"dopri5's step shrank to nothing behind noise-time {where:.4g}: the network's output is not finite, or "
            f"rougher than rtol={rtol:g}, atol={atol:g} resolve; loosen them or run the network in fp32"
        ) from error
    callback(len(accepted) - 1, last, x)
    return x


def even_times(times: Tensor, shift: float) -> Tensor:
    """(N + 1,) even noise-times from where `times` begin, shifted, for `euler_maruyama`; its last step is of size 0.04.

    So SiT and REPA have it, for rectified flow; on VP a last step that long costs some variance.
    """
    even = torch.linspace(float(times[0]), LAST_STEP, len(times) - 1, dtype=torch.float64)
    return torch.cat((within(even, shift), even.new_zeros(1)))


def _clock(path: Path, tau: float) -> tuple[float, float]:
    s, ds = path.clock(torch.tensor(tau, dtype=torch.float64))
    return float(s), float(ds)


def _noise_weight(diffusion: str, path: Path, now: Point, width: float) -> float:
    """w of `euler_maruyama` for a step of that width."""
    if diffusion == "sit":
        return 2 * now.b
    if diffusion == "repa":
        return 2 * now.tau
    a, b, da, db = path.coefficients(torch.tensor(now.tau, dtype=torch.float64))
    return min(float(2 * (b * db - b * b * da / a)), RENEWED * 2 * now.b**2 / width)
