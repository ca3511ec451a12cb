"""`python -m tools.shards`: write data sets as WebDataset shards, check them, look at them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shards import cli, writer
from shards import manifest as manifests
from shards.errors import UserError
from shards.manifest import Header, Manifest
from shards.source import ArraySource, Source, encode_keys
from shards.verify import verify

T = TypeVar("T")

EPILOG = """examples:
  python -m tools.shards make digits --out data/digits
  python -m tools.shards make synthetic --out data/latents --count 1024 --shape 4 32 32 --classes 1000
  python -m tools.shards verify data/digits
  python -m tools.shards stats data/digits --json
"""
LATENT_SCALE = 0.18215  # of the Stable Diffusion f8 autoencoder (Rombach et al. 2022)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.shards",
        description="Write data sets as WebDataset shards, check them, look at them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print one JSON object")
    target = argparse.ArgumentParser(add_help=False, parents=[output])
    target.add_argument(
        "--out", required=True, metavar="DIR", help="folder or s3:// prefix to write"
    )
    target.add_argument("--seed", type=int, default=0, help="of the shuffle before writing (0)")
    target.add_argument("--shard-mb", type=float, default=128, help="MiB in a shard, about (128)")

    sources = commands.add_parser("make", help="write a data set").add_subparsers(
        required=True, metavar="SOURCE"
    )
    digits = sources.add_parser(
        "digits",
        parents=[target],
        help="scikit-learn's 1,797 scans of handwritten digits, 1 x 8 x 8",
    )
    digits.set_defaults(command=lambda args: _make(args, *digits_source()))
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
    synthetic.set_defaults(command=_make_synthetic)

    check = commands.add_parser(
        "verify", parents=[output], help="read everything, compare every hash"
    )
    check.add_argument("root", metavar="ROOT", help="folder or s3:// prefix")
    check.set_defaults(command=_verify)
    stats = commands.add_parser("stats", parents=[output], help="what the manifest says")
    stats.add_argument("root", metavar="ROOT", help="folder or s3:// prefix")
    stats.set_defaults(command=_stats)
    return parser


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
        watch=_watch("writing shards"),
    )
    if args.json:
        print(json.dumps({"root": args.out, "written": new, **_summary(manifest)}))
        return 0
    said = "wrote" if new else "already there, nothing written:"
    print(f"{said} {_line(manifest)} in {args.out}, manifest {manifest.hash[:12]}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    report = verify(args.root, watch=_watch("reading shards"))
    if args.json:
        print(json.dumps({"root": args.root, "well": not report.problems, **asdict(report)}))
    else:
        for problem in report.problems:
            print(f"damaged: {problem}")
        read = f"{report.samples:,} samples in {_shards(report.shards)}, {_size(report.bytes)} read"
        print(f"{read}: {f'{len(report.problems)} problems' if report.problems else 'all well'}")
    return 1 if report.problems else 0


def _stats(args: argparse.Namespace) -> int:
    manifest = manifests.load(args.root)
    summary = {"root": args.root, **_summary(manifest)}
    if args.json:
        print(json.dumps(summary))
        return 0
    from rich.table import Table

    table = Table(title=_line(manifest), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in summary.items():
        text = ", ".join(f"{v:.6g}" for v in value) if isinstance(value, list) else str(value)
        if isinstance(value, dict):
            text = ", ".join(f"{n} {v}" for n, v in value.items() if v is not None)
        table.add_row(name.replace("_", " "), text)
    cli.console().print(table)
    return 0


def _summary(manifest: Manifest) -> dict[str, object]:
    payload = int(manifest.blocks["bytes"].sum())
    stored = sum(shard.bytes for shard in manifest.shards)
    histogram = manifest.label_histogram
    return {
        "manifest": manifest.hash,
        "samples": manifest.count,
        "shape": [*manifest.shape],
        "dtype": np.dtype(manifest.fields[0].dtype).name,
        "shards": len(manifest.shards),
        "bytes": stored,
        "bytes_over_payload": round(stored / payload, 6),
        "header": manifest.header,
        "mean": [*manifest.channel_mean],
        "std": [*manifest.channel_std],
        "range": [manifest.minimum, manifest.maximum],
        "classes": manifest.classes,
        "samples_per_class": {"least": min(histogram), "most": max(histogram)}
        if histogram
        else None,
        "source": manifest.source,
        "seed": manifest.seed,
    }


def _line(manifest: Manifest) -> str:
    shape, stored = (
        " x ".join(map(str, manifest.shape)),
        sum(shard.bytes for shard in manifest.shards),
    )
    dtype, shards = np.dtype(manifest.fields[0].dtype).name, _shards(len(manifest.shards))
    return f"{manifest.count:,} samples {shape} {dtype}, {shards}, {_size(stored)}"


def _shards(count: int) -> str:
    return f"{count:,} shard{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _watch(doing: str) -> Callable[[Iterable[T], int], Iterable[T]]:
    return lambda items, total: cli.track(items, total, doing)


if __name__ == "__main__":
    cli.run(main)
