"""Samplers: free functions of one signature that walk a denoiser from noise to data.

The state is fp32 or fp64 whatever the net's dtype, and coefficients are fp64 numbers. A paper's N is our `steps`; each
sampler states its network evaluations exactly, N of them where it says nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.samplers.exponential import ddim, dpm1, dpm2, dpmpp
from selfguide.diffusion.samplers.velocity import dopri5, euler, euler_maruyama, heun
from selfguide.diffusion.samplers.walk import Callback, Walk, noise_times
from selfguide.spec.config import SamplerConfig
from selfguide.spec.config.sampler import settings_read
from selfguide.spec.suggest import nearest
from shards.errors import UserError

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    sampler.__name__: sampler
    for sampler in (euler, heun, ddim, dpm1, dpm2, dpmpp, euler_maruyama, dopri5)
}


@torch.no_grad()
def sample(
    name: str,
    denoiser: Denoiser,
    noise: Tensor,
    *,
    steps: int = 50,
    shift: float = 1.0,
    seeds: Tensor | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Samples (B, C, H, W) in fp32, or fp64 if `noise` is; `denoiser.evaluations` goes up by the network evaluations.

    Args:
        noise: standard normal; it is scaled to where the path begins here.
        steps: N; dopri5 takes what it needs.
        shift: k of `shifted`, for paths in noise-time.
        seeds: (B,) int64, for samplers that draw noise: that of image i at step k is a pure function of (seeds[i], k).
        callback: called after each step.
        options: the sampler's own, such as `eta` or `churn`.

    Raises:
        UserError: an unknown sampler or option, or one that this path cannot be walked with.
    """
    if name not in SAMPLERS:
        raise UserError(
            f"sampler={name!r} is unknown{nearest(name, SAMPLERS)}; known: {', '.join(SAMPLERS)}"
        )
    known = list(inspect.signature(SAMPLERS[name]).parameters)[1:]
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "none"
            raise UserError(
                f"{option}={options[option]!r} is no option of {name}{nearest(option, known)}; it takes: {takes}"
            )
    times = noise_times(denoiser.preconditioning, steps, shift)
    state = noise if noise.dtype == torch.float64 else noise.float()
    return SAMPLERS[name](Walk(denoiser, state, times, shift, seeds, callback), **options)


def settings(config: SamplerConfig) -> dict[str, Any]:
    """What `sample` is called with for this config, besides denoiser, noise, seeds and callback."""
    return {"name": config.name, "steps": config.steps, "shift": config.shift} | settings_read(
        config
    )
