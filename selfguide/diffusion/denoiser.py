"""The network as a sampler sees it: time convention, preconditioning, dtype and guidance in one place.

Guidance leads away from a weak model, within an interval of noise (Kynkaanniemi et al. 2024). What the weak model is
makes the method: the network without its condition (classifier-free guidance, Ho & Salimans 2022), a weaker network
(autoguidance, Karras et al. 2024), a head at one of its own layers (internal guidance, Zhou et al. 2025), its own way
with fewer tokens, or several of these at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import CONDITIONED, Condition, check_condition, concatenate
from selfguide.diffusion.paths import Estimate, Path
from selfguide.diffusion.preconditioning import Preconditioning
from selfguide.randomness import uniform
from selfguide.spec.architecture import Architecture, PatchTransformer
from selfguide.spec.config import Prediction
from shards.errors import UserError

# elements of the state up to which both halves run as one batch of 2B: that wins while a call's overhead counts, and
# loses once activations leave the caches. Two cores cross between 2,048 and 4,096 (python -m tools.bench sampling);
# GPUs are not measured
JOINT_NUMEL = 2048
# a grid's noise-time and an interval's end that mean the same number are rounded differently
TAU_TOLERANCE = 1e-9

# what one evaluation runs: the network alone, the weak model alone, or both
Ran = Literal["strong", "weak", "both"]


class Weak(ABC):
    """What is evaluated as f_weak in f_weak + g (f_strong - f_weak), at the same state and noise-time."""

    def differs(self, strong: Denoiser) -> bool:
        """Whether it is another model than the strong one; where it is not, nothing is guided."""
        return True

    def check(self, strong: Denoiser) -> None:
        """Returns when it can guide this network.

        Raises:
            UserError: it cannot.
        """
        return

    @abstractmethod
    def alone(self, strong: Denoiser, x: Tensor, tau: float) -> Tensor:
        """f_weak (B, C, H, W), as a raw prediction of the strong network's kind, in the dtype of the state."""

    def both(self, strong: Denoiser, x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """f_strong and f_weak."""
        return strong.net(x, tau, strong.condition), self.alone(strong, x, tau)


class Dropped(Weak):
    """The same network with its condition dropped: classifier-free guidance. Where nothing is conditioned, itself."""

    def differs(self, strong: Denoiser) -> bool:
        return strong.conditioned

    def alone(self, strong: Denoiser, x: Tensor, tau: float) -> Tensor:
        return strong.net(x, tau, strong.null)

    def both(self, strong: Denoiser, x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        joint = x.numel() <= JOINT_NUMEL if strong.batched is None else strong.batched
        if not joint:
            return super().both(strong, x, tau)
        conditional, null = strong.net(torch.cat((x, x)), tau, strong.pair).chunk(2)
        return conditional, null


@dataclass(frozen=True, eq=False)
class Other(Weak):
    """Another network, under its own condition and guidance: autoguidance."""

    denoiser: Denoiser

    def check(self, strong: Denoiser) -> None:
        other = self.denoiser
        ours, theirs = (each.prediction for each in (strong, other))
        middle = torch.tensor(0.5, dtype=torch.float64)
        same = (ours, strong.sigma_data) == (theirs, other.sigma_data)
        if not same or strong.path.coefficients(middle) != other.path.coefficients(middle):
            raise UserError(
                f"the weak model predicts {(theirs, other.sigma_data)} on {type(other.path).__name__}, this network "
                f"{(ours, strong.sigma_data)} on {type(strong.path).__name__}; raw predictions of one kind can be "
                "compared only"
            )

    def alone(self, strong: Denoiser, x: Tensor, tau: float) -> Tensor:
        return self.denoiser._raw(x, tau)


@dataclass(frozen=True, eq=False)
class Head(Weak):
    """A head on the tokens of one of the network's own layers: both predictions are of one forward.

    Args:
        layer: whose tokens (B, T, D) it reads, counted from 1.
        head: head(tokens, noise-times (B,), condition) -> (B, >= C, H, W), of the network's kind of prediction.
    """

    layer: int
    head: nn.Module

    def alone(self, strong: Denoiser, x: Tensor, tau: float) -> Tensor:
        seen, times = strong.fed(x, tau)
        tokens = strong.model.features(seen, times, strong.condition, self.layer)  # type: ignore[operator]
        return read(self.head(tokens, times, strong.condition), x)

    def both(self, strong: Denoiser, x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        seen, times = strong.fed(x, tau)
        out, (tokens,) = strong.model.with_features(  # type: ignore[operator]
            seen, times, strong.condition, [self.layer]
        )
        return read(out, x), read(self.head(tokens, times, strong.condition), x)


@dataclass(frozen=True, eq=False)
class Routed(Weak):
    """The same network along the way that it trains on with `model.route`: some tokens skip its middle blocks.

    Args:
        seeds: (B,) int64; which tokens skip is a pure function of an image's seed and of the noise-time.
    """

    seeds: Tensor

    def alone(self, strong: Denoiser, x: Tensor, tau: float) -> Tensor:
        net = cast(PatchTransformer, strong.model.net)
        drawn = uniform(round(tau * 2**32), "route", self.seeds, net.tokens)
        with strong.model.routed(drawn):  # type: ignore[operator]
            return strong.net(x, tau, strong.condition)


@dataclass(frozen=True, eq=False)
class Mixed(Weak):
    """Several at once: f + (g - 1) * (the sum of share_i (f - f_i)), which is guidance by the sum of share_i f_i.

    Args:
        parts: weak models and their shares, which add up to 1; the first one may share the network's forward.
    """

    parts: Sequence[tuple[Weak, float]]

    def differs(self, strong: Denoiser) -> bool:
        return any(part.differs(strong) for part, _ in self.parts)

    def check(self, strong: Denoiser) -> None:
        for part, _ in self.parts:
            part.check(strong)

    def alone(self, strong: Denoiser, x: Tensor, tau: float) -> Tensor:
        (first, share), *_ = self.parts
        return self._joined(strong, x, tau, share * first.alone(strong, x, tau))

    def both(self, strong: Denoiser, x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        (first, share), *_ = self.parts
        out, weak = first.both(strong, x, tau)
        return out, self._joined(strong, x, tau, share * weak)

    def _joined(self, strong: Denoiser, x: Tensor, tau: float, first: Tensor) -> Tensor:
        """`first` and the shares of the others."""
        for part, share in self.parts[1:]:
            first = first + share * part.alone(strong, x, tau)
        return first


DROPPED = Dropped()


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network on a path, guided by f_u + g (f_c - f_u): `g` is the total weight, 1 is none, 0 the weak model alone.

    The form is taken on the raw prediction; at a fixed x and noise-time x0, eps and v are affine in it, so it is the
    same on each. Where the weak model is no other than the network it is not run. The state keeps its own dtype (fp32
    or wider); the net gets its own, and noise-times in fp32. Nothing but the counts of evaluations changes afterwards.

    Args:
        model: model(x, tau, condition) -> (B, >= C, H, W), tau (B,); channels beyond C are a learned sigma.
        condition: of each image of the batch.
        interval: noise-times, both ends in, where `g` holds. Outside, the plain conditional form is taken and the
            other half is not computed.
        prediction, sigma_data: what the net predicts on the path, and the data's deviation (prediction "edm").
        guided_channels: guide only the first so many, as DiT, SiT and LightningDiT do with 3; None is all.
        weak: what f_u is; by default the network without its condition.
        batched: both halves of classifier-free guidance in one batch of 2B, or in turn; None is one batch where it is
            small, for then it is faster.

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
    weak: Weak = DROPPED
    batched: bool | None = None
    evaluations: int = field(default=0, init=False)
    # evaluations by what they ran
    ran: Counter[Ran] = field(default_factory=Counter, init=False)

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
        if self.batched and not isinstance(self.weak, Dropped):
            raise UserError(
                "batched=True joins two halves of one network, and the weak model is another; drop one"
            )
        self.weak.check(self)

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
            self.ran["strong"] += 1
            return self.net(x, tau, self.condition)
        if self.g == 0.0 and self.guided_channels is None:
            self.ran["weak"] += 1
            return self.weak.alone(self, x, tau)
        self.ran["both"] += 1
        strong, weak = self.weak.both(self, x, tau)
        guided = weak + self.g * (strong - weak)
        if self.guided_channels is None:
            return guided
        return torch.cat((guided[:, : self.guided_channels], strong[:, self.guided_channels :]), 1)

    def _guided(self, tau: float) -> bool:
        low, high = self.interval
        inside = low - TAU_TOLERANCE <= tau <= high + TAU_TOLERANCE
        return inside and self.g != 1 and self.weak.differs(self)

    def net(self, x: Tensor, tau: float, condition: Condition) -> Tensor:
        """The network's raw prediction for states (B, C, H, W) of any number, in their dtype."""
        return read(self.model(*self.fed(x, tau), condition), x)

    def fed(self, x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """What the network is fed for a state: preconditioned and in its own dtype, and noise-times (B,) in fp32."""
        dtype = next((p.dtype for p in self.model.parameters()), x.dtype)
        times = torch.full((len(x),), tau, device=x.device, dtype=torch.float32)
        return self.preconditioning.net_input(x, _time(tau)).to(dtype), times

    @cached_property
    def conditioned(self) -> bool:
        """Whether any image is conditioned, so that the halves differ; read once, since a GPU waits for it."""
        return bool((self.condition.state == CONDITIONED).any())

    @cached_property
    def null(self) -> Condition:
        return self.condition.null()

    @cached_property
    def pair(self) -> Condition:
        """Of both halves, (2B)."""
        return concatenate(self.condition, self.null)


def read(out: Tensor, x: Tensor) -> Tensor:
    """The prediction (B, C, H, W) in what a network returned, without a learned sigma, in the dtype of the state."""
    return out[:, : x.shape[1]].to(x.dtype)


def _time(tau: float) -> Tensor:
    """A scalar on the CPU, which every device takes without waiting."""
    return torch.tensor(tau, dtype=torch.float64)
