"""Transformers as one would write them at first: a module for each operation, attention as two products and a softmax.

Built from one of ours, with its weights, so that the two give the same numbers and only the way there differs.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from selfguide.models.blocks import MLP, sinusoid, time_input
from selfguide.models.dit import Block as DiTBlock
from selfguide.models.dit import DiT, SwiGLU
from selfguide.models.uvit import Block as UViTBlock
from selfguide.models.uvit import OutBlock, UViT


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight.data.copy_(weight)
    if bias is not None:
        made.bias.data.copy_(bias)
    return made


def split(ours: nn.Linear, parts: int) -> list[nn.Linear]:
    """One linear for each of the equal parts of a wide one's outputs."""
    biases = [None] * parts if ours.bias is None else ours.bias.detach().chunk(parts)
    weights = ours.weight.detach().chunk(parts)
    return [linear(w, b) for w, b in zip(weights, biases, strict=True)]


def same(ours: nn.Linear) -> nn.Linear:
    return split(ours, 1)[0]


def two_matrices(
    up: nn.Linear, activation: nn.Module, down: nn.Linear, *rest: nn.Module
) -> nn.Sequential:
    return nn.Sequential(same(up), activation, same(down), *rest)


class PlainAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, its T x T matrix written out."""

    def __init__(self, qkv: nn.Linear, project: nn.Linear, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = split(qkv, 3)
        self.project = same(project)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = self._rotated(q, *turn), self._rotated(k, *turn)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        return self.project((weights @ v).transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, heads, T, d)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    @staticmethod
    def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin


class PlainSwiGLU(nn.Module):
    def __init__(self, ours: SwiGLU) -> None:
        super().__init__()
        self.gate, self.value = split(ours.up, 2)
        self.activation, self.down = nn.SiLU(), same(ours.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.value(x))


def norm(width: int, scale: nn.Parameter | None) -> nn.Module:
    """LayerNorm without weights, or RMSNorm with those of ours."""
    if scale is None:
        return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
    made = nn.RMSNorm(width, eps=1e-6)
    made.weight.data.copy_(scale)
    return made


class PlainDiTBlock(nn.Module):
    def __init__(self, ours: DiTBlock) -> None:
        super().__init__()
        width = ours.modulation.in_features
        self.norm1, self.norm2 = norm(width, ours.norm1.weight), norm(width, ours.norm2.weight)
        self.attention = PlainAttention(
            ours.attention.qkv, ours.attention.project, ours.attention.heads
        )
        if isinstance(ours.mlp, MLP):
            self.mlp: nn.Module = two_matrices(ours.mlp.up, nn.GELU("tanh"), ours.mlp.down)
        else:
            self.mlp = PlainSwiGLU(ours.mlp)
        self.modulation = nn.Sequential(nn.SiLU(), same(ours.modulation))

    def forward(self, x: Tensor, c: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        x = x + gate1.unsqueeze(1) * self.attention(h, turn)
        h = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(h)


class PlainDiT(nn.Module):
    """DiT and LightningDiT; the last row of the label table is the unconditional one."""

    positions: Tensor

    def __init__(self, ours: DiT) -> None:
        super().__init__()
        net = self.net = ours.net
        self.patchify = nn.Conv2d(net.channels, net.width, net.patch, stride=net.patch)
        self.patchify.load_state_dict(ours.patchify.state_dict())
        self.register_buffer("positions", ours.positions)
        self.time = two_matrices(ours.time.hidden, nn.SiLU(), ours.time.out)
        assert ours.condition is not None  # the plain form has no patch conditions
        self.labels = label_table(ours.condition.labels, ours.condition.unconditional)
        self.blocks = nn.ModuleList(PlainDiTBlock(block) for block in ours.blocks)  # type: ignore[arg-type]
        self.modulation = nn.Sequential(nn.SiLU(), same(ours.final_modulation))
        self.norm = norm(net.width, ours.final_norm.weight)
        self.final = same(ours.final)
        if net.rope:
            self.register_buffer("cos", ours.cos.repeat_interleave(2, dim=1))
            self.register_buffer("sin", ours.sin.repeat_interleave(2, dim=1))

    def forward(self, x: Tensor, tau: Tensor, ids: Tensor | None) -> Tensor:
        net = self.net
        c = self.time(sinusoid(time_input(net.time, tau), 256).to(x.dtype))
        c = c + condition_row(self.labels, ids, len(x))
        tokens = self.patchify(x).flatten(2).transpose(1, 2) + self.positions
        turn = (self.cos, self.sin) if net.rope else None
        for block in self.blocks:
            tokens = block(tokens, c, turn)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        tokens = self.final(self.norm(tokens) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        return images(tokens, net.patch, net.out_channels)


class PlainUViTBlock(nn.Module):
    def __init__(self, ours: UViTBlock | OutBlock) -> None:
        super().__init__()
        self.skip = None
        if isinstance(ours, OutBlock):
            self.skip, ours = same(ours.skip), ours.block
        self.norm1, self.norm2 = copy.deepcopy(ours.norm1), copy.deepcopy(ours.norm2)
        self.attention = PlainAttention(
            ours.attention.qkv, ours.attention.project, ours.attention.heads
        )
        self.mlp = two_matrices(ours.mlp.up, nn.GELU(), ours.mlp.down)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainUViT(nn.Module):
    """Tokens of time, of the condition where there is one, and of patches."""

    def __init__(self, ours: UViT) -> None:
        super().__init__()
        self.net, half = ours.net, ours.net.depth // 2
        self.patchify, self.positions = copy.deepcopy(ours.patchify), copy.deepcopy(ours.positions)
        self.norm, self.smooth = copy.deepcopy(ours.final_norm), copy.deepcopy(ours.smooth)
        self.labels = None
        if ours.condition is not None:
            self.labels = label_table(ours.condition.labels, ours.condition.unconditional)
        blocks = [PlainUViTBlock(block) for block in ours.blocks]  # type: ignore[arg-type]
        self.down, self.up = nn.ModuleList(blocks[:half]), nn.ModuleList(blocks[half + 1 :])
        self.middle = blocks[half]
        self.final = same(ours.final)

    def forward(self, x: Tensor, tau: Tensor, ids: Tensor | None) -> Tensor:
        net = self.net
        tokens = self.patchify(x).flatten(2).transpose(1, 2)
        if self.labels is not None:
            tokens = torch.cat(
                [condition_row(self.labels, ids, len(x)).unsqueeze(1), tokens], dim=1
            )
        time = sinusoid(time_input(net.time, tau), net.width).to(x.dtype)
        tokens = torch.cat([time.unsqueeze(1), tokens], dim=1) + self.positions
        skips = []
        for block in self.down:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.middle(tokens)
        for block in self.up:
            tokens = block(tokens, skips.pop())
        tokens = self.final(self.norm(tokens))[:, net.extras :]
        return self.smooth(images(tokens, net.patch, net.out_channels))


def label_table(labels: nn.Embedding | None, unconditional: Tensor) -> nn.Embedding:
    rows = [unconditional.detach()[None]]
    if labels is not None:
        rows.insert(0, labels.weight.detach())
    return nn.Embedding.from_pretrained(torch.cat(rows), freeze=False)


def condition_row(table: nn.Embedding, ids: Tensor | None, batch: int) -> Tensor:
    if ids is None:
        ids = torch.full((batch,), table.num_embeddings - 1, device=table.weight.device)
    return table(ids)


def images(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """(B, T, patch * patch * C) -> (B, C, H, W)."""
    edge = math.isqrt(tokens.shape[1])
    x = tokens.reshape(len(tokens), edge, edge, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(
        len(tokens), channels, edge * patch, edge * patch
    )
