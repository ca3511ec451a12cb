"""DiT: a transformer over patches with adaLN-Zero conditioning (Peebles & Xie 2023, section 3).

LightningDiT's parts (Yao et al. 2025) are switches of its architecture: RMSNorm, SwiGLU, 2-d rotary positions,
normalised queries and keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.backbone import Backbone
from selfguide.models.blocks import (
    MLP,
    AugmentEmbedding,
    ConditionEmbedding,
    PatchEmbedding,
    TimeEmbedding,
    attention,
    sinusoid,
    split_heads,
    time_input,
    unpatchify,
    with_spatial,
)
from selfguide.models.self_condition import SelfCondition
from selfguide.spec.architecture import TOKEN_STD
from selfguide.spec.dit import TIME_FREQUENCIES, DiTArchitecture


def grid_positions(edge: int, width: int) -> Tensor:
    """Fixed 2-d sinusoid of a square grid, (edge * edge, width): the column, then the row; sines first."""
    rows, columns = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    halves = [sinusoid(axis.flatten(), width // 2) for axis in (columns, rows)]
    return torch.cat([half.roll(width // 4, dims=1) for half in halves], dim=1)


def rotations(edge: int, head_width: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (edge * edge, head_width / 2) each: half of the pairs turn with the row, half by column."""
    rates = theta ** (-torch.arange(0, head_width // 2, 2) / (head_width // 2))  # (d / 4,)
    rows, columns = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    angles = torch.cat((rows.flatten()[:, None] * rates, columns.flatten()[:, None] * rates), dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of x (B, heads, T, d) turned by their token's angles; cos and sin (T, d / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Modulated(nn.Module):
    """A norm, then the embedding's shift and scale. LayerNorm has no affine part of its own, RMSNorm a scale."""

    def __init__(self, net: DiTArchitecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(net.width)) if net.norm == "rms" else None

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if self.weight is None:
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        else:
            normed = F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)
        return normed * (1 + scale) + shift


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, net: DiTArchitecture) -> None:
        super().__init__()
        self.heads = net.heads
        self.qkv = nn.Linear(net.width, 3 * net.width)
        self.project = nn.Linear(net.width, net.width)
        self.q_norm = _norm_of_heads(net) if net.qk_norm else None
        self.k_norm = _norm_of_heads(net) if net.qk_norm else None

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # (B, heads, T, d) each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        return self.project(attention(q, k, v))


def _norm_of_heads(net: DiTArchitecture) -> nn.Module:
    """LightningDiT's RMSNorm, timm's LayerNorm (SiT's and REPA's), or ours, which has no bias."""
    if net.norm == "rms":
        return nn.RMSNorm(net.head_width, eps=1e-6)
    return nn.LayerNorm(net.head_width, eps=1e-5 if net.qk_bias else 1e-6, bias=net.qk_bias)


class SwiGLU(nn.Module):
    """Linear, SiLU of one half times the other, Linear: (B, T, width) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm attention and MLP, both shifted, scaled and gated by the embedding; zero at initialisation."""

    def __init__(self, net: DiTArchitecture) -> None:
        super().__init__()
        self.norm1, self.norm2 = Modulated(net), Modulated(net)
        self.attention = Attention(net)
        self.mlp = (
            MLP(net.width, net.hidden, approximate="tanh")
            if net.mlp == "gelu"
            else SwiGLU(net.width, net.hidden)
        )
        self.modulation = nn.Linear(net.width, 6 * net.width)

    def forward(self, x: Tensor, c: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        modulation = self.modulation(c)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attention(self.norm1(x, shift1, scale1), turn)
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))


