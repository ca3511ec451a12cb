"""What the network sees and predicts: its raw output F is x0, eps or v, or EDM's mixture of data and noise.

EDM (Karras et al. 2022, table 1): D = c_skip x + c_out F(c_in x), for paths with a = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfguide.diffusion.paths import Estimate, Path, build_path, per_image
from selfguide.spec.config import PathConfig, Prediction


@dataclass(frozen=True)
class Preconditioning:
    """A path, what the net predicts on it, and the standard deviation of the data (EDM only)."""

    path: Path
    prediction: Prediction = "v"
    sigma_data: float = 0.5

    @property
    def first(self) -> float:
        """Where sampling may begin: x0 cannot be read off a noise prediction where no data is left."""
        pure_noise = self.path.coefficients(torch.tensor(self.path.first))[0] == 0
        return (
            self.path.first - 1e-3 if pure_noise and self.prediction == "eps" else self.path.first
        )

    @property
    def last(self) -> float:
        """Where an adaptive solver ends: noise cannot be read off a data prediction where none is left."""
        pure_data = self.path.coefficients(torch.tensor(self.path.last))[1] == 0
        return self.path.last + 1e-3 if pure_data and self.prediction == "x0" else self.path.last

    def net_input(self, x: Tensor, tau: Tensor) -> Tensor:
        """What the network reads in place of `x`, with unit variance under EDM."""
        return x * self._edm(tau, x)[0] if self.prediction == "edm" else x

    def noised(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """What the network reads of images `x0` (B, C, H, W) at noise-times `tau` (B,)."""
        return self.net_input(self.path.interpolate(x0, eps, tau), tau)

    def estimate(self, output: Tensor, x: Tensor, tau: Tensor) -> Estimate:
        """Raw output -> x0, eps and v, in the dtype of the state `x`."""
        output = output.to(x.dtype)
        if self.prediction != "edm":
            return self.path.estimate(self.prediction, output, x, tau)
        _, skip, out = self._edm(tau, x)
        return self.path.estimate("x0", skip * x + out * output, x, tau)

    def target(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """What the raw output should have been, (B, C, H, W)."""
        if self.prediction == "edm":
            # (x0 - c_skip x) / c_out, without its cancellation at small sigma
            sigma, sd = per_image(self.path.sigma(tau), x0), self.sigma_data
            return (sigma / sd * x0 - sd * eps) * (sigma * sigma + sd * sd).rsqrt()
        if self.prediction == "v":
            return self.path.velocity(x0, eps, tau)
        return x0 if self.prediction == "x0" else eps

    def data_error(self, tau: Tensor) -> Tensor:
        """|d x0 / dF|, (B,): how much an error of the raw output becomes one of the data."""
        a, b, da, db = self.path.coefficients(tau)
        if self.prediction == "edm":
            return (b * self.sigma_data) * (b * b + self.sigma_data**2).rsqrt()
        if self.prediction == "v":
            return b / (a * db - da * b)
        return torch.ones_like(tau) if self.prediction == "x0" else b / a

    def noise_error(self, tau: Tensor) -> Tensor:
        """|d eps / dF|, (B,): how much an error of the raw output becomes one of the noise."""
        if self.prediction == "eps":
            return torch.ones_like(tau)
        a, b, da, db = self.path.coefficients(tau)
        if self.prediction == "edm":
            return self.sigma_data * (b * b + self.sigma_data**2).rsqrt()
        return a / (a * db - da * b) if self.prediction == "v" else a / b

    def _edm(self, tau: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_skip, c_out."""
        sigma, sd = per_image(self.path.sigma(tau), like), self.sigma_data
        total = sigma * sigma + sd * sd
        return total.rsqrt(), sd * sd / total, sigma * sd * total.rsqrt()


def build_preconditioning(config: PathConfig) -> Preconditioning:
    """The configured path with what is predicted on it."""
    return Preconditioning(build_path(config), config.prediction, config.sigma_data)
