"""The network as a sampler sees it: time convention, preconditioning, dtype and guidance in one place.

Classifier-free guidance (Ho & Salimans 2022), within an interval of noise (Kynkaanniemi et al. 2024), and
autoguidance (Karras et al. 2024), which takes a weaker network for the unguided half.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import CONDITIONED, Condition, check_condition, concatenate
from selfguide.diffusion.paths import Estimate, Path
from selfguide.diffusion.preconditioning import Preconditioning
from selfguide.spec.architecture import Architecture
from selfguide.spec.config import Prediction
from shards.errors import UserError

# elements of the state up to which both halves run as one batch of 2B: that wins while a call's overhead counts, and
# loses once activations leave the caches. Two cores cross between 2,048 and 4,096 (python -m tools.bench sampling);
# GPUs are not measured
JOINT_NUMEL = 2048
# a grid's noise-time and an interval's end that mean the same number are rounded differently
TAU_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network on a path, guided by f_u + g (f_c - f_u): `g` is the total weight, 1 is none, 0 unconditional.

    The form is taken on the raw prediction; at a fixed x and noise-time x0, eps and v are affine in it, so it is the
    same on each. Where no image is conditioned f_u is f_c, and is not run. The state keeps its own dtype (fp32 or
    wider); the net gets its own, and noise-times in fp32. Nothing but the count of evaluations changes afterwards.

    Args:
        model: model(x, tau, condition) -> (B, >= C, H, W), tau (B,); channels beyond C are a learned sigma.
        condition: of each image of the batch.
        interval: noise-times, both ends in, where `g` holds. Outside, the plain conditional form is taken and the
            other half is not computed.
        prediction, sigma_data: what the net predicts on the path, and the data's deviation (prediction "edm").
        guided_channels: guide only the first so many, as DiT, SiT and LightningDiT do with 3; None is all.
        reference: takes the place of f_u (autoguidance), under its own condition and guidance.
        batched: both halves in one batch of 2B, or in turn; None is one batch where it is small, for then it is faster.

    Raises:
        UserError: a condition that the net cannot take, or settings that contradict each other.
    """

    model: nn.Module
    path: Path
    condition: Condition
    g: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    _: KW_ONLY
    prediction: Prediction = "v"
    sigma_data: float = 0.5
    guided_channels: int | None = None
    reference: Denoiser | None = None
    batched: bool | None = None
    evaluations: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.g):
            raise UserError(f"g={self.g} must be a finite number; 1 is no guidance")
        low, high = self.interval
        if not low <= high:
            raise UserError(
                f"interval={list(self.interval)} is a span of noise-times: give the lower one first"
            )
        net = getattr(self.model, "net", None)
        most = math.inf
        if isinstance(net, Architecture):
            check_condition(self.condition, net)
            most = net.channels
        if self.guided_channels is not None and not 1 <= self.guided_channels <= most:
            raise UserError(
                f"guided_channels={self.guided_channels} is not one of 1 to {most}; None guides all channels"
            )
        if self.reference is not None:
            self._check_reference(self.reference)

    def estimate(self, x: Tensor, tau: float) -> Estimate:
        """The guided prediction for x (B, C, H, W) at `tau` as x0, eps and v; one evaluation, guided or not."""
        object.__setattr__(self, "evaluations", self.evaluations + 1)
        return self.preconditioning.estimate(self._raw(x, tau), x, _time(tau))

    def velocity(self, x: Tensor, tau: float) -> Tensor:
        """dx/dtau of the probability-flow ODE, (B, C, H, W)."""
        return self.estimate(x, tau).v

    @cached_property
    def preconditioning(self) -> Preconditioning:
        return Preconditioning(self.path, self.prediction, self.sigma_data)

    def _raw(self, x: Tensor, tau: float) -> Tensor:
        """The guided raw prediction, in the dtype of the state."""
        if len(self.condition) != len(x):
            raise UserError(
                f"the condition is of {len(self.condition)} images and the state has {len(x)}; give one for each"
            )
        if not self._guided(tau):
            return self._net(x, tau, self.condition)
        if self.g == 0.0 and self.guided_channels is None:
            return self._unguided(x, tau)
        conditional, unguided = self._both(x, tau)
        guided = unguided + self.g * (conditional - unguided)
        if self.guided_channels is None:
            return guided
        return torch.cat(
            (guided[:, : self.guided_channels], conditional[:, self.guided_channels :]), 1
        )

    def _guided(self, tau: float) -> bool:
        low, high = self.interval
        inside = low - TAU_TOLERANCE <= tau <= high + TAU_TOLERANCE
        return inside and self.g != 1 and (self.reference is not None or self._conditioned)

    def _both(self, x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """f_c and f_u."""
        joint = x.numel() <= JOINT_NUMEL if self.batched is None else self.batched
        if joint and self.reference is None:
            conditional, unguided = self._net(torch.cat((x, x)), tau, self._pair).chunk(2)
            return conditional, unguided
        return self._net(x, tau, self.condition), self._unguided(x, tau)

    def _unguided(self, x: Tensor, tau: float) -> Tensor:
        if self.reference is not None:
            return self.reference._raw(x, tau)
        return self._net(x, tau, self._null)

    @cached_property
    def _conditioned(self) -> bool:
        """Whether any image is conditioned, so that the halves differ; read once, since a GPU waits for it."""
        return bool((self.condition.state == CONDITIONED).any())

    @cached_property
    def _null(self) -> Condition:
        return self.condition.null()

    @cached_property
    def _pair(self) -> Condition:
        return concatenate(self.condition, self._null)

    def _net(self, x: Tensor, tau: float, condition: Condition) -> Tensor:
        dtype = next((p.dtype for p in self.model.parameters()), x.dtype)
        times = torch.full((len(x),), tau, device=x.device, dtype=torch.float32)
        seen = self.preconditioning.net_input(x, _time(tau)).to(dtype)
        return self.model(seen, times, condition)[:, : x.shape[1]].to(x.dtype)

    def _check_reference(self, other: Denoiser) -> None:
        if self.batched:
            raise UserError(
                "batched=True joins two halves of one network, and a reference is another; drop one"
            )
        ours, theirs = (self.prediction, self.sigma_data), (other.prediction, other.sigma_data)
        middle = torch.tensor(0.5, dtype=torch.float64)
        if ours != theirs or self.path.coefficients(middle) != other.path.coefficients(middle):
            raise UserError(
                f"the reference predicts {theirs} on {type(other.path).__name__}, this network {ours} on "
                f"{type(self.path).__name__}; raw predictions of one kind can be compared only"
            )


def _time(tau: float) -> Tensor:
    """A scalar on the CPU, which every device takes without waiting."""
    return torch.tensor(tau, dtype=torch.float64)
