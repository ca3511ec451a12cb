"""Every preset of configs/path against a plain loss of its source, written with the source's own times and tables.

The source is given the data, the noise and its own time variable; ours gets the same noise level. What is compared:
what the network reads, the time that the source draws, and the loss of the network's raw output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import configs
from launcher.compose import compose
from selfguide.diffusion.objectives import build_objective, sample_times
from selfguide.diffusion.paths import build_path
from selfguide.spec.config import PathConfig

Agree = Callable[[Tensor, Tensor, float], None]
PRESETS = sorted(path.stem for path in (Path(configs.__file__).parent / "path").glob("*.yaml"))
GENERATOR = torch.Generator().manual_seed(0)
SHAPE = (64, 4, 3, 3)
X0, EPS, OUT = torch.randn(3, *SHAPE, dtype=torch.float64, generator=GENERATOR)
# quantiles of the source's density of times, so that a time of each kind is compared
QUANTILES = (np.arange(64) + 0.5) / 64


class Source(NamedTuple):
    """What a source feeds its network and is charged, and its times."""

    # (quantiles in (0, 1)) -> the source's time variable
    times: Callable[[np.ndarray], np.ndarray]
    # of that time: our noise-time
    tau: Callable[[np.ndarray], np.ndarray]
    # (x0, eps, time) -> what the network reads
    read: Callable[[Tensor, Tensor, Tensor], Tensor]
    # (raw output, x0, eps, time) -> loss of each image
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def preset(name: str) -> PathConfig:
    return compose(["experiment=in1k_dit", "cluster=slurm", f"path={name}"]).path


def mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def wide(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


# discrete tables, indexed 0 to 999 as in the published codes


def linear() -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def scaled() -> np.ndarray:
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def quad() -> np.ndarray:
    """SGDM's, as latent diffusion's code makes what it calls linear."""
    return np.cumprod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2)


def cosine() -> np.ndarray:
    """Improved diffusion's: betas of two neighbouring values of abar, the largest cut at 0.999."""

    def abar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    kept, product = [], 1.0
    for i in range(1000):
        product *= 1 - min(1 - abar((i + 1) / 1000) / abar(i / 1000), 0.999)
        kept.append(product)
    return np.array(kept)


