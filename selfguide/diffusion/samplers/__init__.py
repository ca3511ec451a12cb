"""Samplers: free functions of one signature, `euler(denoiser, x, schedule, *, seeds, callback, ...)`, as k-diffusion's.

A denoiser is a `Denoiser`, or any function of x (B, C, H, W) and noise-times (B,) that estimates x0; a schedule is any
falling noise-times on a path. x is the state at the first of them, fp32 or fp64 whatever the net's dtype;
coefficients are fp64 numbers. `seeds` (B,) are read by samplers that draw noise. A paper's N is the number of steps;
each sampler states its network evaluations exactly, N of them where it says nothing. `sample` picks a sampler by name
and builds its schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import Path
from selfguide.diffusion.preconditioning import Preconditioning
from selfguide.diffusion.samplers.exponential import ddim, dpm1, dpm2, dpm_fast, dpmpp
from selfguide.diffusion.samplers.schedule import (
    Callback,
    DataEstimate,
    Schedule,
    ignore,
    noise_times,
)
from selfguide.diffusion.samplers.velocity import dopri5, euler, euler_maruyama, even_times, heun
from selfguide.spec.config import SamplerConfig
from selfguide.spec.config.sampler import Spacing, settings_read
from selfguide.spec.suggest import check_known, nearest
from shards.errors import UserError

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    sampler.__name__: sampler
    for sampler in (euler, heun, ddim, dpm1, dpm2, dpm_fast, dpmpp, euler_maruyama, dopri5)
}

# the other parameters of a sampler or of its walk are its options
COMMON = ("denoiser", "estimate", "x", "schedule", "seeds", "callback")


def sample(
    name: str,
    denoiser: Denoiser | DataEstimate,
    noise: Tensor,
    *,
    path: Path | None = None,
    times: Sequence[float] | Tensor | None = None,
    steps: int = 50,
    shift: float = 1.0,
    spacing: Spacing = "trailing",
    seeds: Tensor | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Samples (B, C, H, W) in fp32, or fp64 if `noise` is; a `Denoiser` counts its evaluations.

    Args:
        denoiser: a `Denoiser`, or any function of x (B, C, H, W) and noise-times (B,) in fp32 that estimates x0.
        noise: standard normal; it is scaled to the first noise-time.
        path: the path that a function's x lies on; a `Denoiser` has its own.
        times: the schedule, falling noise-times (N + 1,), in place of `steps` and `shift`.
        steps: N; dopri5 takes what it needs.
        shift: k of `shifted`, for paths in noise-time.
        spacing: which entries of a discrete table the steps visit; `log_snr` on VP, VE and EDM.
        seeds: (B,) int64, for samplers that draw noise: that of image i at step k is a pure function of (seeds[i], k).
        callback: called after each step.
        options: the sampler's own, such as `eta` or `churn`.

    Raises:
        UserError: an unknown sampler or option, one that does not fit the path, a schedule that does not
            fall, or a function without a path.
    """
    check_known("sampler", name, SAMPLERS)
    known = [o for o in inspect.signature(SAMPLERS[name]).parameters if o not in COMMON]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "none"
            raise UserError(
                f"{option}={options[option]!r} is no option of {name}{nearest(option, known)}; it takes: {takes}"
            )
    preconditioning = _preconditioning(denoiser, path)
    if times is None:
        times = default_times(name, preconditioning, steps, shift, spacing)
    times = torch.as_tensor(times, dtype=torch.float64).cpu()
    schedule = Schedule(preconditioning.path, times, preconditioning.last)
    x = schedule.start(noise if noise.dtype == torch.float64 else noise.float())
    return SAMPLERS[name](
        denoiser, x, schedule, seeds=seeds, callback=callback or ignore, **options
    )


def _preconditioning(denoiser: Denoiser | DataEstimate, path: Path | None) -> Preconditioning:
    if isinstance(denoiser, Denoiser):
        if path is not None:
            raise UserError(
                "path= goes with a function as denoiser; a Denoiser has a path; drop it"
            )
        return denoiser.preconditioning
    if path is None:
        raise UserError("a function as denoiser needs path=, the path that its x lies on")
    return Preconditioning(path, "x0")


def default_times(
    name: str,
    preconditioning: Preconditioning,
    steps: int,
    shift: float,
    spacing: Spacing = "trailing",
) -> Tensor:
    """A sampler's own: the path's grid, shifted, from where the prediction can be read; `even_times` of some."""
    times = noise_times(preconditioning, steps, shift, spacing)
    if name == "dopri5" and shift != 1:
        raise UserError(f"shift={shift} moves a grid of steps, and dopri5 chooses its own; drop it")
    if name in ("dopri5", "euler_maruyama") and spacing != "trailing":
        raise UserError(f"spacing={spacing} is no grid for {name}, which has its own; drop it")
    return even_times(times, shift) if name == "euler_maruyama" else times


def settings(config: SamplerConfig) -> dict[str, Any]:
    """What `sample` is called with for this config, besides denoiser, noise, seeds and callback."""
    grid = {name: getattr(config, name) for name in ("name", "steps", "shift", "spacing")}
    return grid | settings_read(config)
