"""The images that `python -m tools.sample` asks after: files, or images of the training set by ordinal."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, from_images
from selfguide.sampling.condition_sampler import TrainingImages
from selfguide.snapshot import Snapshot
from shards.errors import UserError


def query_images(snapshot: Snapshot, codec: Autoencoder | None, texts: list[str]) -> Tensor:
    """Query images in model space: files, or ordinals of the data the snapshot was trained on."""
    images = TrainingImages(snapshot) if any(text.isdigit() for text in texts) else None
    made = [
        images.x0(torch.tensor([int(text)]))
        if images and text.isdigit()
        else from_file(Path(text), snapshot, codec)
        for text in texts
    ]
    return torch.cat(made)


def of_queries(
    snapshot: Snapshot, codec: Autoencoder | None, options: argparse.Namespace
) -> Tensor:
    """What --row or --like names, in model space, one image a row of the grid."""
    if options.row is not None:
        return TrainingImages(snapshot).x0(torch.tensor(options.row))
    return query_images(snapshot, codec, options.like)


def from_file(path: Path, snapshot: Snapshot, codec: Autoencoder | None) -> Tensor:
    """(1, C, H, W) in model space from an image file, cropped to a square and resized."""
    if not path.is_file():
        raise UserError(f"--like {path}: no such file, and not the ordinal of a training image")
    net, header = snapshot.student.backbone.net, snapshot.data["header"]
    factor = codec.factor if codec else 1
    channels = codec.image_channels if codec else net.channels
    picture = Image.open(path).convert("L" if channels == 1 else "RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge))
    size = net.size * factor
    pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
    images = torch.from_numpy(pixels.copy()).view(1, size, size, channels).permute(0, 3, 1, 2)
    return from_images(header, images, codec)
