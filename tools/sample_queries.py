"""The images that `python -m tools.sample` asks after: files, or images by ordinal, of the training set or others."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, from_images
from selfguide.sampling.condition_sampler import OtherImages, TrainingImages
from selfguide.snapshot import Snapshot
from selfguide.spec.config.sidecar import ROLES
from selfguide.spec.suggest import check_known
from shards import storage
from shards.errors import UserError


def others_of(options: argparse.Namespace) -> OtherImages | None:
    """The images that ordinals count, where --shards names others than those of training.

    Raises:
        UserError: annotations that are no FIELD=FOLDER, or of images that are not named.
    """
    if options.shards is None:
        if options.annotations:
            raise UserError(
                f"--annotations {options.annotations[0]} are of images that --shards names; give it too"
            )
        return None
    if not (options.row or options.like or options.between):
        raise UserError(
            f"--shards {options.shards}: these images are asked after by --row, --like or --between; give one of them"
        )
    folders = {}
    for text in options.annotations:
        field, equals, folder = text.partition("=")
        check_known("--annotations", field, ROLES)
        if not equals or not folder:
            raise UserError(f"--annotations {text}: give {field}=FOLDER")
        folders[field] = folder if storage.is_remote(folder) else str(storage.expanded(folder))
    return OtherImages(options.shards, folders)


def query_images(
    snapshot: Snapshot, codec: Autoencoder | None, texts: list[str], others: OtherImages | None
) -> Tensor:
    """Query images in model space: files, or ordinals of the data the snapshot was trained on, or of `others`."""
    images = TrainingImages(snapshot, others) if any(text.isdigit() for text in texts) else None
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
        return TrainingImages(snapshot, others_of(options)).x0(torch.tensor(options.row))
    return query_images(snapshot, codec, options.like, others_of(options))


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
