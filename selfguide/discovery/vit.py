"""Frozen vision transformers from timm: what others' self-supervised nets see in an image, and where.

SGDM (Hu et al. 2023, arXiv 2210.06462) reads its groups, boxes and masks from DINO. How weights are found is in
`selfguide.discovery.nets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from selfguide.discovery.nets import FrozenNet, build, load_any
from selfguide.models.backbone import pool
from shards.errors import UserError

Positions = Literal["dino", "timm"]  # how positions are resampled for images of another size
OFFSET = 0.1  # patches, that DINO's code adds to a grid before it divides by the net's own


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenViT(FrozenNet):
    """A ViT in eval mode, fp32; every method takes uint8 images (B, 1 or 3, H, W) of levels 0..255."""

    net: VisionTransformer
    positions: Positions = "timm"

    @property
    def patch(self) -> int:
        return int(self.net.patch_embed.patch_size[0])

    @property
    def width(self) -> int:
        return int(self.net.embed_dim)

    @property
    def provenance_at_any_size(self) -> dict[str, Any]:
        """The same of images of any size; earlier records have timm's positions and do not say so."""
        said = {} if self.positions == "timm" else {"positions": self.positions}
        return self.provenance | said

    @property
    def pooling(self) -> str:
        """[CLS] where there is one."""
        return "mean" if self.net.cls_token is None else "cls"

    @torch.no_grad()
    def pooled(self, images: Tensor, pooling: str = "cls", view: str = "timm") -> Tensor:
        """(B, F) of images at the net's own size by one of `VIEWS`; see `selfguide.models.backbone.pool`."""
        if pooling == "cls" and self.net.cls_token is None:
            raise UserError(f"pooling=cls: {self.name} has no [CLS]; take mean or attention")
        tokens = self._tokens(self.normalised(self._viewed(self._levels(images), view)))
        extras = self.net.num_prefix_tokens
        return pool(tokens, pooling, extras, cls=self.net.cls_token is not None)

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """(B, D, h, w) patch tokens of the last layer, of images in their own size.

        The grid covers the image: it is padded with zeros on the right and at the bottom to whole patches.
        """
        x = self._padded(self.normalised(self._levels(images)))
        tokens = self._tokens(x)[:, self.net.num_prefix_tokens :]
        return self._grid(tokens, x)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """(B, D, h, w) keys of the last attention, heads side by side, of images in their own size.

        What LOST compares patches by (Simeoni et al. 2021, arXiv 2109.14279). Padded as `patches` does.
        """
        x = self._padded(self.normalised(self._levels(images)))
        attention: Any = self.net.blocks[-1].attn
        with _kept(attention.k_norm) as kept:  # where keys pass, normalised or not
            self._tokens(x)
        keys = kept[0].transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, heads d)
        return self._grid(keys[:, self.net.num_prefix_tokens :], x)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, N, D) behind the last norm, of normalised images."""
        net: Any = self.net
        if self.positions == "timm":
            return net.forward_features(x)
        return net.norm(net.blocks(net.norm_pre(_placed(net, net.patch_embed(x)))))

    def _padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.pad(x, (0, -width % self.patch, 0, -height % self.patch))

    def _grid(self, tokens: Tensor, x: Tensor) -> Tensor:
        """(B, h w, D) -> (B, D, h, w)."""
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()


@contextmanager
def _kept(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What `module` hands on while the block runs."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda *call: kept.append(call[-1]))
    try:
        yield kept
    finally:
        hook.remove()


def vision_transformers() -> list[str]:
    """timm's names of architectures that `FrozenViT` reads."""
    return timm.list_models(module="vision_transformer")


def load_vit(
    name: str,
    weights: str | Path | None = None,
    *,
    positions: Positions | None = None,
    **how: Any,
) -> FrozenViT:
    """timm's ViT `name`, such as vit_base_patch16_224.dino.

    Args:
        weights, how: of which weights, see `selfguide.discovery.nets.build`.
        positions: "dino" or "timm", see `scaled_positions`; by default the code's that published the weights.

    Raises:
        UserError: an unknown name, no weights, another sha256, weights of another net or not finite, DINO's positions
            of a net that has none like DINO's.
    """
    dynamic = {"dynamic_img_size": True}
    fields = build(name, weights, among=vision_transformers(), settings=dynamic, **how)
    net, full = fields["net"], fields["name"]
    positions = positions or positions_of(full)
    own = net.pos_embed is not None and net.cls_token is not None and net.num_prefix_tokens == 1
    if positions == "dino" and not own:
        raise UserError(
            f"positions=dino: {full} has no positions of [CLS] and patches alone; take positions=timm"
        )
    return FrozenViT(**fields, positions=positions)


def load_net(name: str, weights: str | Path | None = None, **how: Any) -> FrozenNet:
    """Any model of timm: a `FrozenViT` where it is one; see `selfguide.discovery.nets.build`."""
    if name.partition(".")[0] in vision_transformers():
        return load_vit(name, weights, **how)
    return load_any(name, weights, **how)


def positions_of(name: str) -> Positions:
    """Whose resampling the weights of that name were published with.

    DINO's (Caron et al. 2021), and DINOv2's without registers (Oquab et al. 2023); those with registers (Darcet et al.
    2023) are resampled as timm does, with antialiasing and no offset.
    """
    words = re.split(r"[._]", name.lower())
    registers = any(w.startswith("reg") for w in words)
    return "dino" if {"dino", "dinov2"} & set(words) and not registers else "timm"


def scaled_positions(own: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Positions (1, 1 + N, D) of [CLS] and a grid of `size` -> (1, 1 + h w, D) of another, as DINO's code has them.

    Bicubic without antialiasing, by the factor (h + 0.1) / H: the 0.1 was to save a rounding, and moves every position
    by up to a tenth of a patch. timm resamples by h / H and, where a grid shrinks, with antialiasing.
    """
    if size == grid:
        return own
    cls, patches = own[:, :1], own[:, 1:]
    factors = [(new + OFFSET) / old for new, old in zip(grid, size, strict=True)]
    lying = patches.transpose(1, 2).unflatten(2, size)  # (1, D, H, W)
    moved = F.interpolate(lying, scale_factor=factors, mode="bicubic")
    return torch.cat((cls, moved.flatten(2).transpose(1, 2)), dim=1)


def _placed(net: Any, x: Tensor) -> Tensor:
    """Patches (B, h, w, D) -> [CLS] and patches with their positions (B, 1 + h w, D)."""
    cls = net.cls_token.expand(len(x), -1, -1)
    tokens = torch.cat((cls, x.flatten(1, 2)), dim=1)
    grid = (x.shape[1], x.shape[2])
    return tokens + scaled_positions(net.pos_embed, net.patch_embed.grid_size, grid)
