"""Samplers: free functions of one signature that walk a denoiser from noise to data.

The state is fp32 or fp64 whatever the net's dtype, and coefficients are fp64 numbers. A paper's N is our `steps`; each
sampler states its network evaluations exactly, N of them where it says nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selfguide.diffusion.denoiser import DataEstimate, Denoiser, FunctionDenoiser
from selfguide.diffusion.paths import Path
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
    denoiser: Denoiser | DataEstimate,
    noise: Tensor,
    *,
    path: Path | None = None,
    times: Sequence[float] | Tensor | None = None,
    steps: int = 50,
    shift: float = 1.0,
    seeds: Tensor | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Samples (B, C, H, W) in fp32, or fp64 if `noise` is; `denoiser.evaluations` goes up by the network evaluations.

    Args:
        denoiser: a `Denoiser`, or any function of x (B, C, H, W) and noise-times (B,) that estimates x0; then `path`
            says which path its x lies on.
        times: the schedule, falling noise-times (N + 1,), in place of `steps` and `shift`.
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
    estimator = _estimator(denoiser, path)
    if times is None:
        schedule = noise_times(estimator.preconditioning, steps, shift)
    else:
        schedule = _checked(torch.as_tensor(times, dtype=torch.float64).cpu())
    state = noise if noise.dtype == torch.float64 else noise.float()
    return SAMPLERS[name](Walk(estimator, state, schedule, shift, seeds, callback), **options)


def _estimator(denoiser: Denoiser | DataEstimate, path: Path | None) -> Denoiser | FunctionDenoiser:
    if isinstance(denoiser, Denoiser):
        if path is not None:
            raise UserError(
                "path= goes with a function as denoiser; a Denoiser has a path; drop it"
            )
        return denoiser
    if path is None:
        raise UserError("a function as denoiser needs path=, the path that its x lies on")
    return FunctionDenoiser(denoiser, path)


def _checked(times: Tensor) -> Tensor:
    """A schedule of a user's own.

    Raises:
        UserError: it does not fall from one noise-time to another within [0, 1].
    """
    falling = times.ndim == 1 and len(times) > 1 and bool((times[:-1] > times[1:]).all())
    if not falling or not (float(times[-1]) >= 0 and float(times[0]) <= 1):
        raise UserError(f"times={times.tolist()} must fall from noise-time 1 or less to 0 or more")
    return times


def settings(config: SamplerConfig) -> dict[str, Any]:
    """What `sample` is called with for this config, besides denoiser, noise, seeds and callback."""
    return {"name": config.name, "steps": config.steps, "shift": config.shift} | settings_read(
        config
    )
