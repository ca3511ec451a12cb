"""TEMI: groups that an image shares with its neighbours, found by many small heads on frozen features.

Adaloglou et al. 2023 (TEMI, arXiv 2303.17896), in the form of Adaloglou et al. 2024 (C-EDM, arXiv 2403.00570). A
student head and the average of its past, the teacher, each give an image a distribution over K groups. The student is
to agree with what the teacher says of a neighbour, by a mutual information that an exponent beta < 1 keeps from using
few groups. `selfguide.discovery.temi_fit` fits them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from selfguide.distributed import sum_over_ranks
from selfguide.randomness import stream_seed
from selfguide.spec.config.laws import Neutral
from shards.errors import UserError

Pair = tuple[Tensor, Tensor]  # (H, B, K) of the images, and of their neighbours


@dataclass(frozen=True, kw_only=True)
class TemiConfig:
    """How heads are fitted; defaults are C-EDM's table and, where it is silent, TEMI's code's.

    But for `memory` and `standardise`, which have small fits and features of any unit in mind.
    """

    groups: int  # K
    heads: int = 50  # H
    epochs: int = 200
    batch: int = 512  # of all ranks; no more than there are images
    learning_rate: float = 1e-4  # for 256 images, scaled linearly
    warmup: float = 0.1  # share of the epochs in which the learning rate rises: 20 of 200
    weight_decay: float = 1e-4
    # whether biases decay, too; TEMI's code excepts them
    decay_biases: Annotated[bool, Neutral(True)] = False
    # whether the first step has a learning rate of 0, as in TEMI's code, or of one step of the rise
    warmup_from_zero: Annotated[bool, Neutral(False)] = True
    momentum: float = 0.996  # of the teacher, a step, at most: see `teacher_momentum`
    memory: float = 0.02  # share of the fit that the teacher may remember
    marginal_momentum: float = 0.9  # of p~, a step
    temperature: float = 0.1  # of student and teacher
    beta: float = 0.6
    neighbours: int = 50
    hidden: int = 512
    width: int = 256
    frozen: int = 1  # epochs before the last layer moves
    standardise: bool = True  # mean 0 and spread 1 of each feature before the heads
    seed: int = 0

    def steps(self, count: int) -> int:
        """Updates in one epoch over `count` images."""
        return -(-count // min(self.batch, count))

    def teacher_momentum(self, count: int) -> float:
        """The teacher's momentum in a fit to `count` images.

        C-EDM's 0.996 remembers 250 steps of the 19,600 that 50,000 images take. In a fit of a few hundred steps that
        teacher would hardly leave its beginning: below 12,500 steps it remembers the share `memory` of them instead.
        """
        steps = self.epochs * self.steps(count)
        return min(self.momentum, max(0.0, 1 - 1 / (self.memory * steps)))

    def rate(self, step: int, warm: int, count: int) -> float:
        """The learning rate of the step of that number, from 0, where it rises over `warm` steps."""
        highest = self.learning_rate * min(self.batch, count) / 256
        if self.warmup_from_zero:
            return highest * (min(1.0, step / (warm - 1)) if warm > 1 else 1.0)
        return highest * min(1.0, (step + 1) / warm)

    def check(self, count: int) -> None:
        """Returns when these are settings of a fit to `count` images.

        Raises:
            UserError: settings that `count` images cannot be fitted with.
        """
        for name in ("groups", "heads", "epochs", "batch", "neighbours"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: give at least 1")
        if self.groups < 2:
            raise UserError("groups=1 separates nothing: give at least 2")
        if self.groups > count:
            raise UserError(
                f"groups={self.groups} of {count} images: some would be empty by necessity; give at most {count}"
            )
        if self.neighbours >= count:
            raise UserError(
                f"neighbours={self.neighbours} of {count} images: each has {count - 1} others; give fewer"
            )
        for name in ("learning_rate", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)}: give a finite number above 0")


class Heads(nn.Module):
    """H heads side by side: Linear-GELU-Linear to the unit sphere, then cosine with K directions, times a gain each.

    The last layer is a weight-normed Linear without bias, written out. Every layer is one batched product over heads.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, config: TemiConfig) -> None:
        super().__init__()
        heads, hidden, width = config.heads, config.hidden, config.width
        generator = torch.Generator().manual_seed(stream_seed(config.seed, "temi-heads", 0))

        def normal(*shape: int) -> nn.Parameter:  # DINO's initialisation of a head
            made = nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator)
            return nn.Parameter(made)

        self.temperature = config.temperature
        self.inner = normal(heads, features, hidden)
        self.inner_bias = nn.Parameter(torch.zeros(heads, 1, hidden))
        self.outer = normal(heads, hidden, width)
        self.outer_bias = nn.Parameter(torch.zeros(heads, 1, width))
        bound = width**-0.5
        directions = torch.empty(heads, config.groups, width).uniform_(
            -bound, bound, generator=generator
        )
        self.directions = nn.Parameter(directions)
        self.gain = nn.Parameter(torch.ones(heads, config.groups, 1))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    @property
    def biases(self) -> list[nn.Parameter]:
        return [self.inner_bias, self.outer_bias]

    def standardise(self, mean: NDArray, spread: NDArray) -> None:
        """Takes features to mean 0 and spread 1 from now on; one that never varies stays at 0."""
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.copy_(torch.from_numpy(1 / np.where(spread > 0, spread, 1)))

    def forward(self, x: Tensor, head: int | slice = slice(None)) -> Tensor:
        """(B, F) features -> (H, B, K) logits, the temperature applied; of one `head` (B, K)."""
        one = isinstance(head, int)
        chosen = slice(head, head + 1) if isinstance(head, int) else head
        x = (x - self.mean) * self.scale
        x = x.expand(len(self.inner[chosen]), -1, -1)  # (H, B, F), not copied
        x = F.gelu(torch.baddbmm(self.inner_bias[chosen], x, self.inner[chosen]))  # (H, B, hidden)
        z = torch.baddbmm(self.outer_bias[chosen], x, self.outer[chosen])  # (H, B, width)
        rows = self.gain[chosen] * F.normalize(self.directions[chosen], dim=2)  # (H, K, width)
        logits = F.normalize(z, dim=2) @ rows.mT / self.temperature  # (H, B, K)
        return logits[0] if one else logits


