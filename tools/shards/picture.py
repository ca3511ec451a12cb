"""Stored samples as pictures: images as they are, latents channel by channel or decoded by their autoencoder."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selfguide.sampling.grid import sheet, write_png
from shards import storage
from shards.errors import UserError
from shards.format.header import Header
from shards.format.manifest import Manifest
from tools.shards import ordering

Images = NDArray[np.uint8]  # (n, H, W, 1 or 3)

LEAST = 256  # pixels along an edge; what is smaller is magnified
_WIDEST = 3.0  # standard deviations of a latent that black and white stand for


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--png", type=storage.place, metavar="FILE", help="also write a picture")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode latents with the autoencoder that encoded them",
    )
    parser.add_argument(
        "--weights",
        type=storage.place,
        metavar="PATH",
        help="weights of the autoencoder; implies --decode",
    )


def target_path(options: argparse.Namespace) -> Path | None:
    """Where the picture goes, before any work is done for it; None where none is asked for.

    Raises:
        UserError: it cannot be written there, or is not asked for and should be decoded.
    """
    if options.png:
        return ordering.png(options.png)
    if options.decode or options.weights:
        flag = "--weights" if options.weights else "--decode"
        raise UserError(f"{flag} without --png: name the picture to write, --png FILE.png")
    return None


def render(options: argparse.Namespace, manifest: Manifest, x: NDArray[np.generic]) -> Images:
    """Stored samples as the flags of `add` want to see them."""
    if options.decode or options.weights:
        return decode(manifest, x, options.weights)
    return draw(manifest, x)


def draw(manifest: Manifest, x: NDArray[np.generic]) -> Images:
    """Of stored samples (n, ...), a picture each: mirror images side by side, channels of latents, too."""
    header = Header.of(manifest.header)
    forms = x.reshape(len(x), -1, *x.shape[-3:]).astype(np.float64)  # (n, forms, C, H, W)
    if header.kind == "image" and forms.shape[2] in (1, 3):
        width = max(manifest.maximum - manifest.minimum, 1e-12)
        scaled = (forms - manifest.minimum) / width
        tiles = scaled.transpose(0, 1, 3, 4, 2)  # (n, forms, H, W, C)
    else:
        mean, std = (
            np.array(v)[:, None, None] for v in (manifest.channel_mean, manifest.channel_std)
        )
        scaled = 0.5 + (forms - mean) / np.maximum(std, 1e-12) / (2 * _WIDEST)
        tiles = scaled.reshape(len(x), -1, *x.shape[-2:], 1)  # (n, forms x C, H, W, 1)
    levels = (tiles.clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack([sheet(several, zoom=1) for several in levels])


def decode(manifest: Manifest, x: NDArray[np.generic], weights: str | None = None) -> Images:
    """Of stored latents, the images that their autoencoder makes of them; of moments, of their means.

    Raises:
        UserError: no latents, no weights, or weights of another autoencoder than made them.
    """
    header = Header.of(manifest.header)
    if header.kind == "image":
        raise UserError("--decode: these shards hold images, which need no decoding; leave it out")
    import torch

    from selfguide.data.autoencoders import load_autoencoder, to_images
    from selfguide.data.normaliser import Normaliser

    codec = load_autoencoder(str(header.encoder), weights)
    once = replace(header, flips=False)
    forms = x if header.flips else x[:, None]  # (n, 1 or 2, C, H, W)
    with torch.inference_mode():
        seen = Normaliser.of(once).encode(torch.from_numpy(forms.reshape(-1, *forms.shape[2:])))
        tiles = to_images(once, seen, codec).permute(0, 2, 3, 1).numpy()
    several = tiles.reshape(*forms.shape[:2], *tiles.shape[1:])  # (n, forms, H, W, C)
    return np.stack([sheet(each, zoom=1) for each in several])


def save(path: Path, images: Images) -> None:
    """One PNG of all `images`, magnified by whole numbers where they are small."""
    across = math.ceil(math.sqrt(len(images))) * max(images.shape[1:3])
    write_png(path, sheet(images, zoom=max(1, LEAST // across)))
