"""What boxes and masks share: images of shards as a frozen ViT sees them, and rows that outlive a killed command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from selfguide.data.autoencoders import Autoencoder, to_images
from selfguide.data.crop_flip import Size
from selfguide.data.normaliser import Normaliser
from selfguide.discovery.resumable import Array, Make, Rows, Work, gather
from selfguide.discovery.vit import FrozenViT, Positions
from shards import sidecar, storage
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.read.reader import Reader
from tools import flags
from tools.annotate.features import DEVICE, OF_NET, vit_of

PICTURED = 32  # images in the picture beside a sidecar
PARTS = 512  # of which rows are made, at most
POSITIONS = (
    "how positions are resampled off the net's own size (by its name: DINO's code's, or timm's)"
)


def add_net(parser: argparse.ArgumentParser, short: str) -> None:
    """The flags that `look` reads; `short` says in words how large the net sees an image by default."""
    name = "timm's name, such as vit_small_patch16_224.dino"
    flags.add(
        parser,
        ("--vit NAME", str, flags.REQUIRED, name),
        *OF_NET,
        ("--positions", get_args(Positions), None, POSITIONS),
        ("--short N", int, None, f"short edge at which the net sees an image ({short})"),
        flags.OUT,
        ("--batch N", int, 32, "images at once (32)"),
        DEVICE,
    )


@dataclass(frozen=True, kw_only=True)
class Looked:
    """Shards, and the net that looks at their images."""

    manifest: manifests.Manifest
    reader: Reader
    normaliser: Normaliser
    codec: Autoencoder | None
    vit: FrozenViT
    short: int | None  # edge that images are resized to; None is their own

    def images(self, ordinals: NDArray[np.int64]) -> Tensor:
        """uint8 (B, C, H, W), never mirrored; latents are decoded."""
        stored = torch.from_numpy(self.reader.gather(ordinals)["x"])
        return to_images(self.normaliser.header, self.normaliser.encode(stored), self.codec)

    def seen(self, images: Tensor) -> Tensor:
        """`images` as the net is shown them."""
        return images if self.short is None else scaled(images, self.short)

    @property
    def size(self) -> Size:
        """(H, W) of images, on which layouts lie."""
        height, width = self.images(np.arange(1)).shape[-2:]
        return height, width

    @property
    def provenance(self) -> dict[str, Any]:
        said = {**self.vit.provenance_at_any_size, "short": self.short}
        if self.codec is not None:
            said |= {"decoder": self.codec.name, "decoder_sha256": self.codec.sha256}
        return said

    def before(self, options: argparse.Namespace) -> Looked:
        """As images were looked at before positions were corrected, unless the user has chosen."""
        if options.positions is not None:
            return self
        return replace(self, vit=replace(self.vit, positions="timm"))


def look(options: argparse.Namespace, short: int | None) -> Looked:
    """What the flags name, on its device.

    Raises:
        UserError: flags out of range, no such shards or weights.
    """
    flags.check_least(options, 1, "short", "batch")
    manifest = manifests.load(options.root)
    header = Header.of(manifest.header)
    vit, codec = vit_of(options, header, options.positions)
    return Looked(
        manifest=manifest,
        reader=Reader(options.root, manifest),
        normaliser=Normaliser.of(header),
        codec=codec,
        vit=vit,
        short=options.short or short,
    )


def scaled(images: Tensor, short: int) -> Tensor:
    """The short edge brought to `short` pixels, the other in proportion."""
    return resize(images, [short], InterpolationMode.BICUBIC, antialias=True)


def fill(
    work: Work,
    name: str,
    count: int,
    make: Make,
    dtype: DTypeLike,
    *,
    batch: int,
    doing: str,
) -> Rows:
    """(count, ...) rows by ordinal, made `batch` at a time where they are not there yet.

    Raises:
        UserError: rows that are not finite.
    """
    # whole batches, in which a net's rounding may differ, and few enough parts to have them all open
    chunk = batch * -(-count // (batch * PARTS))
    rows = Rows(
        folder=work.folder, prefix=f"{name}-{chunk}-", count=count, chunk=chunk, dtype=dtype
    )
    rows.fill(make, batch=batch, doing=doing)
    return rows


def publish(
    looked: Looked,
    work: Work,
    rows: Rows,
    draw: Callable[[Tensor, Array, Path], None],
    report: Callable[[Rows], Mapping[str, Any]],
    *,
    kind: sidecar.Kind,
    groups: int | None = None,
    attached: Mapping[str, bytes] = MappingProxyType({}),
) -> sidecar.Sidecar:
    """The sidecar of `rows` with a report on them, and with files attached: those given, and `<kind>.png`.

    `draw` makes that picture of some images (B, C, H, W), their rows, and a file.
    """

    def finish() -> tuple[tuple[str, ...], Mapping[str, Any]]:
        work.target.mkdir(parents=True, exist_ok=True)
        for name, data in attached.items():
            storage.publish(work.target / name, data, replace=True)
        chosen = np.unique(np.linspace(0, rows.count - 1, PICTURED, dtype=np.int64))
        draw(looked.images(chosen), gather(list(rows), chosen), work.target / f"{kind}.png")
        return (f"{kind}.png", *attached), report(rows)

    made = work.publish(rows, kind=kind, groups=groups, finish=finish)
    assert made is not None  # all parts were ours, or somebody else has published them
    return made


def tiles(images: Tensor, least: int = 96) -> tuple[list[Image.Image], int]:
    """Each image (B, C, H, W) as a picture of at least so many pixels, and how many times it was enlarged."""
    zoom = math.ceil(least / min(images.shape[-2:]))
    colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    size = (images.shape[-1] * zoom, images.shape[-2] * zoom)
    return [Image.fromarray(a).resize(size, Image.Resampling.NEAREST) for a in colour], zoom


def sheet(pictures: list[Image.Image], file: Path, columns: int = 8, gap: int = 4) -> None:
    """Pictures of one size in rows, as a PNG."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (width + gap), rows * (height + gap)), "white")
    for i, one in enumerate(pictures):
        whole.paste(one, (i % columns * (width + gap), i // columns * (height + gap)))
    whole.save(file)
