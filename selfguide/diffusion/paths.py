"""Paths between data and noise: x = a(tau) x0 + b(tau) eps, tau = 0 data, tau = 1 noise, v = dx/dtau.

Every conversion between x0, eps, v and score follows from a, b and their derivatives. sigma = b / a is the noise
level of x / a (Karras et al. 2022), the one quantity by which different paths can be compared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selfguide.spec.config import PathConfig
from selfguide.spec.config.path import SIGMAS
from selfguide.spec.config.sampler import Spacing, table_entries
from selfguide.spec.conventions import DDPM_STEPS
from shards.errors import UserError

Quantity = Literal["x0", "eps", "v", "score"]


class Estimate(NamedTuple):
    """One prediction in every form, (B, C, H, W) each."""

    x0: Tensor
    eps: Tensor
    v: Tensor


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """(B,) or a scalar, in the dtype of `like` and broadcast against it."""
    value = value.to(like.dtype)
    return value.view(-1, *[1] * (like.ndim - 1)) if value.ndim else value


class Path(ABC):
    """a, b and their derivatives; where on it sampling goes."""

    first = 1.0  # the noise-time at which sampling begins
    last = 0.0  # and where an adaptive solver ends; a path that stops short of 0 keeps that little noise

    @abstractmethod
    def coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, b, a', b' at noise-times `tau`, in its shape; fp64 inside where fp32 would cancel."""

    @abstractmethod
    def noise_time(self, sigma: Tensor) -> Tensor:
        """The noise-time of a noise level that the path has: the inverse of `sigma`."""

    def sigma(self, tau: Tensor) -> Tensor:
        """Noise level b / a; infinite where nothing of the data is left."""
        a, b, _, _ = self.coefficients(tau)
        return b / a

    def training_time(self, u: Tensor) -> Tensor:
        """Numbers in (0, 1) -> noise-times that are trained; uniform ones stay uniform."""
        return u

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) noise-times of a fixed-step sampler, fp64, falling."""
        return torch.linspace(self.first, self.last, steps + 1, dtype=torch.float64)

    def clock(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """The variable s in which Euler and Heun step, and ds/dtau."""
        return tau, torch.ones_like(tau)

    def interpolate(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """x_tau, (B, ...), from data, noise and (B,) noise-times."""
        a, b, _, _ = self._at(tau, x0)
        return a * x0 + b * eps

    def velocity(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """v = a' x0 + b' eps."""
        _, _, da, db = self._at(tau, x0)
        return da * x0 + db * eps

    def score(self, eps: Tensor, tau: Tensor) -> Tensor:
        """grad log p(x) = -eps / b."""
        _, b, _, _ = self._at(tau, eps)
        return -eps / b

    def estimate(self, kind: Quantity, value: Tensor, x: Tensor, tau: Tensor) -> Estimate:
        """`value`, a prediction of that kind for `x` at `tau`, in every form."""
        a, b, da, db = self._at(tau, x)
        if kind == "v":
            w = a * db - da * b
            return Estimate((db * x - b * value) / w, (a * value - da * x) / w, value)
        if kind == "x0":
            x0, eps = value, (x - a * value) / b
        else:
            eps = -b * value if kind == "score" else value
            x0 = (x - b * eps) / a
        return Estimate(x0, eps, da * x0 + db * eps)

    def _at(self, tau: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b, da, db = (per_image(c, like) for c in self.coefficients(tau))
        return a, b, da, db


class RectifiedFlow(Path):
    """x = (1 - tau) x0 + (tau + smin (1 - tau)) eps (Liu et al. 2023); smin = 1e-4 is SGFM's form, 0 the plain one."""

    def __init__(self, sigma_min: float = 0.0) -> None:
        self.sigma_min = sigma_min

    def coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(tau)
        b = tau + self.sigma_min * (1 - tau)
        return 1 - tau, b, -one, (1 - self.sigma_min) * one

    def noise_time(self, sigma: Tensor) -> Tensor:
        return _share(sigma - self.sigma_min)


class VariancePreserving(Path):
    """VP-SDE (Song et al. 2021): beta(tau) linear from 0.1 to 20; a = exp(-integral / 2), b = sqrt(1 - a^2)."""

    beta_min, beta_max = 0.1, 20.0

    def __init__(self, last: float = 1e-3, least: float = 1e-5) -> None:
        # where sampling ends and training begins; v is infinite at 0
        self.last, self.least = last, least

    def coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = tau.double()
        slope = self.beta_max - self.beta_min
        log_a = -(t * t) * slope / 4 - t * self.beta_min / 2
        dlog_a = -t * slope / 2 - self.beta_min / 2
        return _preserving(log_a, dlog_a, tau.dtype)

    def noise_time(self, sigma: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 2 * slope * torch.log1p(sigma.double().square())).sqrt()
        return ((root - self.beta_min) / slope).to(sigma.dtype)

    def training_time(self, u: Tensor) -> Tensor:
        return self.least + (1 - self.least) * u


