"""Samples beside the real images that are nearest to them, in pixels or in the features of a net.

    python -m tools.neighbours samples/images data/digits --out nearest.png
    python -m tools.neighbours samples.npz data/in32 --protocol fd_timm --net resnet50.a1_in1k --weights net.safetensors
    python -m tools.neighbours samples.npz data/in32 --closest      those samples that are nearest to a real image

Whether a model repeats what it was trained on is seen so (Hu et al. 2023, SGDM, figure 22, in SimCLR's features and in
pixels). Distances are Euclidean in pixels of 0 to 1, and 1 - cosine in features. Beside the picture lies a .json with
the ordinals. `evaluation.metrics=[near_copies]` counts the copies of a whole set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, load_autoencoder, to_images
from selfguide.data.normaliser import Normaliser
from selfguide.distributed import RankInfo
from shards import cli
from shards.cli import track
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.read.reader import Reader
from tools import drawing, flags
from tools.feature_flags import NET, PROTOCOLS
from tools.reference.make import net_of
from tools.sample_files import open_images

# uint8 images (B, C, H, W) -> (B, F), and what is said of a distance there
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Space:
    """Where images are compared: `embed` to vectors, of unit length where angles count."""

    name: str
    embed: Embed
    angles: bool

    def vectors(self, images: Tensor) -> Tensor:
        """(B, F) of uint8 images (B, C, H, W); fp64, in which a copy is at distance zero."""
        found = self.embed(images).double()
        return F.normalize(found, dim=1) if self.angles else found

    def distances(self, these: Tensor, those: Tensor) -> Tensor:
        """(A, B) of vectors (A, F) and (B, F)."""
        return 1 - these @ those.T if self.angles else torch.cdist(these, those)


@dataclass(frozen=True)
class Reals:
    """The images in shards, by their ordinals."""

    reader: Reader
    normaliser: Normaliser
    codec: Autoencoder | None
    count: int

    def images(self, ordinals: NDArray[np.int64]) -> Tensor:
        """uint8 (B, C, H, W); latents are decoded."""
        stored = torch.from_numpy(self.reader.gather(ordinals)["x"])
        return to_images(self.normaliser.header, self.normaliser.encode(stored), self.codec)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 1, "count", "near", "batch")
    made, manifest = open_images(Path(options.samples), least=1), manifests.load(options.shards)
    if options.near > manifest.count:
        raise UserError(
            f"--near {options.near}: {options.shards} holds {manifest.count}; give fewer"
        )
    space, header = space_of(options), manifest.header
    codec = None
    if header["kind"] == "latent":
        device = options.device or str(RankInfo(0, 0, 1).device)
        codec = load_autoencoder(str(header["encoder"]), options.decoder, device=device)
    numbers = np.arange(len(made) if options.closest else min(options.count, len(made)))
    with closing(Reader(options.shards, manifest)) as reader:
        reals = Reals(reader, Normaliser.of(header), codec, manifest.count)
        if options.protocol is None:
            _check_sizes(made.at(numbers[:1]), reals.images(np.arange(1)))
        queries = torch.cat([space.vectors(made.at(n)) for n in _parts(numbers, options.batch)])
        found = nearest(space, queries, _real_vectors(space, reals, options.batch), options.near)
        # of all samples, those with the least distance
        shown = found.distances[:, 0].argsort(stable=True)[: options.count].numpy()
        shown = shown if options.closest else numbers
        near = found.ordinals[shown].numpy()
        pictures = [reals.images(row) for row in near]
    rows = [
        {"sample": int(n), "ordinals": found.ordinals[n].tolist(), "distances": found.distances[n].tolist()}
        for n in shown
    ]  # fmt: skip
    out = Path(options.out)
    draw(out, made.at(shown), pictures, rows, space.name)
    said = {"picture": str(out), "space": space.name, "samples": options.samples, "rows": rows}
    said |= {"shards": options.shards, "manifest": manifest.hash}
    out.with_suffix(".json").write_text(json.dumps(said, indent=1))
    print(json.dumps(said) if options.json else f"{len(rows)} samples in {space.name}\n{out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    _, *of_net = NET
    return flags.command(
        "tools.neighbours",
        __doc__,
        ("samples", str, None, "folder of lossless images, or a .npz, as tools.sample writes them"),
        ("shards SHARDS", str, None, "of the real images, or of their latents"),
        (
            "--protocol P",
            PROTOCOLS,
            None,
            f"in the features of this protocol's net: {', '.join(PROTOCOLS)} (pixels)",
        ),
        *of_net,
        ("--decoder FILE", str, None, "weights of the autoencoder that decodes latents"),
        ("--count N", int, 8, "samples that are shown (8)"),
        ("--near N", int, 8, "real images beside each (8)"),
        ("--closest", bool, False, "of all samples those nearest to a real image, not the first"),
        ("--out FILE", flags.here, "neighbours.png", "the picture (neighbours.png)"),
        flags.JSON,
    )


def space_of(options: argparse.Namespace) -> Space:
    """What the flags name.

    Raises:
        UserError: flags of a net without one, or whatever loading it refuses.
    """
    if options.protocol is not None:
        net = net_of(options)
        return Space(f"{net.name}'s features", net.embed, True)
    for name in ("net", "weights", "sha256"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is of a net, and without --protocol pixels are compared")
    return Space("pixels", lambda images: images.expand(-1, 3, -1, -1).flatten(1) / 255, False)


def _check_sizes(samples: Tensor, reals: Tensor) -> None:
    if samples.shape[-2:] != reals.shape[-2:]:
        raise UserError(
            f"samples are {tuple(samples.shape[-2:])} and real images {tuple(reals.shape[-2:])}: pixels compare at one "
            "size; give shards of that size, or --protocol for a net's features"
        )


def _parts(numbers: NDArray[np.int64], batch: int) -> Iterator[NDArray[np.int64]]:
    return (numbers[start : start + batch] for start in range(0, len(numbers), batch))


def _real_vectors(space: Space, reals: Reals, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ordinals (B,) and vectors (B, F) of all real images."""
    parts = list(_parts(np.arange(reals.count), batch))
    for ordinals in track(parts, len(parts), f"{reals.count:,} real images"):
        yield torch.from_numpy(ordinals), space.vectors(reals.images(ordinals))


