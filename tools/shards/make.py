"""Write a data set as WebDataset shards, from files of any usual kind.

Every input is read and decoded once before the first shard, so that bad ones are known: they go to
skipped.jsonl with their reason, and are an error beyond --max-skipped. Images are decoded by Pillow (RGB, alpha
dropped, EXIF orientation not applied). --size N halves an image by a box filter while its short side is at least
2N, brings it to N by a bicubic one and crops it about its centre (Dhariwal and Nichol 2021). Pixels are uint8, and a
model sees (x - 127.5) / 127.5.

Pictures are kept one sample per key: what --size makes of them as a PNG, without --size the input's own bytes; beside
it .cls, the label, and .id.txt, the key. They are decoded whenever they are read (data.decoders). --layout blocks
keeps pixels instead, 256 samples a member: for small pictures, up to 64 pixels say, and where disks are large and
processors busy, that reads many times faster. Arrays, cifar and numpy, are always kept in blocks.

A killed make goes on when the same command is given again; where all is there, nothing is written.
Many nodes may write one data set together, and need not wait for each other:
  srun sh -c 'python -m tools.shards make ... --rank $SLURM_PROCID --world $SLURM_NTASKS'

examples:
  python -m tools.shards make folder imagenet/train --size 256 --workers 16 --out s3://data/in1k-256
  python -m tools.shards make cifar cifar-10-python.tar.gz --out data/cifar10
  python -m tools.shards make tars laion/ --size 64 --max-skipped 1% --dedupe --out data/laion64
  python -m tools.shards make lightningdit extracted/ --weights vavae.pt --dtype float16 --out data/in1k-va
  python -m tools.shards make digits --out data/digits
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from shards import cli, storage
from shards.errors import UserError
from shards.format.header import PIXELS, Header
from shards.format.manifest import Layout, Manifest
from shards.format.pictures import Picture
from shards.sources import arrays, folders, tables, tars
from shards.sources.lightningdit import lightningdit
from shards.sources.listing import Listing, Raw, file
from shards.sources.made import LATENT_SCALE, SyntheticSource, digits_source
from shards.sources.source import Source
from shards.write import writer
from shards.write.scan import SKIPPED, ScanCounts, Threshold, scan
from tools.shards import report, sweep

if TYPE_CHECKING:
    from rich.table import Table

HELP = "write a data set"


def add(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="SOURCE", dest="kind")
    _add_pictures(kinds)
    _add_arrays(kinds)
    _kind(kinds, "digits", "scikit-learn's 1,797 scans of handwritten digits, 1 x 8 x 8", _digits)
    synthetic = _kind(kinds, "synthetic", "Gaussian noise in the shape of latents", _synthetic)
    synthetic.add_argument("--count", type=int, default=1024, help="samples (1024)")
    synthetic.add_argument(
        "--shape", type=int, nargs=3, default=(4, 32, 32), metavar=("C", "H", "W")
    )
    synthetic.add_argument("--classes", type=int, default=1000, help="0 for no labels (1000)")
    synthetic.add_argument("--dtype", choices=("float16", "float32"), default="float16")


def _add_pictures(kinds: Any) -> None:
    """Sources of encoded images."""
    made = {
        "folder": ("images in one folder a class (ImageFolder), or in one folder", _folder),
        "tars": ("WebDataset tars, such as img2dataset's", _tars),
        "parquet": ("parquet files with a column of images", _parquet),
        "dataset": ("a data set that Hugging Face's save_to_disk wrote", _dataset),
        "lsun": ("an LSUN category's LMDB", _lsun),
        "voc": ("a year of Pascal VOC", _voc),
        "coco": ("a COCO folder: annotations/ beside train2017/, val2017/", _coco),
    }
    parsers = {name: _kind(kinds, name, text, make) for name, (text, make) in made.items()}
    for name, parser in parsers.items():
        several = name in ("tars", "parquet")
        parser.add_argument("paths" if several else "path", nargs="+" if several else None)
        parser.add_argument(
            "--size",
            type=int,
            help="pixels a side, by box, bicubic and centre crop; none: as they are",
        )
        parser.add_argument("--channels", type=int, default=3, help="3 RGB, 1 grey (3)")
        parser.add_argument(
            "--layout",
            dest="kept",
            choices=get_args(Layout),
            default="samples",
            help="one encoded picture per key, or arrays of pixels in blocks of 256 (samples)",
        )
    for name in ("tars", "parquet", "dataset"):
        field = "extension" if name == "tars" else "column"
        known = "cls or json:FIELD; cls" if name == "tars" else "label"
        parsers[name].add_argument("--image", help=f"{field} of the image, where it is not plain")
        parsers[name].add_argument("--label", help=f"{field} of the label ({known}, where it is)")
    for name in ("parquet", "dataset"):
        parsers[name].add_argument("--key", help="column of keys; without it they are row numbers")
    parsers["tars"].add_argument(
        "--prefix-keys", action="store_true", help="put each tar's name before its keys"
    )
    parsers["dataset"].add_argument("--split", help="of a saved DatasetDict")
    parsers["voc"].add_argument("--split", default="trainval", help="(trainval)")
    parsers["coco"].add_argument("--split", default="train2017", help="(train2017)")


def _add_arrays(kinds: Any) -> None:
    """Sources whose samples are arrays."""
    archive = _kind(
        kinds, "cifar", "CIFAR-10 or CIFAR-100, the published tar.gz for Python", _cifar
    )
    archive.add_argument("path")
    archive.add_argument("--split", default="train", choices=("train", "test"), help="(train)")
    numpy = _kind(
        kinds, "numpy", "a .npy or .npz of images or latents, (N, C, H, W) or (N, H, W, C)", _numpy
    )
    numpy.add_argument("path")
    numpy.add_argument("--x", help="array of a .npz; its first one")
    numpy.add_argument("--y", help="array of labels of a .npz; none")
    numpy.add_argument("--layout", choices=("nchw", "nhwc"), help="where uint8 leaves it open")
    numpy.add_argument("--encoder", help="the values are latents, and this is what encoded them")
    numpy.add_argument(
        "--scale", type=float, help="of latents: (x - shift) * scale, with --encoder (1)"
    )
    numpy.add_argument("--shift", type=float, help="(0)")
    latents = _kind(
        kinds,
        "lightningdit",
        "latents that LightningDiT extracted: a folder of .safetensors",
        _latents,
    )
    latents.add_argument("path")
    latents.add_argument(
        "--statistics", metavar="FILE", help="mean and std of the latents (PATH/latents_stats.pt)"
    )
    latents.add_argument("--encoder", default="va_vae", metavar="NAME", help="(va_vae)")
    latents.add_argument(
        "--weights",
        metavar="FILE",
        help="of it, whose sha256 is kept: none others decode the latents",
    )
    latents.add_argument("--classes", type=int, help="number of them (the greatest label + 1)")
    latents.add_argument("--dtype", choices=("float16", "float32"), help="(as they are)")


def _kind(
    kinds: Any, name: str, text: str, make: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder or s3:// prefix to write"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle before writing (0)")
    parser.add_argument("--shard-mb", type=float, default=128, help="MiB in a shard, about (128)")
    parser.add_argument("--workers", type=int, default=1, help="processes here (1)")
    parser.add_argument("--rank", type=int, default=0, help="of this call among --world (0)")
    parser.add_argument("--world", type=int, default=1, help="calls that write together (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if name not in ("digits", "synthetic"):
        parser.add_argument(
            "--dedupe",
            action="store_true",
            help="leave out inputs of the same bytes as an earlier one",
        )
        parser.add_argument(
            "--max-skipped", default="0", metavar="N|P%", help="bad inputs to put up with (0)"
        )
    parser.set_defaults(make=make, kept="blocks")
    return parser


def run(options: argparse.Namespace) -> int:
    if not options.shard_mb > 0:
        raise UserError(f"--shard-mb {options.shard_mb}: give more than 0")
    options.started = time.monotonic()
    return options.make(options)


def _picture(options: argparse.Namespace) -> Picture:
    return Picture(size=options.size, channels=options.channels)


def _folder(options: argparse.Namespace) -> int:
    inside = not storage.is_remote(options.out) and Path(options.out).resolve()
    if inside and inside.is_relative_to(Path(options.path).resolve()):
        raise UserError(
            f"--out {options.out} lies in {options.path}, where a folder is a class: name a place beside it"
        )
    return _list(options, folders.image_folder(options.path, _picture(options)))


def _voc(options: argparse.Namespace) -> int:
    return _list(options, folders.voc(options.path, options.split, _picture(options)))


def _coco(options: argparse.Namespace) -> int:
    return _list(options, folders.coco(options.path, options.split, _picture(options)))


def _lsun(options: argparse.Namespace) -> int:
    return _list(options, folders.lsun(options.path, _picture(options)))


def _tars(options: argparse.Namespace) -> int:
    facts = {"image": options.image, "label": options.label, "prefix": options.prefix_keys}
    return _list(options, tars.tars(options.paths, _picture(options), **facts))


def _parquet(options: argparse.Namespace) -> int:
    facts = {name: getattr(options, name) for name in ("image", "label", "key")}
    return _list(options, tables.parquet(options.paths, _picture(options), **facts))


def _dataset(options: argparse.Namespace) -> int:
    facts = {name: getattr(options, name) for name in ("image", "label", "key", "split")}
    return _list(options, tables.saved_dataset(options.path, _picture(options), **facts))


def _cifar(options: argparse.Namespace) -> int:
    return _list(options, arrays.cifar(options.path, options.split))


def _numpy(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("shift", "scale")}
    normal: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
    if normal and options.encoder is None:
        name, value = next(iter(normal.items()))
        raise UserError(f"--{name} {value:g} is of latents: name with --encoder what made them")
    listing = arrays.numpy_file(
        options.path,
        x=options.x,
        y=options.y,
        channels_first=None if options.layout is None else options.layout == "nchw",
        latents=options.encoder is not None,
    )
    if options.encoder is None:
        return _list(options, listing)
    header = Header(kind="latent", encoder=options.encoder, **normal)
    return _list(options, listing, header)


def _latents(options: argparse.Namespace) -> int:
    listing = lightningdit(options.path, classes=options.classes, dtype=options.dtype)
    # torch wrote the statistics, and reads them
    from selfguide.data.autoencoders.load import STATISTICS, normal_of, read_statistics

    given = options.statistics or str(Path(options.path) / STATISTICS)
    shift, scale = normal_of(*read_statistics(file(given, "file of statistics")))
    weights = options.weights and storage.sha256(file(options.weights, "file of weights"))
    header = Header(
        kind="latent",
        shift=shift,
        scale=scale,
        encoder=options.encoder,
        encoder_sha256=weights,
        flips=True,
    )
    assert isinstance(listing.decode, Raw)
    header.model_shape(listing.decode.shape)  # statistics of other latents, before a long look
    return _list(options, listing, header)


def _digits(options: argparse.Namespace) -> int:
    source, header = digits_source()
    return _write(options, source, header)


def _synthetic(options: argparse.Namespace) -> int:
    for name, least in (("count", 1), ("classes", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: give at least {least}")
    if min(options.shape) < 1:
        raise UserError(f"--shape {' '.join(map(str, options.shape))}: each must be at least 1")
    source = SyntheticSource(
        count=options.count,
        shape=tuple(options.shape),
        dtype=np.dtype(options.dtype),
        classes=options.classes,
        seed=options.seed,
    )
    header = Header(kind="latent", scale=LATENT_SCALE, encoder="synthetic")
    return _write(options, source, header)


def _list(options: argparse.Namespace, listing: Listing, header: Header = PIXELS) -> int:
    """Looks at what is listed, then writes what holds."""
    source, counts = scan(
        options.out,
        listing,
        dedupe=options.dedupe,
        max_skipped=Threshold.of(options.max_skipped),
        workers=options.workers,
        rank=options.rank,
        world=options.world,
        watch=report.watch("looking at inputs"),
    )
    notes = {**asdict(counts), "rule": listing.decode.rule, "deduplicated": options.dedupe}
    return _write(options, source, header, listing.class_names, notes, counts)


def _write(
    options: argparse.Namespace,
    source: Source,
    header: Header,
    class_names: tuple[str, ...] = (),
    notes: Mapping[str, Any] | None = None,
    counts: ScanCounts | None = None,
) -> int:
    built = report.Counted("writing shards")
    manifest, new = writer.write(
        options.out,
        source,
        header=header,
        seed=options.seed,
        shard_bytes=math.ceil(options.shard_mb * 2**20),
        class_names=class_names,
        notes=notes,
        layout=options.kept,
        workers=options.workers,
        rank=options.rank,
        world=options.world,
        watch=built,
    )
    sweep.afterwards(options.out)
    seconds = time.monotonic() - options.started
    if options.json:
        facts = {"shards_built": built.count, "seconds": round(seconds, 3)}
        inputs = {} if counts is None else {"inputs": asdict(counts)}
        summary = report.summary(manifest)
        print(json.dumps({"root": options.out, "written": new, **facts, **inputs, **summary}))
        return 0
    status = "wrote" if new else "already there, nothing written:"
    print(f"{status} {report.line(manifest)} in {options.out}, manifest {manifest.hash[:12]}")
    if counts is not None:
        cli.console().print(_table(counts, manifest, built.count, seconds, options))
    return 0


def _table(
    counts: ScanCounts, manifest: Manifest, built: int, seconds: float, options: argparse.Namespace
) -> Table:
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    twins = "left out" if options.dedupe else "kept: --dedupe leaves them out"
    where = f" (see {storage.join(options.out, SKIPPED)})" if counts.skipped else ""
    table.add_row("inputs", f"{counts.listed:,}")
    table.add_row("bad ones" + where, f"{counts.skipped:,}")
    table.add_row(f"duplicates, {twins}", f"{counts.duplicates:,}")
    table.add_row("samples", f"{manifest.count:,}")
    if manifest.classes:
        table.add_row("classes", f"{manifest.classes:,}")
    table.add_row("shards built by this call", f"{built:,} of {len(manifest.shards):,}")
    table.add_row("seconds", f"{seconds:,.1f}")
    return table
