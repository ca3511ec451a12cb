"""The network of diffusers or timm that one would otherwise take, for each kind of backbone that has one.

Width, depth, heads, patch, tokens and channels are ours; the weights are its own, since only its time is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from selfguide.models.blocks import time_input
from selfguide.spec.architecture import Architecture
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.unet import UNetArchitecture
from selfguide.spec.uvit import UViTArchitecture

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def rival(net: Architecture) -> tuple[str, nn.Module, Forward] | None:
    """Returns the name of a library's network, the network, and its forward pass of (x, tau, ids); None without one."""
    if isinstance(net, DiTArchitecture):
        return _eva(net) if net.rope else _dit(net)
    if isinstance(net, UViTArchitecture):
        return _vit(net)
    if isinstance(net, UNetArchitecture) and net.form == "ddpm" and not net.residual:
        return _unet(net)
    return None


def _dit(net: DiTArchitecture) -> tuple[str, nn.Module, Forward]:
    from diffusers import DiTTransformer2DModel

    theirs: Any = DiTTransformer2DModel(
        num_attention_heads=net.heads,
        attention_head_dim=net.width // net.heads,
        in_channels=net.channels,
        out_channels=net.out_channels,
        num_layers=net.depth,
        sample_size=net.size,
        patch_size=net.patch,
        num_embeds_ada_norm=net.classes,
    )

    def forward(x: Tensor, tau: Tensor, ids: Tensor | None) -> Tensor:
        # it embeds whole times only
        time = time_input("index", tau).long()
        found: Tensor = theirs(x, timestep=time, class_labels=ids).sample
        return found

    return "diffusers DiT", theirs, forward


def _eva(net: DiTArchitecture) -> tuple[str, nn.Module, Forward]:
    """The same blocks with rotary positions and SwiGLU, but nothing that reads time or condition."""
    from timm.models.eva import Eva

    theirs = Eva(
        img_size=net.size,
        patch_size=net.patch,
        in_chans=net.channels,
        embed_dim=net.width,
        depth=net.depth,
        num_heads=net.heads,
        mlp_ratio=8 / 3,
        swiglu_mlp=True,
        use_rot_pos_emb=True,
        class_token=False,
        global_pool="",
        num_classes=net.patch**2 * net.out_channels,
    )
    return "timm EVA, unconditional", theirs, lambda x, tau, ids: theirs(x)


def _vit(net: UViTArchitecture) -> tuple[str, nn.Module, Forward]:
    """The same tokens and blocks, but no skip connections and nothing that reads time or condition."""
    from timm.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(
        img_size=net.size,
        patch_size=net.patch,
        in_chans=net.channels,
        embed_dim=net.width,
        depth=net.depth + 1,  # theirs counts the block in the middle
        num_heads=net.heads,
        reg_tokens=net.extras - 1,
        global_pool="",
        num_classes=net.patch**2 * net.out_channels,
    )
    return "timm ViT, no skips", theirs, lambda x, tau, ids: theirs(x)[:, net.extras :]


def _unet(net: UNetArchitecture) -> tuple[str, nn.Module, Forward]:
    from diffusers import UNet2DModel

    attention = [2**stage in net.attention for stage in range(len(net.mult))]
    down = ["AttnDownBlock2D" if each else "DownBlock2D" for each in attention]
    up = ["AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attention)]
    theirs: Any = UNet2DModel(
        sample_size=net.size,
        in_channels=net.channels,
        out_channels=net.out_channels,
        block_out_channels=tuple(net.base * each for each in net.mult),
        layers_per_block=net.blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        attention_head_dim=None,
        dropout=net.dropout,
    )

    def forward(x: Tensor, tau: Tensor, ids: Tensor | None) -> Tensor:
        found: Tensor = theirs(x, 1000 * tau).sample
        return found

    return "diffusers UNet2DModel", theirs, forward
