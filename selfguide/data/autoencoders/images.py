"""Model space <-> uint8 images, through an autoencoder whose latents the data's header says it holds.

Latents of other weights, or scaled otherwise, decode without complaint to wrong pictures; so header and autoencoder
are compared before either is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfguide.data.autoencoders.autoencoder import TOP, Autoencoder, KLAutoencoder
from selfguide.data.normaliser import Normaliser, posterior_mean
from shards.errors import UserError
from shards.format.header import Header

Plain = Header | Mapping[str, Any]


def to_images(header: Plain, x: Tensor, autoencoder: Autoencoder | None = None) -> Tensor:
    """Model-space samples (B, C, H, W) -> uint8 images of levels 0..255 on the CPU.

    Images are put on the levels that the data has before they are stretched; latents need the autoencoder that made
    them.

    Raises:
        UserError: header and autoencoder do not belong together.
    """
    normaliser = Normaliser.of(header)
    if normaliser.header.kind == "image":
        if autoencoder is not None:
            check_header(autoencoder, header)
        top = normaliser.top
        return (normaliser.pixels(x).float() * (TOP / top)).round().to(torch.uint8).cpu()
    return _known(header, autoencoder).decode(normaliser.decode(x)).cpu()


def from_images(header: Plain, images: Tensor, autoencoder: Autoencoder | None = None) -> Tensor:
    """uint8 images (B, C, H, W) of levels 0..255 -> what the model would see of them, fp32.

    Raises:
        UserError: header and autoencoder do not belong together, or images it cannot encode.
    """
    normaliser = Normaliser.of(header)
    if normaliser.header.kind == "image":
        if autoencoder is not None:
            check_header(autoencoder, header)
        return normaliser.normalise((images.float() * (normaliser.top / TOP)).round())
    codec = _known(header, autoencoder)
    found = codec.encode(images)
    return normaliser.normalise(posterior_mean(found) if codec.moments else found)


def check_header(autoencoder: Autoencoder, header: Plain) -> None:
    """Returns when data with this header were made by this autoencoder and are scaled as its latents are.

    Raises:
        UserError: names what disagrees, both values, and the cure.
    """
    header = Header.of(header)
    name = "identity" if header.kind == "image" else header.encoder
    weights = f"give the weights of {name} that made the data"
    if autoencoder.name != name:
        raise UserError(f"the data's encoder is {name}, not {autoencoder.name}: load that one")
    if header.kind == "image":
        return
    if autoencoder.sha256 != header.encoder_sha256:
        raise UserError(
            f"header encoder_sha256={str(header.encoder_sha256)[:12]}, and the weights of {autoencoder.name} have "
            f"{str(autoencoder.sha256)[:12]}: {weights}"
        )
    if header.content == "moments" and not autoencoder.moments:
        raise UserError(f"header content='moments', and {name} encodes to samples: {weights}")
    if header.lengths - {autoencoder.channels}:
        raise UserError(
            f"header scale and shift are for {header.lengths.pop()} channels, and latents of {name} have "
            f"{autoencoder.channels}: {weights}"
        )
    if isinstance(autoencoder, KLAutoencoder) and autoencoder.scale is not None:
        _check_statistics(autoencoder.header(), header)


def _check_statistics(own: Header, header: Header) -> None:
    for field in ("shift", "scale"):
        expected, found = getattr(own, field), getattr(header, field)
        if not np.allclose(expected, found, rtol=1e-5, atol=1e-8):
            raise UserError(
                f"header {field}={found}, and latents of {own.encoder} have {field}={expected}: they were not written "
                "for this autoencoder; write the shards again with its header"
            )


def _known(header: Plain, autoencoder: Autoencoder | None) -> Autoencoder:
    if autoencoder is None:
        raise UserError(
            f"the data are latents of {Header.of(header).encoder}: load that autoencoder to see images"
        )
    check_header(autoencoder, header)
    return autoencoder
