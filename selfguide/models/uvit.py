"""U-ViT: patches, time and condition are all tokens, and shallow blocks reach deep ones by long skips.

Bao et al. 2023, section 3 (arXiv 2209.12152); the [CLS] token, and the null and unconditional tokens that differ, are
SGFM's (Hu et al. 2023, arXiv 2312.08825).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.backbone import Backbone
from selfguide.models.blocks import (
    MLP,
    AugmentEmbedding,
    ConditionEmbedding,
    PatchEmbedding,
    attention,
    sinusoid,
    split_heads,
    time_input,
    unpatchify,
    with_spatial,
)
from selfguide.spec.architecture import TOKEN_STD
from selfguide.spec.uvit import UViTArchitecture


class Attention(nn.Module):
    """Self-attention over all tokens; queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, open_to: Tensor | None = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # (B, heads, T, d) each
        return self.project(attention(q, k, v, open_to))


class Block(nn.Module):
    """Pre-norm attention and MLP. `open_to` (T, T) bool is where a token, by row, attends; None is everywhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = MLP(width, 4 * width, approximate="none")

    def forward(self, x: Tensor, open_to: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), open_to)
        return x + self.mlp(self.norm2(x))


class OutBlock(nn.Module):
    """A block that first takes in the tokens of its in-block: concatenated, then projected back to the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width)
        self.block = Block(width, heads)

    def forward(self, x: Tensor, skip: Tensor, open_to: Tensor | None = None) -> Tensor:
        return self.block(self.skip(torch.cat((x, skip), dim=-1)), open_to)


class UViT(Backbone):
    """[CLS] where there is one, time, condition and augmentation where the net takes them, and patches, all through the
    same blocks.

    [CLS] and the token of augmentation do not attend to each other (Xiang et al. 2025, DDAE++, figure 2).
    """

    net: UViTArchitecture

    def __init__(self, net: UViTArchitecture) -> None:
        super().__init__(net)
        width, half = net.width, net.depth // 2
        self.patchify = nn.Conv2d(net.channels + net.spatial, width, net.patch, stride=net.patch)
        self.positions = nn.Parameter(torch.empty(net.extras + net.tokens, width))
        self.cls = nn.Parameter(torch.empty(width)) if net.cls_token else None
        self.condition = (
            ConditionEmbedding(width, net.classes, net.dense, project=False)
            if net.condition_token
            else None
        )
        self.patches = (
            PatchEmbedding(width, net.dense_patch, project=False) if net.dense_patch else None
        )
        self.blocks = nn.ModuleList(
            [Block(width, net.heads) for _ in range(half + 1)]
            + [OutBlock(width, net.heads) for _ in range(half)]
        )
        self.final_norm = nn.LayerNorm(width)
        self.final = nn.Linear(width, net.patch**2 * net.out_channels)
        self.smooth: nn.Module = nn.Identity()
        if net.conv:
            self.smooth = nn.Conv2d(net.out_channels, net.out_channels, 3, padding=1)
        self.augment = AugmentEmbedding(net.augment, width) if net.augment else None
        self._initialise()
        if net.token_std != TOKEN_STD:
            self._draw_tokens(net.token_std)

    def _initialise(self) -> None:
        """Truncated normals of 0.02 and no bias; the two convolutions keep torch's own."""
        tables: list[Tensor] = [self.positions]
        if self.cls is not None:
            tables.append(self.cls)
        if self.condition is not None and self.condition.labels is not None:
            tables.append(self.condition.labels.weight)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                tables.append(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in tables:
            nn.init.trunc_normal_(table, std=0.02)

    def repeated(self) -> Iterable[nn.Module]:
        return self.blocks

    def _run(
        self, x: Tensor, tau: Tensor, condition: Condition, wanted: Collection[int], *, stop: bool
    ) -> tuple[Any, dict[int, Tensor]]:
        tokens = self._embed(x, tau, condition)
        half, skips, captured = self.net.depth // 2, list[Tensor](), dict[int, Tensor]()
        route, open_to = self._route(tokens), self._open_to(tokens)
        for number, block in enumerate(self.blocks, 1):
            if route is not None:
                tokens = route.enter(number, tokens)
            skip = (skips.pop(),) if number > half + 1 else ()  # the last one in is the first out
            if open_to is None:
                tokens = self._call(block, tokens, *skip)
            else:
                count = tokens.shape[
                    1
                ]  # fewer where some are routed past; those before the patches never are
                tokens = self._call(block, tokens, *skip, open_to[:count, :count])
            if number <= half:
                skips.append(tokens)
            if route is not None:
                tokens = route.leave(number, tokens)
            if number in wanted:
                captured[number] = tokens if route is None else route.whole(tokens)
                if stop and number == max(wanted):
                    return None, captured
        patches = self.final(self.final_norm(tokens[:, self.net.extras :]))  # (B, L, p p C)
        image = unpatchify(patches, self.net.edge, self.net.patch, self.net.out_channels)
        return self.smooth(image), captured

    def _open_to(self, tokens: Tensor) -> Tensor | None:
        """(T, T) bool: which token, by row, attends to which; None where every one does to all."""
        if not self.net.apart:
            return None
        cls, augment = 0, self.net.extras - 1
        place = torch.arange(tokens.shape[1], device=tokens.device)
        ends = (place == cls, place == augment)
        closed = ends[0][:, None] & ends[1] | ends[1][:, None] & ends[0]
        return ~closed

    def _embed(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """(B, extras + L, D): every input as a token at its learned position."""
        x = with_spatial(x, condition, self.net.spatial)
        patches = self.patchify(x).flatten(2).transpose(1, 2)  # (B, L, D)
        if self.patches is not None:
            patches = patches + self.patches(condition, self.net.tokens)
        fed = time_input(self.net.time, tau, whole=self.net.whole_index)
        time = sinusoid(fed, self.net.width).to(patches.dtype)
        tokens = [time[:, None], patches]
        if self.augment is not None:
            tokens.insert(1, self.augment(condition)[:, None])
        if self.condition is not None:
            tokens.insert(1, self.condition(condition)[:, None])
        if self.cls is not None:
            tokens.insert(0, self.cls.expand(len(x), 1, -1))
        return torch.cat(tokens, dim=1) + self.positions
