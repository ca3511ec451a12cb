"""Gaussian data, on which the best denoiser and the probability-flow ODE have closed forms, on every path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import CONDITIONED, Condition
from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import (
    DDPM,
    Path,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)

MEAN, SD = 0.3, 0.5  # of the data
PATHS: dict[str, tuple[Path, str]] = {
    "rf": (RectifiedFlow(), "v"),
    "smin": (RectifiedFlow(1e-4), "v"),
    "rf_eps": (RectifiedFlow(), "eps"),
    "rf_x0": (RectifiedFlow(), "x0"),
    "vp": (VariancePreserving(), "eps"),
    "ddpm": (DDPM(), "eps"),
    "edm": (VarianceExploding(), "edm"),
    "ve": (VarianceExploding(0.02, 100.0), "x0"),
}


class ExactGaussian(nn.Module):
    """E[x0 | x] for N(MEAN, SD^2) data as a raw prediction of any kind; conditioned images' mean is `shift` higher."""

    def __init__(self, path: Path, prediction: str, shift: float = 0.0) -> None:
        super().__init__()
        self.path, self.prediction, self.shift = path, prediction, shift
        self.seen: list[tuple[Tensor, Tensor, Condition]] = []  # every call

    def forward(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        self.seen.append((x, tau, condition))
        a, b, da, db = self.path.coefficients(tau.double().view(-1, 1, 1, 1))
        if self.prediction == "edm":  # it was given c_in x
            x = x * (b**2 + SD**2).sqrt()
        mean = MEAN + self.shift * (condition.state == CONDITIONED).double().view(-1, 1, 1, 1)
        centred = (x - a * mean) / (a**2 * SD**2 + b**2)
        x0, eps = mean + a * SD**2 * centred, b * centred
        if self.prediction == "edm":  # D = c_skip x + c_out F
            return (x0 - SD**2 / (b**2 + SD**2) * x) / (b * SD / (b**2 + SD**2).sqrt())
        return {"x0": x0, "eps": eps, "v": da * x0 + db * eps}[self.prediction]


def exact(name: str, count: int = 4, shift: float = 0.0, **settings: Any) -> Denoiser:
    """A denoiser that knows the data, on one of PATHS; images are conditioned on id 0 where `shift` is not 0."""
    path, prediction = PATHS[name]
    condition = Condition.unconditional(count)
    if shift:
        condition = Condition.of(id=torch.zeros(count, dtype=torch.int64))
    net = ExactGaussian(path, prediction, shift)
    return Denoiser(net, path, condition, prediction=prediction, **settings)  # type: ignore[arg-type]


def gaussian(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Standard normal, fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *(shape or (1, 2, 2)), dtype=torch.float64, generator=generator)


def on_the_ode(path: Path, x: Tensor, start: float, end: float) -> Tensor:
    """Where the probability-flow ODE carries `x` from noise-time `start` to `end`: standardised, x stands still."""
    (a0, s0), (a1, s1) = (_moments(path, tau) for tau in (start, end))
    return a1 * MEAN + s1 / s0 * (x - a0 * MEAN)


def _moments(path: Path, tau: float) -> tuple[float, float]:
    a, b, _, _ = (float(c) for c in path.coefficients(torch.tensor(tau, dtype=torch.float64)))
    return a, (a**2 * SD**2 + b**2) ** 0.5
