"""Published latent autoencoders as diffusers' AutoencoderKL: the architecture, and the two ways its tensors are named.

SD-VAE is that of latent diffusion, f8 with 4 channels (Rombach et al. 2022); VA-VAE is aligned with a vision model,
f16 with 32 channels (Yao et al. 2025). Files in the names of the latent-diffusion code are renamed to diffusers':

    encoder.down.I.block.J            encoder.down_blocks.I.resnets.J
    decoder.up.I.block.J              decoder.up_blocks.(levels - 1 - I).resnets.J
    down.I.downsample, up.I.upsample  downsamplers.0, upsamplers.0
    .I.attn.J, mid.attn_1             attentions.J, mid_block.attentions.0
    attention norm, q, k, v, proj_out group_norm, to_q, to_k, to_v, to_out.0
    mid.block_1, mid.block_2          mid_block.resnets.0, mid_block.resnets.1
    norm_out, nin_shortcut            conv_norm_out, conv_shortcut

and the attention of diffusers' first releases (query, key, value, proj_attn) to its present names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from shards.errors import UserError

SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VA_VAE: dict[str, Any] = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 32,
}
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

_RENAMED = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)


def renamed(name: str, levels: int) -> str:
    """The name that diffusers gives this tensor now."""
    up = re.match(r"decoder\.up\.(\d+)\.", name)
    if up:
        name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{name[up.end() :]}"
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name


def in_diffusers_form(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The autoencoder's tensors under their names now; losses and what else a training run kept are left out."""
    made = {renamed(n, levels): t for n, t in tensors.items() if n.startswith(PARTS)}
    linear = re.compile(r"\.attentions\.\d+\.to_\w+(\.0)?\.weight$")  # once 1 x 1 convolutions
    return {n: t.flatten(1) if linear.search(n) else t for n, t in made.items()}


def settings(file: Path, published: dict[str, Any]) -> dict[str, Any]:
    """The architecture: config.json beside the weights, or else the published one."""
    beside = file.parent / "config.json"
    if not beside.is_file():
        return published
    try:
        found = json.loads(beside.read_text())
    except ValueError as error:
        raise UserError(f"{beside} is not JSON: {error}") from error
    if not isinstance(found, dict) or "block_out_channels" not in found:
        raise UserError(f"{beside} does not describe an AutoencoderKL")
    return found


def build(config: dict[str, Any]) -> Any:
    """diffusers' AutoencoderKL, not yet filled from a file.

    Raises:
        UserError: the `vae` extra is not installed.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            f"this autoencoder needs diffusers ({error}): pip install 'selfguide[vae]'"
        ) from error
    return AutoencoderKL.from_config(config)