def pair_losses(student: Pair, teacher: Pair, marginal: Tensor, *, beta: float) -> Tensor:
    """(H, B) of TEMI's weighted mutual information loss, whose mean over images and heads is minimised.

    For an image x, a neighbour x' and head i (TEMI with beta, and its mean of weights over heads):

        l_i(x, x') = - w(x, x') ln sum_k (p_s(k | x) p_t(k | x'))^beta / p~(k),
        w(x, x') = mean over heads of sum_k p_t(k | x) p_t(k | x'),

    averaged over both orders of x and x'. No gradient reaches the teacher, the marginal or w. B may be 0, and parts of
    a batch on several ranks add up.

    Args:
        student, teacher: finite logits (H, B, K) of the images and of their neighbours, temperature applied.
        marginal: (H, K), p~, the share of each group in what the teacher says.
    """
    own, near = (s.log_softmax(2) for s in student)
    with torch.no_grad():
        log_p, log_p_near = (t.log_softmax(2) for t in teacher)
        weight = (log_p + log_p_near).exp().sum(2).mean(0)  # (B,)
        # a group that no image has had for hundreds of steps has underflown
        log_marginal = marginal.clamp_min(torch.finfo(marginal.dtype).tiny).log()[:, None]
    forth = (beta * (own + log_p_near) - log_marginal).logsumexp(2)
    back = (beta * (near + log_p) - log_marginal).logsumexp(2)
    return -weight * (forth + back) / 2


@torch.no_grad()
def update_marginal(marginal: Tensor, teacher: Pair, momentum: float) -> Tensor:
    """p~ (H, K) after a batch: its mean over all ranks, images and neighbours, enters by 1 - momentum.

    One all-reduce of sums and their count, so shares of any size, none included, are exact.
    """
    mass = torch.stack([t.softmax(2).sum(1) for t in teacher]).sum(0)  # (H, K)
    counted = torch.cat((mass.flatten(), mass.new_tensor([2.0 * teacher[0].shape[1]])))
    counted = sum_over_ranks(counted)
    return torch.lerp(counted[:-1].view_as(mass) / counted[-1], marginal, momentum)
