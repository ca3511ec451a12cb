"""The UNets written plainly: every activation where it is read, 1 x 1 convolutions in attention, one-hot groups."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.models.blocks import time_input
from selfguide.models.unet import UNet
from selfguide.models.unet_blocks import (
    Attention,
    Block,
    ConditionLinear,
    GuidanceMLP,
    Resample,
    ResidualBlock,
)
from tests.tools.plain import linear, same, split, two_matrices


def convolution(ours: nn.Linear) -> nn.Conv2d:
    """A linear map of the channels, as a 1 x 1 convolution."""
    made = nn.Conv2d(ours.in_features, ours.out_features, 1)
    made.load_state_dict({"weight": ours.weight[:, :, None, None], "bias": ours.bias})
    return made


class PlainAttention(nn.Module):
    def __init__(self, ours: Attention) -> None:
        super().__init__()
        self.heads, self.keeps = ours.heads, ours.keeps
        self.norm = copy.deepcopy(ours.norm)
        self.q, self.k, self.v = (convolution(part) for part in split(ours.qkv, 3))
        self.project = convolution(ours.project)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self._heads(self.q(h)), self._heads(self.k(h)), self._heads(self.v(h))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
        mixed = (v @ weights.transpose(1, 2)).reshape(x.shape)
        return (x + self.project(mixed)) * self.keeps

    def _heads(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * heads, d, H * W)."""
        return x.reshape(len(x) * self.heads, -1, x.shape[2] * x.shape[3])


class PlainResidual(nn.Module):
    def __init__(self, ours: ResidualBlock) -> None:
        super().__init__()
        self.scales, self.keeps = ours.scales, ours.keeps
        change: nn.Module = nn.Identity()
        if ours.change is not None:
            change = nn.Upsample(scale_factor=2) if ours.change == "up" else nn.AvgPool2d(2)
        norm1, conv1, self.norm2, conv2, shortcut = copy.deepcopy(
            [ours.norm1, ours.conv1, ours.norm2, ours.conv2, ours.shortcut or nn.Identity()]
        )
        self.first = nn.Sequential(norm1, nn.SiLU(), change, conv1)
        self.embedding = nn.Sequential(nn.SiLU(), same(ours.embedding))
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(ours.dropout), conv2)
        self.shortcut = nn.Sequential(change, shortcut)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h, embedded = self.first(x), self.embedding(c)[:, :, None, None]
        if self.scales:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + embedded)
        return (self.shortcut(x) + self.second(h)) * self.keeps


class PlainBlock(nn.Module):
    def __init__(self, ours: Block) -> None:
        super().__init__()
        self.first = PlainResidual(ours.first)
        self.attention = nn.Identity() if ours.attention is None else PlainAttention(ours.attention)
        self.second = None if ours.second is None else PlainResidual(ours.second)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.attention(self.first(x, c))
        return x if self.second is None else self.second(x, c)


class PlainUNet(nn.Module):
    """All but context tokens."""

    def __init__(self, ours: UNet) -> None:
        super().__init__()
        self.net, self.wave = ours.net, ours.time.wave
        self.time = two_matrices(ours.time.hidden, nn.SiLU(), ours.time.out)
        self.told = one_hot_map(ours.told)
        self.stages = nn.ModuleList(plain_stage(stage) for stage in ours.stages)
        self.out = nn.Sequential(copy.deepcopy(ours.norm), nn.SiLU(), copy.deepcopy(ours.out))

    def forward(self, x: Tensor, tau: Tensor, ids: Tensor | None) -> Tensor:
        c = self._embed(tau, ids, x)
        skips: list[Tensor] = []
        for plan, stage in zip(self.net.stages, self.stages, strict=True):
            if plan.kind == "decode":
                x = torch.cat((x, skips.pop()), dim=1)
            x = stage(x, c) if isinstance(stage, PlainBlock) else stage(x)
            if plan.kind in ("stem", "encode", "down"):
                skips.append(x)
        return self.out(x)

    def _embed(self, tau: Tensor, ids: Tensor | None, x: Tensor) -> Tensor:
        net = self.net
        wave = self.wave(time_input(net.time, tau), net.base).to(x.dtype)
        if self.told is None:
            return self.time(wave)
        groups = x.new_zeros(len(x), net.classes)
        if ids is not None:
            groups = F.one_hot(ids, net.classes).to(x.dtype)
        if net.guidance == "early":
            return self.time(wave + self.told(groups * math.sqrt(net.classes)))
        embedded = self.told(groups)
        if net.guidance == "add":
            return self.time(wave) + embedded
        return torch.cat((self.time(wave), embedded), dim=1)


def one_hot_map(ours: nn.Module | None) -> nn.Module | None:
    """One-hot (B, K) -> its embedding (B, width)."""
    if isinstance(ours, ConditionLinear) and ours.rows is not None:
        return linear(ours.rows.detach().T, ours.bias)
    if isinstance(ours, GuidanceMLP):
        hidden = one_hot_map(ours.hidden)
        assert hidden is not None
        return nn.Sequential(hidden, nn.SiLU(), same(ours.out))
    return None


def plain_stage(ours: nn.Module) -> nn.Module:
    if isinstance(ours, Block):
        return PlainBlock(ours)
    if isinstance(ours, Resample) and ours.doubles:
        return nn.Sequential(nn.Upsample(scale_factor=2), copy.deepcopy(ours.conv))
    return copy.deepcopy(ours)
