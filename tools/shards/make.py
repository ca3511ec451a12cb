"""Write a data set as WebDataset shards. Where the same one lies already in full, nothing is written."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from shards import manifest as manifests
from shards import writer
from shards.errors import UserError
from shards.manifest import Header
from shards.source import ArraySource, Source, encode_keys
from tools.shards import report

LATENT_SCALE = 0.18215  # of the Stable Diffusion f8 autoencoder (Rombach et al. 2022)
HELP = "write a data set"


def add(parser: argparse.ArgumentParser) -> None:
    target = argparse.ArgumentParser(add_help=False)
    target.add_argument(
        "--out", required=True, metavar="DIR", help="folder or s3:// prefix to write"
    )
    target.add_argument("--seed", type=int, default=0, help="of the shuffle before writing (0)")
    target.add_argument("--shard-mb", type=float, default=128, help="MiB in a shard, about (128)")
    target.add_argument("--json", action="store_true", help="print one JSON object")

    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    digits = sources.add_parser(
        "digits",
        parents=[target],
        help="scikit-learn's 1,797 scans of handwritten digits, 1 x 8 x 8",
    )
    digits.set_defaults(make=lambda args: _make(args, *digits_source()))
    synthetic = sources.add_parser(
        "synthetic", parents=[target], help="Gaussian noise in the shape of latents, for tests"
    )
    synthetic.add_argument("--count", type=int, default=1024, help="samples (1024)")
    synthetic.add_argument(
        "--shape", type=int, nargs=3, default=(4, 32, 32), metavar=("C", "H", "W")
    )
    synthetic.add_argument(
        "--classes", type=int, default=1000, help="classes; 0 for no labels (1000)"
    )
    synthetic.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    synthetic.set_defaults(make=_make_synthetic)


def run(options: argparse.Namespace) -> int:
    return options.make(options)


def digits_source() -> tuple[Source, Header]:
    """The scans as uint8 grey levels 0 to 16; a model sees (x - 8) / 8, in [-1, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = found.images.astype(np.uint8)[:, None]
    source = ArraySource.of("digits", x, labels=found.target, classes=10)
    return source, Header(kind="image", shift=8.0, scale=0.125)


@dataclass(frozen=True, kw_only=True)
class SyntheticSource:
    """Latents that are Gaussian noise, each a function of (seed, row): any count, no memory."""

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype
    classes: int
    seed: int

    @property
    def name(self) -> str:
        return "synthetic"

    @property
    def fingerprint(self) -> str:
        return manifests.digest({**asdict(self), "dtype": self.dtype.str, "shape": [*self.shape]})

    @property
    def keys(self) -> NDArray[np.bytes_]:
        return encode_keys([f"{row:08d}" for row in range(self.count)])

    @property
    def labels(self) -> NDArray[np.int64] | None:
        return np.arange(self.count) % self.classes if self.classes else None

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        noise = [
            np.random.Generator(np.random.Philox(key=[self.seed, row])).standard_normal(self.shape)
            for row in rows.tolist()
        ]
        return (np.stack(noise) / LATENT_SCALE).astype(self.dtype)


def _make_synthetic(args: argparse.Namespace) -> int:
    for name, least in (("count", 1), ("classes", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: give at least {least}")
    if min(args.shape) < 1:
        raise UserError(f"--shape {' '.join(map(str, args.shape))}: each must be at least 1")
    source = SyntheticSource(
        count=args.count,
        shape=tuple(args.shape),
        dtype=np.dtype(args.dtype),
        classes=args.classes,
        seed=args.seed,
    )
    return _make(args, source, Header(kind="latent", scale=LATENT_SCALE, encoder="synthetic"))


def _make(args: argparse.Namespace, source: Source, header: Header) -> int:
    if not args.shard_mb > 0:
        raise UserError(f"--shard-mb {args.shard_mb}: give more than 0")
    manifest, new = writer.write(
        args.out,
        source,
        header=header,
        seed=args.seed,
        shard_bytes=math.ceil(args.shard_mb * 2**20),
        watch=report.watch("writing shards"),
    )
    if args.json:
        print(json.dumps({"root": args.out, "written": new, **report.summary(manifest)}))
        return 0
    said = "wrote" if new else "already there, nothing written:"
    print(f"{said} {report.line(manifest)} in {args.out}, manifest {manifest.hash[:12]}")
    return 0