@dataclass(frozen=True)
class Nearest:
    """Of each query its nearest others, nearest first: (Q, n) distances and ordinals."""

    distances: Tensor
    ordinals: Tensor


def nearest(
    space: Space, queries: Tensor, others: Iterable[tuple[Tensor, Tensor]], count: int
) -> Nearest:
    """The `count` others nearest to each of `queries` (Q, F), exactly; of equals those that come first.

    Others come in parts, ordinals (B,) and vectors (B, F), and are never held together.
    """
    best = Nearest(torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64))
    for ordinals, vectors in others:
        distances = torch.cat([best.distances, space.distances(queries, vectors)], 1)
        numbers = torch.cat([best.ordinals, ordinals.expand(len(queries), -1)], 1)
        order = distances.argsort(dim=1, stable=True)[:, :count]
        best = Nearest(distances.gather(1, order), numbers.gather(1, order))
    return best


def draw(
    file: Path,
    samples: Tensor,
    reals: Sequence[Tensor],
    rows: Sequence[dict[str, Any]],
    space: str,
) -> None:
    """A line a sample: itself, then its nearest real images (n, C, H, W) over their distances."""
    columns = 1 + len(reals[0])
    size = (1.1 * columns, 1.3 * len(rows) + 0.5)
    with drawing.figure(file, len(rows), columns, size=size) as (figure, axes):
        for line, sample, near, row in zip(axes, samples, reals, rows, strict=True):
            texts = [f"sample {row['sample']}", *(f"{d:.3g}" for d in row["distances"])]
            for axis, image, text in zip(line, [sample, *near], texts, strict=True):
                levels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
                axis.imshow(levels, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.set_xlabel(text, fontsize=8)
            line[0].spines[:].set(color="#4c78a8", linewidth=3)
        figure.suptitle(f"samples, and the real images nearest to them in {space}", fontsize=11)


if __name__ == "__main__":
    cli.run(main)
