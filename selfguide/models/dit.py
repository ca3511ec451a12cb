"""DiT: a transformer over latent patches with adaLN-Zero conditioning (Peebles & Xie 2023, section 3).

Called with noise-time in [0, 1] and a `Condition`; can hand out the tokens after any block, and stop there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.conditions import NULL, TOLD, UNCONDITIONAL, Condition
from selfguide.spec.sizes import TIME_FREQUENCIES, Architecture


def sinusoid(value: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, width), cosines first."""
    rates = torch.exp(
        -math.log(period) * torch.arange(width // 2, device=value.device) / (width // 2)
    )
    angles = value.float()[:, None] * rates[None]
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def grid_positions(edge: int, width: int) -> Tensor:
    """Fixed 2-d sinusoid of a square grid, (edge * edge, width): half the width a row's, half a column's."""
    rows, columns = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    return torch.cat(
        (sinusoid(rows.flatten(), width // 2), sinusoid(columns.flatten(), width // 2)), dim=1
    )


class TimeEmbedding(nn.Module):
    """Noise-time -> width. The sinusoid sees 1000 tau, the scale its periods were made for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(TIME_FREQUENCIES, width)
        self.out = nn.Linear(width, width)

    def forward(self, tau: Tensor) -> Tensor:
        frequencies = sinusoid(1000.0 * tau, TIME_FREQUENCIES).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(frequencies)))


class ConditionEmbedding(nn.Module):
    """Condition -> width: a row by id, a projection of a dense vector, or the null or unconditional row.

    Every parameter enters every forward, masked by state: a rank whose batch happens to need only some of them
    would otherwise reduce other gradients than its peers.
    """

    def __init__(self, width: int, classes: int, dense: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        self.unconditional = nn.Parameter(torch.randn(width) * 0.02)
        self.labels = nn.Embedding(classes, width) if classes else None
        self.dense = nn.Linear(dense, width) if dense else None

    def forward(self, condition: Condition) -> Tensor:
        self._check(condition)
        state = condition.state[:, None]  # (B, 1)
        embedded = (state == NULL) * self.null + (
            state == UNCONDITIONAL
        ) * self.unconditional  # (B, D)
        if self.labels is not None:
            ids = condition.id if condition.id is not None else torch.zeros_like(condition.state)
            embedded = embedded + (state == TOLD) * self.labels(ids)
        if self.dense is not None:
            dense = condition.dense
            if dense is None:
                dense = self.null.new_zeros(len(condition), self.dense.in_features)
            embedded = embedded + (state == TOLD) * self.dense(dense.to(self.null.dtype))
        return embedded.to(self.null.dtype)

    def _check(self, condition: Condition) -> None:
        if condition.id is not None and self.labels is None:
            raise ValueError("this network was built with classes=0: it takes no ids")
        if condition.dense is not None and self.dense is None:
            raise ValueError("this network was built with dense=0: it takes no dense condition")


class Block(nn.Module):
    """Pre-norm attention and MLP, both shifted, scaled and gated by the embedding; zero at initialisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(
            6, dim=-1
        )  # (B, 1, D)
        x = x + gate1 * self._attend(modulate(x, shift1, scale1))
        h = self.down(F.gelu(self.up(modulate(x, shift2, scale2)), approximate="tanh"))
        return x + gate2 * h

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # (B, heads, T, d)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then the embedding's."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiT(nn.Module):
    """(B, C, H, W), (B,) noise-times, condition -> (B, C_out, H, W)."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.net = net
        edge = net.size // net.patch
        self.patchify = nn.Conv2d(net.channels, net.width, net.patch, stride=net.patch)
        self.register_buffer("positions", grid_positions(edge, net.width), persistent=False)
        self.cls = nn.Parameter(torch.randn(net.width) * 0.02) if net.cls_token else None
        self.time = TimeEmbedding(net.width)
        self.condition = ConditionEmbedding(net.width, net.classes, net.dense)
        self.blocks = nn.ModuleList(Block(net.width, net.heads) for _ in range(net.depth))
        self.final_modulation = nn.Linear(net.width, 2 * net.width)
        self.final = nn.Linear(net.width, net.patch**2 * net.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patchify.weight.view(self.net.width, -1))
        nn.init.zeros_(self.patchify.bias)  # type: ignore[arg-type]
        for linear in (self.time.hidden, self.time.out):
            nn.init.normal_(linear.weight, std=0.02)
        if self.condition.labels is not None:
            nn.init.normal_(self.condition.labels.weight, std=0.02)
        for linear in [b.modulation for b in self.blocks] + [self.final_modulation, self.final]:  # type: ignore
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, tau: Tensor, condition: Condition, *, capture: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction, and with `capture` also the tokens after that block (counted from 1)."""
        tokens, c = self._embed(x, tau, condition)
        captured = self._through(tokens, c, 0, capture or 0)
        tokens = self._through(captured, c, capture or 0, self.net.depth)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        tokens = modulate(tokens[:, -self.net.tokens :], shift, scale)
        out = self._unpatchify(self.final(tokens))  # (B, T, p * p * C_out) -> (B, C_out, H, W)
        return out if capture is None else (out, captured)

    def features(self, x: Tensor, tau: Tensor, condition: Condition, layer: int) -> Tensor:
        """Tokens after block `layer`, (B, T or 1 + T, D); the blocks behind it are not run."""
        tokens, c = self._embed(x, tau, condition)
        return self._through(tokens, c, 0, layer)

    def _through(self, tokens: Tensor, c: Tensor, first: int, last: int) -> Tensor:
        """The tokens after blocks first + 1 to last."""
        if not 0 <= first <= last <= self.net.depth:
            raise ValueError(f"layer {max(first, last)} is not one of 1..{self.net.depth}")
        for block in self.blocks[first:last]:
            tokens = block(tokens, c)
        return tokens

    def _embed(self, x: Tensor, tau: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        expected = (self.net.channels, self.net.size, self.net.size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"expected images of shape {expected}, found {tuple(x.shape[1:])}")
        tokens = self.patchify(x).flatten(2).transpose(1, 2)  # (B, T, D)
        tokens = tokens + self.positions.to(tokens.dtype)
        if self.cls is not None:
            tokens = torch.cat((self.cls.expand(len(x), 1, -1), tokens), dim=1)  # (B, 1 + T, D)
        return tokens, F.silu(self.time(tau) + self.condition(condition))

    def _unpatchify(self, patches: Tensor) -> Tensor:
        edge, p = self.net.size // self.net.patch, self.net.patch
        image = patches.view(-1, edge, edge, p, p, self.net.out_channels)
        return image.permute(0, 5, 1, 3, 2, 4).reshape(
            len(patches), self.net.out_channels, edge * p, edge * p
        )


def pool(tokens: Tensor, pooling: str, net: Architecture) -> Tensor:
    """(B, T or 1 + T, D) -> (B, F): the [CLS] token, the mean of the patches, or all of them side by side."""
    if pooling == "cls":
        if not net.cls_token:
            raise ValueError("pooling 'cls' needs a network with cls_token=True")
        return tokens[:, 0]
    patches = tokens[:, -net.tokens :]
    return patches.mean(1) if pooling == "mean" else patches.flatten(1)
