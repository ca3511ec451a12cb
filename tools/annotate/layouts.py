"""What boxes and masks share: images of shards as a frozen ViT sees them, and rows that outlive a killed command."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from selfguide.data.autoencoders import Autoencoder, load_autoencoder, to_images
from selfguide.data.crop_flip import Size
from selfguide.data.normaliser import Normaliser
from selfguide.discovery.vit import FrozenViT, load_vit
from selfguide.distributed import RankInfo
from shards import cli, sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.manifest import Manifest
from shards.read.reader import Reader

PICTURED = 32  # images in the picture beside a sidecar
Rows = NDArray[np.generic]


def add_net(parser: argparse.ArgumentParser, short: str) -> None:
    parser.add_argument(
        "--vit",
        required=True,
        metavar="NAME",
        help="timm's name, such as vit_small_patch16_224.dino",
    )
    parser.add_argument("--weights", metavar="PATH", help="file of weights; random:SEED draws them")
    parser.add_argument("--sha256", metavar="HEX", help="what the file must have")
    parser.add_argument("--download", action="store_true", help="the hub may be asked")
    parser.add_argument(
        "--saw-labels", choices=("yes", "no"), help="whether its training did (by its name)"
    )
    parser.add_argument(
        "--vae-weights", metavar="PATH", help="of the autoencoder of stored latents"
    )
    parser.add_argument(
        "--short",
        type=int,
        metavar="N",
        help=f"short edge at which the net sees an image ({short})",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the sidecar's folder")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at once (32)")
    parser.add_argument("--device", help="where networks run; default a GPU where there is one")


@dataclass(frozen=True, kw_only=True)
class Looked:
    """Shards, and the net that looks at their images."""

    manifest: Manifest
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
        said = {**self.vit.provenance, "short": self.short}
        if self.codec is not None:
            said |= {"decoder": self.codec.name, "decoder_sha256": self.codec.sha256}
        return said


def look(options: argparse.Namespace, short: int | None) -> Looked:
    """What the flags name, on its device.

    Raises:
        UserError: flags out of range, no such shards or weights.
    """
    for name in ("short", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: take 1 or more")
    manifest = manifests.load(options.root)
    header, device = Header.of(manifest.header), options.device or str(RankInfo(0, 0, 1).device)
    vit = load_vit(
        options.vit,
        options.weights,
        sha256=options.sha256,
        download=options.download,
        saw_labels=None if options.saw_labels is None else options.saw_labels == "yes",
    ).to(device)
    codec = None
    if header.kind == "latent":
        codec = load_autoencoder(str(header.encoder), options.vae_weights, device=device)
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


def work_folder(target: Path, decided: Mapping[str, Any]) -> Path:
    """Hidden beside the target, made; another content has another name, so parts are never mixed."""
    folder = target.parent / f".{target.name}.{manifests.digest(decided)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fill(
    work: Path,
    name: str,
    count: int,
    make: Callable[[NDArray[np.int64]], Tensor],
    dtype: DTypeLike,
    *,
    batch: int,
    doing: str,
) -> Rows:
    """(count, ...) rows by ordinal, memory-mapped in `work`; goes on behind what is there already.

    Raises:
        UserError: rows that are not finite.
    """
    file, log = work / f"{name}.npy", work / f"{name}.json"
    done = json.loads(log.read_text())["done"] if log.exists() else 0
    rows = np.load(file, mmap_mode="r+") if done else None
    starts = range(done, count, batch)
    for start in cli.track(starts, len(starts), doing):
        here = np.arange(start, min(start + batch, count))
        made = make(here)
        bad = ~made.isfinite().flatten(1).all(1)
        if bad.any():
            raise UserError(
                f"sample {int(here[int(bad.int().argmax())])}: its features are NaN or infinite; take other weights"
            )
        if rows is None:
            rows = np.lib.format.open_memmap(file, "w+", np.dtype(dtype), (count, *made.shape[1:]))
        rows[here] = made.cpu().numpy().astype(dtype)
        rows.flush()
        storage.publish(log, json.dumps({"done": start + len(here)}).encode(), replace=True)
    assert rows is not None  # shards hold a sample at least
    return rows


def publish(
    work: Path,
    target: Path,
    picture: Callable[[Path], None],
    **said: Any,
) -> sidecar.Sidecar:
    """The sidecar of rows that were filled in `work`, which goes; with its picture."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / sidecar.ROWS, target / sidecar.ROWS)
    name = f"{said['kind']}.png"
    picture(target / name)
    here = np.load(target / sidecar.ROWS, mmap_mode="r+")
    made = sidecar.write(target, here, attached=(name, *said.pop("attached", ())), **said)
    shutil.rmtree(work)
    return made


def pictured(looked: Looked) -> NDArray[np.int64]:
    """Ordinals of a picture's images: evenly spread."""
    return np.unique(np.linspace(0, looked.manifest.count - 1, PICTURED, dtype=np.int64))


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


def with_images(
    looked: Looked, draw: Callable[[Tensor, NDArray[np.int64], Path], None]
) -> Callable[[Path], None]:
    """A picture that is drawn of the chosen images, their ordinals and a file."""
    chosen = pictured(looked)
    return partial(draw, looked.images(chosen), chosen)