class DiT(Backbone):
    """Patches, [CLS] first where there is one, through blocks that time and condition modulate."""

    net: DiTArchitecture
    positions: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, net: DiTArchitecture) -> None:
        super().__init__(net)
        inputs = net.channels + net.spatial
        self.patchify = nn.Conv2d(inputs, net.width, net.patch, stride=net.patch)
        self.register_buffer("positions", grid_positions(net.edge, net.width), persistent=False)
        if net.rope:
            self._register_rotations(net)
        self.cls = nn.Parameter(torch.randn(net.width) * 0.02) if net.cls_token else None
        self.time = TimeEmbedding(TIME_FREQUENCIES, net.width)
        self.condition = (
            ConditionEmbedding(net.width, net.classes, net.dense) if net.condition_row else None
        )
        self.patches = PatchEmbedding(net.width, net.dense_patch) if net.dense_patch else None
        self.blocks = nn.ModuleList(Block(net) for _ in range(net.depth))
        self.final_norm = Modulated(net)
        self.final_modulation = nn.Linear(net.width, 2 * net.width)
        self.final = nn.Linear(net.width, net.patch**2 * net.out_channels)
        self._initialise()
        if net.token_std != TOKEN_STD:
            self._draw_tokens(net.token_std)
        # last, so that it changes none of the weights drawn before
        self.augment: AugmentEmbedding | None = None
        if net.augment:
            self.augment = AugmentEmbedding(net.augment, net.width)
            nn.init.normal_(self.augment.linear.weight, std=0.02)  # as of label rows
        self.self_condition = (
            SelfCondition(net, TIME_FREQUENCIES, net.width) if net.self_condition else None
        )

    def _register_rotations(self, net: DiTArchitecture) -> None:
        cos, sin = rotations(net.edge, net.head_width)
        if net.cls_token:  # it has no place in the grid: it is not turned
            cos = torch.cat((torch.ones_like(cos[:1]), cos))
            sin = torch.cat((torch.zeros_like(sin[:1]), sin))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patchify.weight.view(self.net.width, -1))
        nn.init.zeros_(self.patchify.bias)  # type: ignore[arg-type]
        for linear in (self.time.hidden, self.time.out):
            nn.init.normal_(linear.weight, std=0.02)
        if self.condition is not None and self.condition.labels is not None:
            nn.init.normal_(self.condition.labels.weight, std=0.02)
        for linear in [b.modulation for b in self.blocks] + [self.final_modulation, self.final]:  # type: ignore
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def repeated(self) -> Iterable[nn.Module]:
        return self.blocks

    def _run(
        self, x: Tensor, tau: Tensor, condition: Condition, wanted: Collection[int], *, stop: bool
    ) -> tuple[Any, dict[int, Tensor]]:
        tokens = self._embed(x, condition)
        time = time_input(self.net.time, tau, whole=self.net.whole_index)
        embedding = self.time(time)  # (B, D)
        if self.condition is not None:
            embedding = embedding + self.condition(condition)
        if self.augment is not None:
            # where labels join the time, as other conditions do: our extension, of no paper
            embedding = embedding + self.augment(condition)
        c = F.silu(embedding)
        turn = (self.cos.to(x.dtype), self.sin.to(x.dtype)) if self.net.rope else None
        captured: dict[int, Tensor] = {}
        route = self._route(tokens)
        for number, block in enumerate(self.blocks, 1):
            if route is None:
                tokens = self._call(block, tokens, c, turn)
            else:
                tokens = route.enter(number, tokens)
                tokens = route.leave(number, self._call(block, tokens, c, route.turned(turn)))
            if number in wanted:
                captured[number] = tokens if route is None else route.whole(tokens)
                if stop and number == max(wanted):
                    return None, captured
            if self.self_condition is not None and number == self.self_condition.number:
                whole = tokens if route is None else route.whole(tokens)
                c = self.self_condition(embedding, whole[:, -self.net.tokens :].mean(1), time)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        patches = self.final(self.final_norm(tokens[:, -self.net.tokens :], shift, scale))
        return unpatchify(patches, self.net.edge, self.net.patch, self.net.out_channels), captured

    def _embed(self, x: Tensor, condition: Condition) -> Tensor:
        x = with_spatial(x, condition, self.net.spatial)
        tokens = self.patchify(x).flatten(2).transpose(1, 2)  # (B, T, D)
        if self.patches is not None:
            tokens = tokens + self.patches(condition, self.net.tokens)
        tokens = tokens + self.positions.to(tokens.dtype)
        if self.cls is not None:
            tokens = torch.cat((self.cls.expand(len(x), 1, -1), tokens), dim=1)  # (B, 1 + T, D)
        return tokens