def discrete(table: np.ndarray, predicts: str = "eps", gamma: float | None = None) -> Source:
    abar = torch.from_numpy(table)

    def read(x0: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        kept = wide(abar[index.long()])
        return kept.sqrt() * x0 + (1 - kept).sqrt() * eps

    def loss(out: Tensor, x0: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        snr = abar[index.long()] / (1 - abar[index.long()])
        error = mean((out - (eps if predicts == "eps" else x0)) ** 2)
        if gamma is None:
            return error
        # Hang et al. 2023: min(SNR, gamma) on x0, divided by the SNR on eps
        weight = torch.stack([snr, torch.full_like(snr, gamma)]).min(0).values
        return error * (weight / snr if predicts == "eps" else weight)

    return Source(
        times=lambda q: np.floor(1000 * q), tau=lambda index: (index + 1) / 1000, read=read, loss=loss
    )  # fmt: skip


def straight(smin: float = 0.0, cosine: float = 0.0, logit_normal: bool = False) -> Source:
    """SiT's, LightningDiT's and SGFM's: t is 1 at data, and the net says u = x0 - (1 - smin) eps, minus our v."""

    def read(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return wide(t) * x0 + (1 - (1 - smin) * wide(t)) * eps

    def loss(out: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        u, said = x0 - (1 - smin) * eps, -out
        error = mean((said - u) ** 2)
        for row, column in np.ndindex(*SHAPE[2:]) if cosine else ():
            a, b = said[:, :, row, column], u[:, :, row, column]
            angle = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
            error = error + cosine * (1 - angle) / math.prod(SHAPE[2:])
        return error

    times = (lambda q: 1 / (1 + np.exp(-stats.norm.ppf(q)))) if logit_normal else (lambda q: q)
    return Source(times=times, tau=lambda t: 1 - t, read=read, loss=loss)


def edm(p_mean: float, p_std: float) -> Source:
    """NVIDIA's losses, their sum over elements as a mean; D = c_skip y + c_out F (c_in y)."""
    sd = 0.5

    def read(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        return (x0 + wide(sigma) * eps) / (wide(sigma) ** 2 + sd**2).sqrt()

    def loss(out: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        s = wide(sigma)
        skip, scale = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
        weight = (s**2 + sd**2) / (s * sd) ** 2
        return mean(weight * (skip * (x0 + s * eps) + scale * out - x0) ** 2)

    return Source(
        times=lambda q: np.exp(p_mean + p_std * stats.norm.ppf(q)),
        tau=lambda sigma: sigma / (1 + sigma),
        read=read,
        loss=loss,
    )


def vp(t: Tensor) -> tuple[Tensor, Tensor]:
    """abar and sigma of EDM's table 1: sigma^2 = exp(19.9 t^2 / 2 + 0.1 t) - 1."""
    sigma = (0.5 * 19.9 * t**2 + 0.1 * t).expm1().sqrt()
    return 1 / (1 + sigma**2), sigma


def vp_loss(out: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """D = y - sigma F, weighted by 1 / sigma^2."""
    sigma = wide(vp(t)[1])
    y = x0 + sigma * eps
    return mean((y - sigma * out - x0) ** 2 / sigma**2)


def ve_loss(out: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """D = y + sigma F, weighted by 1 / sigma^2; its net says F where ours says eps = -F."""
    s = wide(sigma)
    return mean((x0 + s * eps - s * out - x0) ** 2 / s**2)


SOURCES: dict[str, Source] = {
    "ddpm": discrete(linear()),
    "ddpm_quad": discrete(quad()),
    "ddpm_scaled": discrete(scaled()),
    "ddpm_cosine": discrete(cosine()),
    "ddpm_min_snr": discrete(cosine(), "x0", 5.0),
    "rectified_flow": straight(),
    "rectified_flow_logit_normal": straight(logit_normal=True),
    "lightning": straight(cosine=1.0, logit_normal=True),
    "sgfm": straight(smin=1e-4),
    "edm": edm(-1.2, 1.2),
    "edm2": edm(-0.4, 1.0),
    "vp": Source(
        times=lambda q: 1 + q * (1e-5 - 1),
        tau=lambda t: t,
        read=lambda x0, eps, t: wide(vp(t)[0].sqrt()) * (x0 + wide(vp(t)[1]) * eps),
        loss=vp_loss,
    ),
    "ve": Source(
        times=lambda q: 0.02 * (100 / 0.02) ** q,
        tau=lambda sigma: sigma / (1 + sigma),
        read=lambda x0, eps, sigma: x0 + wide(sigma) * eps,
        loss=ve_loss,
    ),
}


def test_every_preset_of_a_path_has_a_source_here() -> None:
    assert sorted(SOURCES) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_network_reads_is_its_sources(name: str, agree: Agree) -> None:
    source, form = SOURCES[name], build_objective(preset(name)).preconditioning
    time = source.times(QUANTILES)
    made = form.noised(X0, EPS, torch.from_numpy(source.tau(time)))
    agree(made, source.read(X0, EPS, torch.from_numpy(time)), 1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_is_its_sources(name: str, agree: Agree) -> None:
    """To fp32, in which our losses are taken."""
    source, config = SOURCES[name], preset(name)
    time = source.times(QUANTILES)
    wanted, u = source.loss(OUT, X0, EPS, torch.from_numpy(time)), None
    if config.weighting == "uncertainty":
        u = torch.linspace(-1, 1, len(time))
        wanted = wanted / u.double().exp() + u.double()
    tau = torch.from_numpy(source.tau(time))
    made = build_objective(config).losses(OUT, X0, EPS, tau, u)
    # each image over its own loss, for those of pure noise are the largest by far
    agree(made / wanted, torch.ones_like(wanted), 1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_times_are_drawn_from_its_sources_density(name: str) -> None:
    """Quantile for quantile: 200,000 draws against the source's own quantiles."""
    config, source = preset(name), SOURCES[name]
    drawn = sample_times(config, build_path(config), 0, torch.arange(200_000), 0.0).double().numpy()
    shares = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    wanted = np.sort(source.tau(source.times(shares)))
    for share, tau in zip(shares, wanted, strict=True):
        # the share of draws below a quantile, to four standard errors and a table's one entry
        below = (drawn <= tau + 1e-9).mean()
        slack = 1 / 1000 if config.name == "ddpm" else 0
        assert abs(below - share) < 4 * math.sqrt(share * (1 - share) / len(drawn)) + slack


def test_uvit_draws_its_times_from_zero() -> None:
    """`path.least=0`: Bao et al. 2023 draw t uniformly from [0, 1)."""
    config = compose(["experiment=in1k_dit", "cluster=slurm", "path=vp", "path.least=0"]).path
    ends = build_path(config).training_time(torch.tensor([0.0, 0.25, 1.0]))
    assert ends.tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_min_snr_weighs_other_predictions_as_its_source(predicts: str) -> None:
    """Hang et al. 2023, their code: min(SNR, 5) / SNR on eps, and / (SNR + 1) on Salimans & Ho's v = a eps - b x0."""
    path = {"name": "ddpm", "betas": "cosine", "weighting": "min_snr", "prediction": predicts}
    objective = build_objective(PathConfig(**path))  # type: ignore[arg-type]
    index = np.arange(0, 1000, 37)
    tau = torch.from_numpy((index + 1) / 1000)
    abar = torch.from_numpy(cosine()[index])
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5)
    factor = objective.factor(tau).double()
    if predicts == "eps":
        torch.testing.assert_close(factor, weight / snr, rtol=1e-6, atol=0)
        return
    # our v is dx/dtau: an error of it is one of x0 by another factor, and min(SNR, 5) |d x0|^2 is the same loss
    per_x0 = objective.preconditioning.data_error(tau)
    theirs = weight / (snr + 1) / (1 - abar)  # d x0 / d v is b there
    torch.testing.assert_close(factor / per_x0.square(), theirs, rtol=1e-6, atol=0)


def test_min_snr_is_finite_at_both_ends_of_a_path_that_has_them() -> None:
    ends = torch.tensor([0.0, 1.0])
    for predicts in ("eps", "x0", "v"):
        config = PathConfig(weighting="min_snr", prediction=predicts)  # type: ignore[arg-type]
        assert build_objective(config).factor(ends).isfinite().all(), predicts
