"""diffusers' and timm's own networks in the sizes of ours, with their own initial weights.

They are what somebody without this package would train: diffusers' DiTTransformer2DModel and UNet2DModel, and for
U-ViT, which neither library has, timm's VisionTransformer. All attend by scaled_dot_product_attention, as ours do.
What the libraries have no switch for stays theirs: DiT's block embeds time and class by itself; LightningDiT is timed
against a DiT (no RoPE, no RMSNorm, GELU for SwiGLU of as many weights); the ViT has no long skips and leaves its
output as tokens; a UNet with EDM's conventions attends after each block of an attending grid on the way up, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfguide.spec.architecture import Architecture
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.unet import UNetArchitecture
from selfguide.spec.uvit import UViTArchitecture
from shards.errors import UserError

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of x, tau and class ids


def library_network(net: Architecture) -> tuple[str, nn.Module, Forward]:
    """The library's name, its network in the size of `net`, and its forward in the form of ours.

    Raises:
        UserError: diffusers is not installed, or `net` is of a family that no library has.
    """
    if isinstance(net, UViTArchitecture):
        vit = _vit(net)
        return "timm", vit, lambda x, tau, ids: vit(x)
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"this suite times diffusers' networks ({error}): pip install 'selfguide[vae]'"
        ) from error
    made: Any
    if isinstance(net, DiTArchitecture):
        made = diffusers.DiTTransformer2DModel(**_dit(net))
    elif isinstance(net, UNetArchitecture):
        made = diffusers.UNet2DModel(**_unet(net))
    else:
        raise UserError(f"{type(net).__name__} has no counterpart in diffusers or timm")
    return "diffusers", made, lambda x, tau, ids: made(x, 999 * tau, ids, return_dict=False)[0]


def _vit(net: UViTArchitecture) -> VisionTransformer:
    """With as many extra tokens and blocks, and an output for each token."""
    return VisionTransformer(
        img_size=net.size,
        patch_size=net.patch,
        in_chans=net.channels,
        num_classes=net.patch**2 * net.out_channels,
        global_pool="",
        embed_dim=net.width,
        depth=net.depth + 1,
        num_heads=net.heads,
        qkv_bias=False,
        reg_tokens=net.extras - 1,
    )


def _dit(net: DiTArchitecture) -> dict[str, Any]:
    return {
        "sample_size": net.size,
        "patch_size": net.patch,
        "in_channels": net.channels,
        "out_channels": net.out_channels,
        "num_layers": net.depth,
        "num_attention_heads": net.heads,
        "attention_head_dim": net.width // net.heads,
        "num_embeds_ada_norm": net.classes,
    }


def _unet(net: UNetArchitecture) -> dict[str, Any]:
    widths = tuple(net.base * mult for mult in net.mult)
    attend = ["Attn" if 2**level in net.attention else "" for level in range(len(widths))]
    resample = "resnet" if net.residual else "conv"
    return {
        "sample_size": net.size,
        "in_channels": net.channels,
        "out_channels": net.out_channels,
        "block_out_channels": widths,
        "layers_per_block": net.blocks,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in attend),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(attend)),
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": None if net.heads == 1 else widths[-1] // net.heads,
        "norm_num_groups": net.groups,
        "dropout": net.dropout,
        "resnet_time_scale_shift": "scale_shift" if net.modulation == 2 else "default",
        "num_class_embeds": net.classes or None,
    }
