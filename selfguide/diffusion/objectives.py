"""Path x prediction x weighting x time density -> a loss for each image; every mean is over elements.

EDM and EDM2 sum over elements instead: the same minimiser and, under Adam, the same steps, but another gradient norm,
so a clip threshold of theirs is C H W times ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.paths import Path, log_uniform
from selfguide.diffusion.preconditioning import Preconditioning, build_preconditioning
from selfguide.randomness import normal, uniform
from selfguide.spec.config import PathConfig
from selfguide.spec.sizes import UNCERTAINTY_FEATURES

_BELOW_ONE = 1 - 2.0**-24  # the largest fp32 below 1, where x is all noise


def sample_times(
    config: PathConfig, path: Path, seed: int, positions: Tensor, share: float
) -> Tensor:
    """(B,) training noise-times of these images, fp32; `share` of the training is behind.

    uniform (SiT); logit_normal, of tau (SD3, LightningDiT); log_normal (EDM, table 1) and log_uniform (VE), of sigma.
    From `uniform_after` on they are uniform, as in LightningDiT's long runs.
    """
    late = config.uniform_after is not None and share >= config.uniform_after
    density = "uniform" if late else config.time_density
    if density in ("uniform", "log_uniform"):
        u = uniform(seed, "noise-time", positions, 1)[:, 0]
        if density == "uniform":
            return path.training_time(u)
        ends = torch.tensor([path.last, path.first], dtype=torch.float64)
        return path.noise_time(log_uniform(u, *path.sigma(ends).tolist()))
    level = config.time_mean + config.time_std * normal(seed, "noise-time", positions, (1,))[:, 0]
    if density == "log_normal":
        return path.noise_time(level.exp()).clamp(max=_BELOW_ONE)
    return path.training_time(torch.sigmoid(level).clamp(max=_BELOW_ONE))


@dataclass(frozen=True)
class Objective:
    """What the raw output F of the network is trained on; t is its target, sd the data's standard deviation.

    plain: mean (F - t)^2. edm: w(sigma) mean (x0_hat - x0)^2 with w = (sigma^2 + sd^2) / (sigma sd)^2, for any
    prediction (Karras et al. 2022, table 1). uncertainty: edm / exp(u) + u, with a learned u of each image's noise
    level (Karras et al. 2024, eq. 14 to 16 and 21). min_snr: min(SNR, gamma) mean (x0_hat - x0)^2 with SNR = (a / b)^2,
    for any prediction (Hang et al. 2023). `cosine` adds that much of 1 - cos(F, t), the cosine over channels, the mean
    over positions (Yao et al. 2025).
    """

    preconditioning: Preconditioning
    weighting: Literal["plain", "edm", "uncertainty", "min_snr"] = "plain"
    cosine: float = 0.0
    snr_gamma: float = 5.0

    def losses(
        self,
        prediction: Tensor,
        x0: Tensor,
        eps: Tensor,
        tau: Tensor,
        log_variance: Tensor | None = None,
    ) -> Tensor:
        """(B,) in fp32 whatever the network's dtype; `log_variance` (B,) is u, which only uncertainty reads."""
        target = self.preconditioning.target(x0.float(), eps.float(), tau)
        prediction = prediction.float()
        loss = (prediction - target).square().flatten(1).mean(1)
        if self.weighting != "plain":
            loss = loss * self.factor(tau)
        if self.weighting == "uncertainty":
            if log_variance is None:
                raise ValueError("weighting=uncertainty needs the network's log_variance")
            loss = loss * torch.exp(-log_variance) + log_variance
        if self.cosine:
            angle = 1 - F.cosine_similarity(prediction, target, dim=1)  # (B, H, W)
            loss = loss + self.cosine * angle.flatten(1).mean(1)
        return loss

    def factor(self, tau: Tensor) -> Tensor:
        """(B,) fp32: by which a squared error of F counts, w |d x0 / d F|^2; under edm 1 where F is EDM's own."""
        path, sd = self.preconditioning.path, self.preconditioning.sigma_data
        tau = tau.double()  # so that EDM's own factor rounds to 1 exactly
        if self.weighting == "min_snr":
            # SNR |d x0 / dF|^2 is |d eps / dF|^2, which is finite where the SNR is 0 and the error of x0 is not
            noise, data = (
                self.preconditioning.noise_error(tau),
                self.preconditioning.data_error(tau),
            )
            return torch.minimum(noise.square(), self.snr_gamma * data.square()).float()
        a, b, _, _ = path.coefficients(tau)
        # (sigma^2 + sd^2) / (sigma sd)^2 with sigma = b / a, finite where a is 0
        w = (b.square() + (a * sd).square()) / (b * sd).square()
        return (w * self.preconditioning.data_error(tau).square()).float()


def build_objective(config: PathConfig) -> Objective:
    """The configured objective."""
    return Objective(
        build_preconditioning(config), config.weighting, config.cosine, config.snr_gamma
    )


class Uncertainty(nn.Module):
    """u = Linear(FourierFeatures(ln(sigma) / 4)): how hard a noise level is (Karras et al. 2024, eq. 14 to 16).

    Training reads it, sampling never does. A plain linear map is zero at first, where the loss is EDM's; normalised, as
    in EDM2's code, its row has length 1 and no bias, and u is of unit variance at first. EDM2 also writes the
    normalised row back at each step, which a forward of ours never does: it keeps the size of Adam's steps from
    shrinking beside a row that grows.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, path: Path, *, normalised: bool = False) -> None:
        super().__init__()
        self.path = path
        count = UNCERTAINTY_FEATURES
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(count))
        self.register_buffer("phases", 2 * math.pi * torch.rand(count))
        self.linear = nn.Linear(count, 1, bias=not normalised)
        if normalised:
            nn.init.normal_(self.linear.weight)
        else:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, tau: Tensor) -> Tensor:
        """Noise-times (B,) -> u (B,), fp32."""
        # a path's ends have sigma 0 and infinity
        c_noise = self.path.sigma(tau.float()).log().clamp(-10, 10) / 4
        waves = torch.cos(c_noise[:, None] * self.frequencies.float() + self.phases.float())
        bias = None if self.linear.bias is None else self.linear.bias.float()
        return F.linear(math.sqrt(2) * waves, self._row(), bias)[:, 0]

    def _row(self) -> Tensor:
        row = self.linear.weight.float()
        if self.linear.bias is not None:
            return row
        # their eps is beside the row's root mean square
        return row / (row.norm() + 1e-4 * math.sqrt(row.numel()))
