"""What the UNets are made of: embeddings of time and condition, residual blocks, attention, changes of grid.

Residual block: Ho et al. 2020, appendix B; with a change of grid inside as in BigGAN (Brock et al. 2019, appendix B);
with scale and shift as in Dhariwal & Nichol 2021, section 3. Attention with one key and value for all heads: Imagen's
(Saharia et al. 2022, appendix B), in the net that Hu et al. 2023 released.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import CONDITIONED, Condition, zero_unconditioned
from selfguide.models.blocks import attention, split_heads
from selfguide.spec.unet import CONTEXT_WIDTH, Stage, UNetArchitecture

Change = Literal["down", "up"]


def endpoint_sinusoid(value: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, width), sines first, periods from 2 pi to 2 pi `period` with both ends in (exponent i / (half - 1)).

    DDPM's and DDAE's; EDM's too, which has its halves swapped.
    """
    exponents = torch.linspace(0, 1, width // 2, device=value.device)
    angles = value.float()[:, None] * period**-exponents
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class ConditionLinear(nn.Module):
    """A linear map of [one-hot or multi-hot of K groups; dense] -> (B, width); zeros for images not conditioned.

    A one-hot times the weight is a row of it, looked up, so that (B, K) is never made. Every parameter enters every
    forward: a rank whose batch happens to be unconditional would otherwise reduce other gradients than its peers.
    What images hold that are not conditioned is zeroed before it meets a weight, for zero times NaN is NaN.
    """

    def __init__(self, classes: int, dense: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.inputs, self.width = classes + dense, width
        self.rows = nn.Parameter(torch.empty(classes, width)) if classes else None
        self.dense = nn.Parameter(torch.empty(dense, width)) if dense else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        bound = 1 / math.sqrt(self.inputs)  # nn.Linear's own
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, condition: Condition, gain: float = 1.0) -> Tensor:
        """`gain` multiplies the one-hot and the multi-hot."""
        conditioned = (condition.state == CONDITIONED)[:, None]  # (B, 1)
        total = (
            torch.zeros_like(conditioned)
            if self.bias is None
            else self.bias.expand(len(conditioned), -1)
        )
        if self.rows is not None:
            total = total + conditioned * (gain * self._groups(condition, self.rows))
        if self.dense is not None:
            dense = condition.values("dense", self.dense, len(self.dense))
            total = total + conditioned * (dense @ self.dense)
        return total

    @staticmethod
    def _groups(condition: Condition, rows: Tensor) -> Tensor:
        if condition.id is None and condition.multi_hot is None:
            return 0 * rows[:1]
        total, state = rows.new_zeros(1), condition.state
        if condition.id is not None:
            total = F.embedding(zero_unconditioned(condition.id, state), rows)
        if condition.multi_hot is not None:
            total = total + zero_unconditioned(condition.multi_hot, state).to(rows.dtype) @ rows
        return total

    def xavier(self) -> None:
        """Glorot's uniform weights for the whole map, and no bias."""
        bound = math.sqrt(6 / (self.inputs + self.width))
        for weight in (self.rows, self.dense):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class GuidanceMLP(nn.Module):
    """The condition through Linear, SiLU, Linear -> (B, width) (Hu et al. 2023, section 4.1)."""

    def __init__(self, net: UNetArchitecture) -> None:
        super().__init__()
        self.hidden = ConditionLinear(net.classes, net.dense, net.guidance_width)
        self.out = nn.Linear(net.guidance_width, net.guidance_width)

    def forward(self, condition: Condition) -> Tensor:
        return self.out(F.silu(self.hidden(condition)))


class ContextTokens(nn.Module):
    """The condition, and in the form imagen the time, as tokens (B, S, 32) for attention to read."""

    def __init__(self, net: UNetArchitecture) -> None:
        super().__init__()
        self.tokens: nn.Module | None = None
        self.time: nn.Module | None = None
        if net.tokens:
            self.tokens = ConditionLinear(net.classes, net.dense, net.tokens * CONTEXT_WIDTH)
        if net.time_tokens:
            out = nn.Linear(net.base, net.time_tokens * CONTEXT_WIDTH)
            self.time = nn.Sequential(nn.Linear(net.base, net.base), nn.SiLU(), out)
        self.norm = nn.LayerNorm(CONTEXT_WIDTH)

    def forward(self, condition: Condition, waves: Tensor) -> Tensor:
        """`waves` (B, base) is the sinusoid of the time."""
        made = [] if self.time is None else [self.time(waves)]
        if self.tokens is not None:
            made.append(self.tokens(condition))
        return self.norm(torch.cat(made, dim=1).unflatten(1, (-1, CONTEXT_WIDTH)))


class GroupNorm(nn.GroupNorm):
    """Over `groups` groups of `width` channels, by default the architecture's number, with its source's epsilon."""

    def __init__(self, net: UNetArchitecture, width: int, groups: int = 0) -> None:
        super().__init__(groups or net.groups, width, eps=1e-6 if net.form == "edm" else 1e-5)


def change_grid(x: Tensor, change: Change | None) -> Tensor:
    """(B, C, H, W) with each pixel doubled along both axes, or with 2 x 2 pixels averaged, or as it is."""
    if change == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, 2) if change == "down" else x


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; between them the embedding shifts, or scales and shifts, each channel."""

    def __init__(self, net: UNetArchitecture, stage: Stage) -> None:
        super().__init__()
        inputs, width = stage.inputs, stage.width
        self.change: Change | None = stage.kind if stage.kind in ("down", "up") else None
        self.scales, self.dropout = net.modulation == 2, net.dropout
        self.keeps = math.sqrt(0.5) if net.form == "edm" else 1.0  # the sum keeps its variance
        self.norm1 = GroupNorm(net, inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.embedding = nn.Linear(net.embedding, net.modulation * width)
        self.norm2 = GroupNorm(net, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, width, 1) if net.projects(stage) else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, inputs, H, W), c (B, embedding) already activated."""
        h = self.conv1(change_grid(F.silu(self.norm1(x)), self.change))
        embedded = self.embedding(c)[:, :, None, None]  # (B, width or 2 width, 1, 1)
        if self.scales:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + embedded)
        h = self.conv2(F.dropout(F.silu(h), self.dropout, self.training))
        x = change_grid(x, self.change)
        return ((x if self.shortcut is None else self.shortcut(x)) + h) * self.keeps


