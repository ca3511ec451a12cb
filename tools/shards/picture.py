"""Stored samples as pictures: images as they are, latents channel by channel, or decoded where weights are at hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import Header, Manifest

Images = NDArray[np.uint8]  # (n, H, W, 1 or 3)

LEAST = 256  # pixels along an edge; what is smaller is magnified
_GREY = 70  # between pictures
_WIDEST = 3.0  # standard deviations of a latent that black and white stand for


def draw(manifest: Manifest, x: NDArray[np.generic]) -> Images:
    """Of stored samples (n, ...), a picture each: mirror images side by side, channels of latents, too."""
    header = Header.of(manifest.header)
    forms = x.reshape(len(x), -1, *x.shape[-3:]).astype(np.float64)  # (n, forms, C, H, W)
    if header.kind == "image" and forms.shape[2] in (1, 3):
        width = max(manifest.maximum - manifest.minimum, 1e-12)
        shown = (forms - manifest.minimum) / width
        tiles = shown.transpose(0, 1, 3, 4, 2)  # (n, forms, H, W, C)
    else:
        mean, std = (
            np.array(v)[:, None, None] for v in (manifest.channel_mean, manifest.channel_std)
        )
        shown = 0.5 + (forms - mean) / np.maximum(std, 1e-12) / (2 * _WIDEST)
        tiles = shown.reshape(len(x), -1, *x.shape[-2:], 1)  # (n, forms x C, H, W, 1)
    levels = (tiles.clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack([sheet(several, zoom=1) for several in levels])


def decode(
    manifest: Manifest, x: NDArray[np.generic], autoencoder: str | None, weights: str | None
) -> Images:
    """Of stored latents, the images that their autoencoder makes of them."""
    header = Header.of(manifest.header)
    if header.kind == "image":
        raise UserError("--weights: these shards hold images, which need no decoding; leave it out")
    import torch

    from selfguide.autoencoders import Normaliser, load_autoencoder, to_images

    codec = load_autoencoder(autoencoder or header.encoder or "", weights)
    with torch.inference_mode():
        seen = Normaliser.of(header).encode(torch.from_numpy(np.ascontiguousarray(x)))
        return to_images(header, seen, codec).permute(0, 2, 3, 1).numpy()


def sheet(images: Images, *, columns: int | None = None, zoom: int) -> Images:
    """(n, H, W, C) -> one picture (H', W', C) of them, in rows of about as many as rows there are."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    found = np.full(
        (rows * (height + 1) - 1, columns * (width + 1) - 1, channels), _GREY, dtype=np.uint8
    )
    for i, image in enumerate(images):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        found[y : y + height, x : x + width] = image
    return found.repeat(zoom, axis=0).repeat(zoom, axis=1)


def save(path: Path, images: Images) -> None:
    """One PNG of all `images`, magnified by whole numbers where they are small."""
    from PIL import Image

    across = math.ceil(math.sqrt(len(images))) * max(images.shape[1:3])
    found = sheet(images, zoom=max(1, LEAST // across))
    Image.fromarray(found[..., 0] if found.shape[-1] == 1 else found).save(path)
