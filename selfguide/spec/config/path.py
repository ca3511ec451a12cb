"""`path=`: the road from data (noise-time 0) to noise (1), what is predicted there, and where on it training looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from selfguide.spec.config.laws import Neutral, Positive, ReadWith, Share, Within
from selfguide.spec.conventions import DDPM_STEPS
from shards.errors import UserError

Prediction = Literal["v", "eps", "x0", "edm"]

_BY_NOISE_TIME, _BY_SIGMA = ("uniform", "logit_normal"), ("log_normal", "log_uniform")
# path -> predictions and time densities. What is not here has no sane size there: v is (1 + sigma)^2 eps on ve and edm,
# sigma of uniform noise-times has no mean, EDM's mixture needs a = 1. A log-normal sigma is a logit-normal noise-time.
_ON_PATH: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rectified_flow": (("v", "eps", "x0"), _BY_NOISE_TIME),
    "ddpm": (("eps", "x0", "v"), _BY_NOISE_TIME),
    "vp": (("eps", "x0", "v"), _BY_NOISE_TIME),
    "ve": (("eps", "x0", "edm"), _BY_SIGMA),
    "edm": (("edm", "x0", "eps"), _BY_SIGMA),
}
# least and largest noise level of the paths on which noise has no bound
SIGMAS = {"ve": (0.02, 100.0), "edm": (0.002, 80.0)}
# where sampling ended before `last` was a setting
LAST = 1e-3
# where VP's training began before `least` was one
LEAST = 1e-5
_NORMAL = ReadWith("time_density=logit_normal", "time_density=log_normal")


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Path, prediction, weighting and time density of training."""

    name: Literal["rectified_flow", "ddpm", "vp", "ve", "edm"] = "rectified_flow"
    # 1e-4 is SGFM's form
    sigma_min: Annotated[float, Within(0.0, 1.0, below=True), ReadWith("name=rectified_flow")] = 0.0
    # as in DDPM's, diffusers' and guided-diffusion's code: quad is SGDM's, and what latent diffusion's calls linear
    betas: Annotated[
        Literal["linear", "quad", "scaled_linear", "cosine"], ReadWith("name=ddpm")
    ] = "linear"
    # noise-time from which training draws; 0 is U-ViT's
    least: Annotated[float, Within(0.0, 0.1), Neutral(LEAST), ReadWith("name=vp")] = LEAST
    # noise-time at which sampling ends; 1e-4 is U-ViT's, and 1e-3, SiT's, leaves noise of std 0.01
    last: Annotated[float, Within(0.0, 0.1), Positive(), Neutral(LAST), ReadWith("name=vp")] = LAST
    prediction: Prediction = "v"
    # of the data as the model sees it
    sigma_data: Annotated[
        float,
        Positive(),
        ReadWith("prediction=edm", "weighting=edm", "weighting=uncertainty"),
    ] = 0.5
    weighting: Literal["plain", "edm", "uncertainty", "min_snr"] = "plain"
    # largest weight of an error of the data; 5 in min-SNR weighting (Hang et al. 2023)
    snr_gamma: Annotated[float, Positive(), Neutral(5.0), ReadWith("weighting=min_snr")] = 5.0
    # the head that learns it: one normalised row without bias, EDM2's, or a plain linear map that begins at zero
    uncertainty: Annotated[
        Literal["affine", "normalised"], Neutral("affine"), ReadWith("weighting=uncertainty")
    ] = "affine"
    # weight of 1 - cos(v_hat, v); 1 in LightningDiT
    cosine: Annotated[float, Within(0.0)] = 0.0
    # uniform is SiT's, logit-normal LightningDiT's, log-normal EDM's, log-uniform VE's (of sigma)
    time_density: Literal["uniform", "logit_normal", "log_normal", "log_uniform"] = "uniform"
    # of the logit of tau, or of ln sigma (EDM: -1.2 and 1.2)
    time_mean: Annotated[float, Within(), _NORMAL] = 0.0
    time_std: Annotated[float, Positive(), _NORMAL] = 1.0
    # share of training after which times are drawn uniformly
    uniform_after: Annotated[float | None, Share(), ReadWith("time_density=logit_normal")] = None

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest noise-time that a network on this path knows: where sampling ends, and begins."""
        if self.name in SIGMAS:
            least, largest = SIGMAS[self.name]
            return least / (1 + least), largest / (1 + largest)
        return {"ddpm": 1 / DDPM_STEPS, "vp": self.last}.get(self.name, 0.0), 1.0


def read_by_sampling(path: PathConfig) -> dict[str, Any]:
    """Returns what a score's protocol names of the path; at its neutral value it leaves no trace there either."""
    return {"last": path.last} if path.last != LAST else {}


def check_on_path(path: PathConfig, setting: str, time: float) -> None:
    """Returns when features can be read at a noise-time: one between the path's ends.

    Args:
        setting: as it is typed, with {} in place of the noise-time.

    Raises:
        UserError: it lies beyond them.
    """
    last, first = path.ends
    if last <= time <= first:
        return
    # to a digit that is still inside
    least, largest = math.ceil(last * 1e4) / 1e4, math.floor(first * 1e4) / 1e4
    raise UserError(
        f"{setting.format(f'{time:g}')} is not on path.name={path.name}, whose noise-times go from {least:g} to "
        f"{largest:g}; take {setting.format(f'{largest if time > first else least:g}')}"
    )


def check_path(path: PathConfig, channels: int) -> None:
    """What prediction, density, weighting and loss mean for each other on this path and data of so many channels.

    Raises:
        UserError: the first law that does not hold, with its cure.
    """
    predictions, densities = _ON_PATH[path.name]
    for field, known in (("prediction", predictions), ("time_density", densities)):
        value = getattr(path, field)
        if value not in known:
            raise UserError(
                f"path.{field}={value} does not go with path.name={path.name}; take path.{field}={' or '.join(known)}"
            )
    # EDM's weight goes with edm, where it is 1, and with v: from 0.8 to 4 on rectified flow at sigma_data = 0.5. On VP
    # and DDPM our v is dx/dtau, not Salimans & Ho's a eps - b x0, and the weight follows beta: near 2 for most
    # noise-times, above 900 in pure noise. On a raw x0 it grows as 1 / sigma^2 and on a raw eps as sigma^2, ten
    # thousandfold and more: a few images would make the whole loss. Min-SNR weights are bounded on every prediction
    bounded = "edm" if path.name in ("ve", "edm") else "v"
    if path.weighting in ("edm", "uncertainty") and path.prediction in ("x0", "eps"):
        raise UserError(
            f"path.weighting={path.weighting} has no bound with path.prediction={path.prediction}; take "
            f"path.prediction={bounded}, or path.weighting=plain"
        )
    if path.cosine and path.prediction != "v":
        raise UserError(
            f"path.cosine={path.cosine} compares velocities, and path.prediction={path.prediction}; take "
            "path.prediction=v or path.cosine=0"
        )
    if path.cosine and channels == 1:
        raise UserError(
            f"path.cosine={path.cosine} compares directions over channels, and the data has one; take path.cosine=0"
        )
