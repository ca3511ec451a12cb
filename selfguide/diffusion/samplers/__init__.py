"""Samplers: free functions of one signature, `euler(denoiser, x, schedule, *, seeds, callback, ...)`, as k-diffusion's.

A denoiser is any callable of (x, tau), see `schedule.Denoise`; a schedule is any falling noise-times on a path. x
(B, C, H, W) is the state at the first of them, fp32 or fp64 whatever the net's dtype, and coefficients are fp64
numbers. `seeds` (B,) are read by samplers that draw noise. A paper's N is the number of steps; each sampler states its
network evaluations exactly, N of them where it says nothing. `sample` builds the schedule of a `Denoiser` by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.samplers.exponential import ddim, dpm1, dpm2, dpmpp
from selfguide.diffusion.samplers.schedule import Callback, Denoise, Schedule, ignore, noise_times
from selfguide.diffusion.samplers.velocity import dopri5, euler, euler_maruyama, even_times, heun
from selfguide.spec.config import SamplerConfig
from selfguide.spec.config.sampler import settings_read
from selfguide.spec.suggest import nearest
from shards.errors import UserError

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    sampler.__name__: sampler
    for sampler in (euler, heun, ddim, dpm1, dpm2, dpmpp, euler_maruyama, dopri5)
}

COMMON = ("denoiser", "x", "schedule", "seeds", "callback")


def sample(
    name: str,
    denoiser: Denoise,
    noise: Tensor,
    *,
    schedule: Schedule | None = None,
    steps: int = 50,
    shift: float = 1.0,
    seeds: Tensor | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Samples (B, C, H, W) in fp32, or fp64 if `noise` is; a `Denoiser` counts its evaluations.

    Args:
        denoiser: a `Denoiser`, or with a `schedule` any callable of (x, tau).
        noise: standard normal; it is scaled to the first noise-time.
        schedule: any; by default the path's grid of `steps`, shifted, from where the net's prediction can be read.
        steps: N; dopri5 takes what it needs.
        shift: k of `shifted`, for paths in noise-time.
        seeds: (B,) int64, for samplers that draw noise: that of image i at step k is a pure function of (seeds[i], k).
        callback: called after each step.
        options: the sampler's own, such as `eta` or `churn`.

    Raises:
        UserError: an unknown sampler or option, one that does not fit the path, or no schedule.
    """
    if name not in SAMPLERS:
        raise UserError(
            f"sampler={name!r} is unknown{nearest(name, SAMPLERS)}; known: {', '.join(SAMPLERS)}"
        )
    known = [o for o in inspect.signature(SAMPLERS[name]).parameters if o not in COMMON]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "none"
            raise UserError(
                f"{option}={options[option]!r} is no option of {name}{nearest(option, known)}; it takes: {takes}"
            )
    if schedule is None:
        if not isinstance(denoiser, Denoiser):
            raise UserError(
                "a denoiser that is a plain callable has no path: give schedule=Schedule(path, times)"
            )
        schedule = default_schedule(name, denoiser, steps, shift)
    state = noise if noise.dtype == torch.float64 else noise.float()
    x = schedule.start(state)
    return SAMPLERS[name](
        denoiser, x, schedule, seeds=seeds, callback=callback or ignore, **options
    )


def default_schedule(name: str, denoiser: Denoiser, steps: int, shift: float) -> Schedule:
    """The schedule of a sampler on the denoiser's path."""
    times = noise_times(denoiser.preconditioning, steps, shift)
    if name == "dopri5" and shift != 1:
        raise UserError(f"shift={shift} moves a grid of steps, and dopri5 chooses its own; drop it")
    if name == "euler_maruyama":
        times = even_times(times, shift)
    return Schedule(denoiser.path, times, denoiser.preconditioning.last)


def settings(config: SamplerConfig) -> dict[str, Any]:
    """What `sample` is called with for this config, besides denoiser, noise, seeds and callback."""
    return {"name": config.name, "steps": config.steps, "shift": config.shift} | settings_read(
        config
    )
