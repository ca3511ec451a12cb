"""Paths between data and noise: x = a(tau) x0 + b(tau) eps, tau = 0 data, tau = 1 noise, v = dx/dtau."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from selfguide.randomness import normal, uniform
from selfguide.spec.config import PathConfig


def _per_image(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


class Path(ABC):
    """a, b and their derivatives; every conversion follows from W = a b' - a' b."""

    @abstractmethod
    def coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b, a', b' at noise-times `tau`."""

    def interpolate(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """x_tau, (B, ...) from data, noise and (B,) noise-times."""
        a, b, _, _ = self.coefficients(_per_image(tau, x0))
        return a * x0 + b * eps

    def velocity(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """v = a' x0 + b' eps, the target of velocity prediction."""
        _, _, da, db = self.coefficients(_per_image(tau, x0))
        return da * x0 + db * eps

    def data_from_velocity(self, x: Tensor, v: Tensor, tau: Tensor) -> Tensor:
        """x0_hat = (b' x - b v) / W."""
        a, b, da, db = self.coefficients(_per_image(tau, x))
        return (db * x - b * v) / (a * db - da * b)

    def noise_from_velocity(self, x: Tensor, v: Tensor, tau: Tensor) -> Tensor:
        """eps_hat = (a v - a' x) / W."""
        a, b, da, db = self.coefficients(_per_image(tau, x))
        return (a * v - da * x) / (a * db - da * b)


class RectifiedFlow(Path):
    """x = (1 - tau) x0 + tau eps (Liu et al. 2023); v = eps - x0."""

    def coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(tau)
        return 1 - tau, tau, -one, one


PATHS = {"rectified_flow": RectifiedFlow}


def build_path(config: PathConfig) -> Path:
    return PATHS[config.name]()


def draw_times(config: PathConfig, seed: int, positions: Tensor) -> Tensor:
    """(B,) training noise-times of these images: uniform, or sigmoid of a normal (SD3, LightningDiT)."""
    if config.time_density == "uniform":
        return uniform(seed, "noise-time", positions, 1)[:, 0]
    n = normal(seed, "noise-time", positions, (1,))[:, 0]
    return torch.sigmoid(config.logit_mean + config.logit_std * n)
