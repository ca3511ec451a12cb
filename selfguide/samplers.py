"""Samplers: free functions of one signature that walk a denoiser from noise (tau = 1) to data (tau = 0)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from selfguide.denoiser import Denoiser
from selfguide.spec.words import nearest
from shards.errors import UserError

Callback = Callable[[int, float, Tensor], None]  # step, noise-time, state


def euler(
    denoiser: Denoiser, x: Tensor, *, steps: int, callback: Callback | None = None, **_: float
) -> Tensor:
    """x += (tau_next - tau) v on a uniform grid: exactly `steps` network evaluations."""
    grid = [1 - i / steps for i in range(steps + 1)]
    for i, (tau, following) in enumerate(pairwise(grid)):
        x = x + (following - tau) * denoiser.velocity(x, tau)
        if callback:
            callback(i, following, x)
    return x


def dopri5(
    denoiser: Denoiser,
    x: Tensor,
    *,
    steps: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    callback: Callback | None = None,
) -> Tensor:
    """Adaptive Runge-Kutta 4(5) of torchdiffeq. Its step control is global to the batch: fix the batch's make-up."""

    def slope(tau: Tensor, state: Tensor) -> Tensor:
        return denoiser.velocity(state, float(tau))

    ends = torch.tensor([1.0, 0.0], device=x.device, dtype=x.dtype)
    x = odeint(slope, x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]
    if callback:
        callback(denoiser.evaluations - 1, 0.0, x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "dopri5": dopri5}


@torch.no_grad()
def sample(
    name: str,
    denoiser: Denoiser,
    noise: Tensor,
    *,
    steps: int = 50,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Samples (B, C, H, W) from `noise`, integrated in fp32 or wider; `denoiser.evaluations` holds the count."""
    if name not in SAMPLERS:
        raise UserError(
            f"sampler={name!r} is unknown{nearest(name, SAMPLERS)}; known: {', '.join(SAMPLERS)}"
        )
    state = noise if noise.dtype == torch.float64 else noise.float()
    return SAMPLERS[name](denoiser, state, steps=steps, callback=callback, **options)
