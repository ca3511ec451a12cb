"""Parts that more than one backbone is made of: time and condition embeddings, attention, patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import (
    CONDITIONED,
    NULL,
    UNCONDITIONAL,
    Condition,
    zero_unconditioned,
)
from selfguide.spec.architecture import TimeInput
from shards.errors import UserError

# the number a net is fed for noise-times (B,) in fp32; see `TimeInput` for who feeds what. sigma = tau / (1 - tau) is
# kept finite at both ends
_TIME_INPUTS: dict[TimeInput, Callable[[Tensor], Tensor]] = {
    "noise": lambda tau: tau,
    "data": lambda tau: 1 - tau,
    "index": lambda tau: 1000 * tau - 1,
    "noise_999": lambda tau: 999 * tau,
    "noise_1000": lambda tau: 1000 * tau,
    "log_sigma": lambda tau: torch.logit(tau, eps=1e-6) / 4,
    "log_half_sigma": lambda tau: torch.logit(tau, eps=1e-6) - math.log(2),
}


def time_input(kind: TimeInput, tau: Tensor, *, whole: bool = False) -> Tensor:
    """The number a net is fed for noise-times `tau` (B,), fp32.

    Args:
        whole: 1000 times a noise-time in fp32 misses most of the indices of a table of 1000, by 3e-5 at most. What is
            within 1e-3 of a whole number becomes it; times in between, which some samplers visit, are as they are.
    """
    time = _TIME_INPUTS[kind](tau.float())
    if not whole or kind not in ("index", "noise_1000"):
        return time
    nearest = time.round()
    return torch.where((time - nearest).abs() < 1e-3, nearest, time)


def sinusoid(value: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, width), cosines first, periods from 2 pi to 2 pi `period` (exponent i / half)."""
    rates = torch.exp(
        -math.log(period) * torch.arange(width // 2, device=value.device) / (width // 2)
    )
    angles = value.float()[:, None] * rates[None]
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class TimeEmbedding(nn.Module):
    """A time as its source feeds it (B,) -> (B, width), before the last activation.

    Args:
        frequencies: width of the sinusoid that `wave` makes of the time.
    """

    def __init__(
        self, frequencies: int, width: int, wave: Callable[[Tensor, int], Tensor] = sinusoid
    ) -> None:
        super().__init__()
        self.frequencies, self.wave = frequencies, wave
        self.hidden = nn.Linear(frequencies, width)
        self.out = nn.Linear(width, width)

    def forward(self, time: Tensor, early: Tensor | None = None) -> Tensor:
        """`early` (B, frequencies), where there is one, joins the sinusoid."""
        waves = self.waves(time)
        return self.out(F.silu(self.hidden(waves if early is None else waves + early)))

    def waves(self, time: Tensor) -> Tensor:
        """The sinusoid alone, (B, frequencies) in the weights' dtype."""
        return self.wave(time, self.frequencies).to(self.hidden.weight.dtype)


class ConditionEmbedding(nn.Module):
    """Embeds id, multi-hot or dense in one vector (B, width); else the null or the unconditional row.

    A group's row by id, the mean of rows by multi-hot, a dense vector projected (or, with `project` off, as it is:
    SGFM's token is the prototype itself). Every parameter enters every forward, masked by state: a rank whose batch
    happens to need only some of them would otherwise reduce other gradients than its peers. What images hold that are
    not conditioned is zeroed before it meets a weight, for zero times NaN is NaN.
    """

    zero_unconditional = False  # nothing known is a vector of zeros (SGFM's paper); its row stays, and learns nothing

    def __init__(self, width: int, classes: int, dense: int, *, project: bool = True) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        self.unconditional = nn.Parameter(torch.randn(width) * 0.02)
        self.labels = nn.Embedding(classes, width) if classes else None
        self.dense = nn.Linear(dense, width) if dense and project else None

    def forward(self, condition: Condition) -> Tensor:
        state = condition.state
        conditioned = (state == CONDITIONED)[:, None]  # (B, 1)
        unconditional = 0 * self.unconditional if self.zero_unconditional else self.unconditional
        embedded = (state == NULL)[:, None] * self.null
        embedded = embedded + (state == UNCONDITIONAL)[:, None] * unconditional
        if self.labels is not None:
            rows = self.labels(condition.values("id", state))
            if condition.id is None:
                rows = 0 * rows
            if condition.multi_hot is not None:
                several = zero_unconditioned(condition.multi_hot, state).to(rows.dtype)
                share = several / several.sum(1, keepdim=True).clamp_min(1e-6)
                rows = rows + share @ self.labels.weight
            embedded = embedded + conditioned * rows
        if self.dense is not None:
            dense = condition.values("dense", self.null, self.dense.in_features)
            embedded = embedded + conditioned * self.dense(dense)
        elif condition.dense is not None:
            embedded = embedded + zero_unconditioned(condition.dense, state)
        return embedded.to(self.null.dtype)


class PatchEmbedding(nn.Module):
    """A vector for each patch -> (B, L, width), added to the patch tokens; with null and unconditional rows."""

    def __init__(self, width: int, dense: int, *, project: bool = True) -> None:
        super().__init__()
        self.one = ConditionEmbedding(width, 0, dense, project=project)

    def forward(self, condition: Condition, tokens: int) -> Tensor:
        """(B, L, D); without patch vectors it is the null or unconditional row."""
        if condition.patch is not None and condition.patch.shape[1] != tokens:
            found = condition.patch.shape[1]
            raise UserError(
                f"condition.patch has {found} vectors; this network has {tokens} patches"
            )
        state = condition.state  # (B,), or (B, L) where patches were dropped one by one
        state = (state if state.dim() > 1 else state[:, None]).expand(-1, tokens).flatten()
        dense = None if condition.patch is None else condition.patch.flatten(0, 1)
        embedded = self.one(Condition(state, dense=dense))
        return embedded.view(len(condition), tokens, -1)


class AugmentEmbedding(nn.Module):
    """How images were augmented -> (B, width), linear without a bias: zeros for images as they are, as in sampling."""

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(labels, width, bias=False)

    def forward(self, condition: Condition) -> Tensor:
        weight, labels = self.linear.weight, condition.augment
        if labels is None:
            labels = weight.new_zeros(len(condition), self.linear.in_features)
        return self.linear(labels.to(weight.dtype))


def with_spatial(x: Tensor, condition: Condition, channels: int) -> Tensor:
    """The input with its masks beside it, (B, C + M, H, W); masks of images not conditioned are zero (SGDM)."""
    if not channels:
        return x
    return torch.cat((x, condition.values("spatial", x, channels, *x.shape[2:])), dim=1)


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """(B, T, parts * heads * d) -> (parts, B, heads, T, d): queries, keys and values of one linear map."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def attention(q: Tensor, k: Tensor, v: Tensor, open_to: Tensor | None = None) -> Tensor:
    """(B, heads, T, d) each -> (B, T, heads * d). `open_to` (T, T) bool: which keys a query, by row, reads."""
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=open_to)
    return mixed.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int, *, approximate: Literal["none", "tanh"]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def unpatchify(patches: Tensor, edge: int, patch: int, channels: int) -> Tensor:
    """(B, edge * edge, patch * patch * C) -> (B, C, H, W)."""
    image = patches.view(len(patches), edge, edge, patch, patch, channels)
    return image.permute(0, 5, 1, 3, 2, 4).reshape(
        len(patches), channels, edge * patch, edge * patch
    )