class DDPM(Path):
    """Discrete VP (Ho et al. 2020): tau = t / T on one table abar_t = prod(1 - beta), with abar_0 = 1.

    Between its entries log abar is linear, so that every sampler reads the same table as training does.
    `linear` betas run from 1e-4 to 0.02; `quad`, SGDM's, do so linear in the root; so do `scaled_linear`, Stable
    Diffusion's and U-ViT-H's, from 0.00085 to 0.012; those of `cosine` follow from abar = cos^2 (Nichol & Dhariwal
    2021).
    """

    steps = DDPM_STEPS
    last = 1 / DDPM_STEPS  # v is infinite at 0

    def __init__(self, betas: str = "linear") -> None:
        if betas == "linear":
            beta = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64)
        elif betas == "cosine":
            beta = _cosine_betas(self.steps)
        else:
            low, high = (1e-4, 0.02) if betas == "quad" else (0.00085, 0.012)
            roots = torch.linspace(low**0.5, high**0.5, self.steps, dtype=torch.float64)
            beta = roots.square()
        zero = torch.zeros(1, dtype=torch.float64)
        self.log_a = torch.cat((zero, torch.log1p(-beta).cumsum(0) / 2))  # (T + 1,)

    def coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = self._table(tau.device)
        # fp32 noise-times are a rounding away from their table entry: take the entry itself
        t = (tau.double() * self.steps).clamp(0, self.steps)
        near = t.round()
        t = torch.where((t - near).abs() < 1e-4, near, t)
        # a knot belongs to the interval on its left, whose slope is the one of its own beta
        upper = t.ceil().clamp(1, self.steps).long()
        low, high = table[upper - 1], table[upper]
        log_a = low + (t - (upper - 1)) * (high - low)
        return _preserving(log_a, (high - low) * self.steps, tau.dtype)

    def noise_time(self, sigma: Tensor) -> Tensor:
        wanted = torch.log1p(sigma.double().square()) / 2  # -log a
        rising = -self._table(sigma.device)
        upper = torch.searchsorted(rising, wanted).clamp(1, self.steps)
        low, high = rising[upper - 1], rising[upper]
        t = upper - 1 + (wanted - low) / (high - low)
        return (t / self.steps).to(sigma.dtype)

    def training_time(self, u: Tensor) -> Tensor:
        return (u * self.steps).ceil().clamp(1, self.steps) / self.steps

    def grid(self, steps: int, spacing: Spacing = "trailing") -> Tensor:
        """Whole table entries, evenly spaced, and where they end: data, but for `spacing=leading_offset`."""
        if steps > self.steps:
            raise UserError(
                f"sampler.steps={steps}: this path has {self.steps} noise levels; take {self.steps} or fewer"
            )
        if spacing == "trailing":
            entries = torch.linspace(self.steps, 0, steps + 1, dtype=torch.float64).round()
        else:
            entries = torch.tensor(table_entries(steps, spacing), dtype=torch.float64)
        return entries / self.steps

    def _table(self, device: torch.device) -> Tensor:
        """The table on that device, where it then stays: no step waits for a copy of it."""
        if self.log_a.device != device:
            self.log_a = self.log_a.to(device)
        return self.log_a


def _cosine_betas(steps: int) -> Tensor:
    """(steps,) betas of abar(t) = cos^2(pi / 2 (t + 0.008) / 1.008), at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)


def _preserving(
    log_a: Tensor, dlog_a: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = log_a.exp()
    b = (-torch.expm1(2 * log_a)).sqrt()
    da = a * dlog_a
    db = -a * da / b
    return a.to(dtype), b.to(dtype), da.to(dtype), db.to(dtype)


class VarianceExploding(Path):
    """x = x0 + sigma eps with sigma = tau / (1 - tau), so that a noise-time means the same as on rectified flow.

    EDM (Karras et al. 2022) samples from sigma 80 to 0.002 and VE (Song et al. 2021) from 100 to 0.02, along
    Karras' grid of rho = 7, and step in sigma.
    """

    rho = 7.0

    def __init__(
        self, sigma_min: float = SIGMAS["edm"][0], sigma_max: float = SIGMAS["edm"][1]
    ) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.first, self.last = sigma_max / (1 + sigma_max), sigma_min / (1 + sigma_min)

    def coefficients(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(tau)
        return one, tau / (1 - tau), 0 * one, (1 - tau) ** -2

    def noise_time(self, sigma: Tensor) -> Tensor:
        return _share(sigma)

    def grid(self, steps: int) -> Tensor:
        """N noise levels from sigma_max to sigma_min, and then 0 (EDM, eq. 5)."""
        ends = (self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho))
        sigma = torch.linspace(*ends, steps, dtype=torch.float64) ** self.rho
        return torch.cat((self.noise_time(sigma), sigma.new_zeros(1)))

    def clock(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        _, b, _, db = self.coefficients(tau)
        return b, db


def _share(ratio: Tensor) -> Tensor:
    """ratio / (1 + ratio), and 1 at infinity."""
    return 1 / (1 + 1 / ratio)


_PATHS: dict[str, Callable[[PathConfig], Path]] = {
    "rectified_flow": lambda config: RectifiedFlow(config.sigma_min),
    "ddpm": lambda config: DDPM(config.betas),
    "vp": lambda config: VariancePreserving(config.last, config.least),
    "ve": lambda config: VarianceExploding(*SIGMAS["ve"]),
    "edm": lambda config: VarianceExploding(*SIGMAS["edm"]),
}


def build_path(config: PathConfig) -> Path:
    """The configured path."""
    return _PATHS[config.name](config)


def log_uniform(u: Tensor, low: float, high: float) -> Tensor:
    """u in (0, 1) -> numbers whose logarithm is uniform."""
    return torch.exp(math.log(low) + u * (math.log(high) - math.log(low)))