class Attention(nn.Module):
    """Self-attention over the grid, on a residual path; context tokens give keys and values too."""

    def __init__(self, net: UNetArchitecture, width: int) -> None:
        super().__init__()
        self.heads = net.heads_of(width)
        self.keeps = math.sqrt(0.5) if net.form == "edm" else 1.0
        self.norm = GroupNorm(net, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.context = nn.Linear(CONTEXT_WIDTH, 2 * width) if net.tokens else None
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, T, C)
        q, k, v = split_heads(self.qkv(tokens), 3, self.heads)  # (B, heads, T, d) each
        if self.context is not None and context is not None:
            condition_k, condition_v = split_heads(self.context(context), 2, self.heads)
            k, v = torch.cat((condition_k, k), dim=2), torch.cat((condition_v, v), dim=2)
        mixed = self.project(attention(q, k, v))
        return (x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])) * self.keeps


class SharedAttention(nn.Module):
    """Self-attention over the grid with one key and value for all heads, on a residual path that begins awake.

    Beside the grid's keys and values stand those of the context tokens and a learned null pair.
    """

    def __init__(self, net: UNetArchitecture, width: int) -> None:
        super().__init__()
        self.heads = net.heads_of(width)
        head = width // self.heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.null = nn.Parameter(torch.randn(2, head))
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * head, bias=False)
        self.context = nn.Sequential(
            nn.LayerNorm(CONTEXT_WIDTH), nn.Linear(CONTEXT_WIDTH, 2 * head)
        )
        self.project = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.LayerNorm(width, bias=False)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (B, T, C)
        (q,) = split_heads(self.q(tokens), 1, self.heads)  # (B, heads, T, d)
        null = self.null.flatten().expand(len(x), 1, -1)
        pairs = torch.cat((self.context(context), null, self.kv(tokens)), dim=1)  # (B, S, 2 d)
        k, v = (part.expand(-1, self.heads, -1, -1) for part in split_heads(pairs, 2, 1))
        mixed = self.project(attention(q, k, v))
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class Block(nn.Module):
    """One stage: a residual block; attention where the stage has it; in the middle another residual block behind it."""

    def __init__(self, net: UNetArchitecture, stage: Stage) -> None:
        super().__init__()
        self.first = ResidualBlock(net, stage)
        attends = SharedAttention if net.form == "imagen" else Attention
        self.attention = attends(net, stage.width) if stage.attention else None
        self.second = ResidualBlock(net, stage) if stage.kind == "middle" else None

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None) -> Tensor:
        x = self.first(x, c)
        if self.attention is not None:
            x = self.attention(x, context)
        return x if self.second is None else self.second(x, c)


class Resample(nn.Module):
    """A change of grid by one 3 x 3 convolution: in steps of two, or after each pixel was doubled."""

    def __init__(self, width: int, change: Change) -> None:
        super().__init__()
        self.doubles = change == "up"
        self.conv = nn.Conv2d(width, width, 3, padding=1, stride=1 if self.doubles else 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(change_grid(x, "up") if self.doubles else x)
