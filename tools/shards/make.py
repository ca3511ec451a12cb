"""Write a data set as WebDataset shards, from files of any usual kind.

Every input is read and decoded once before the first shard is written. Bad inputs are listed in skipped.jsonl with the
reason, and are an error if there are more than --max-skipped; files that are no inputs are passed over, counted and
listed there too. Images are decoded by Pillow, as RGB: turned as their EXIF orientation says, transparent parts on
--background, 16 bits a channel rounded to 8, the first frame of several; each is counted. --size N halves an image by
a box filter while its short side is at least 2N, brings it to N by a bicubic one and crops it about its centre
(Dhariwal and Nichol 2021). Pixels are uint8, and a model sees (x - 127.5) / 127.5.

Pictures are stored one sample per key: a PNG with --size, otherwise the unchanged bytes of the input, with the label in
.cls and the key in .id.txt; emoji say in .json what they are. They are decoded every time they are read
(data.decoders). --layout blocks stores decoded pixels instead, 256 samples in one member: it takes more space and reads
many times faster, which suits pictures of up to about 64 pixels. Arrays (cifar, numpy) are always stored in blocks.

A killed make continues when the same command is run again; if everything is there, nothing is written.
Several nodes may write one data set together without waiting for each other:
  srun sh -c 'python -m tools.shards make ... --rank $SLURM_PROCID --world $SLURM_NTASKS'

examples:
  python -m tools.shards make folder imagenet/train --size 256 --workers 16 --out s3://data/in1k-256
  python -m tools.shards make folder imagenet/train --only imagenet100.txt --size 64 --out data/in100-64
  python -m tools.shards make cifar cifar-10-python.tar.gz --out data/cifar10
  python -m tools.shards make downsampled Imagenet32_train --out data/in32
  python -m tools.shards make tars laion/ --size 64 --max-skipped 1% --dedupe --out data/laion64
  python -m tools.shards make lightningdit extracted/ --weights vavae.pt --dtype float16 --out data/in1k-va
  python -m tools.shards make digits --out data/digits
  python -m tools.shards make emoji --out data/emoji
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from shards import storage
from shards.errors import UserError
from shards.format.header import Header
from shards.format.manifest import Layout
from shards.format.pictures import Picture
from shards.sources import arrays, emoji, folders, tables, tars
from shards.sources.emoji import Label, OnWhite
from shards.sources.lightningdit import lightningdit
from shards.sources.listing import Listing, Raw, file
from shards.sources.made import LATENT_SCALE, SyntheticSource, digits_source
from shards.sources.source import Source
from shards.write.scan import Threshold
from tools import flags
from tools.shards import debian, report
from tools.shards.writing import write_listing, write_source

# versions of Debian 12
EMOJI = (
    debian.Package(
        name="fonts-noto-color-emoji",
        version="2.042-0+deb12u1",
        sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        file="usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    ),
    debian.Package(
        name="unicode-data",
        version="15.0.0-1",
        sha256="5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc",
        file="usr/share/unicode/emoji/emoji-test.txt",
    ),
)


def add(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="SOURCE", dest="kind")
    _add_pictures(kinds)
    _add_arrays(kinds)
    _kind(
        kinds,
        "digits",
        "scikit-learn's 1,797 scans of handwritten digits, 1 x 8 x 8",
        lambda o: _write_made(o, *digits_source()),
    )
    parser = _kind(
        kinds,
        "emoji",
        "1,870 emoji in colour, from Debian's Noto font (OFL) and Unicode's list, in 9 groups and 99 subgroups",
        _emoji,
        ("--size", int, 32, "pixels a side, of the font's 128 (default 32)"),
        ("--label", get_args(Label), "group", "what a class is (default group)"),
        ("--font FILE", str, None, "NotoColorEmoji.ttf (default: of Debian's package)"),
        ("--emoji-test FILE", str, None, "Unicode's emoji-test.txt (default: of Debian's package)"),
    )
    _add_layout(parser)
    _kind(
        kinds,
        "synthetic",
        "Gaussian noise in the shape of latents",
        _synthetic,
        ("--count", int, 1024, "number of samples (default 1024)"),
        ("--shape C H W", int, (4, 32, 32), ""),
        ("--classes", int, 1000, "number of classes, 0 for no labels (default 1000)"),
        ("--dtype", ("float16", "float32"), "float16", ""),
    )


def _add_pictures(kinds: Any) -> None:
    """Sources of encoded images."""
    made: dict[str, tuple[str, Callable[[argparse.Namespace, Picture], Listing]]] = {
        "folder": ("images in one folder a class (ImageFolder), or in one folder", _folder),
        "tars": (
            "WebDataset tars, such as img2dataset's",
            lambda o, picture: tars.tars(
                o.paths, picture, image=o.image, label=o.label, prefix=o.prefix_keys
            ),
        ),
        "parquet": (
            "parquet files with a column of images",
            lambda o, picture: tables.parquet(
                o.paths, picture, image=o.image, label=o.label, key=o.key, split=o.split
            ),
        ),
        "dataset": (
            "a data set that Hugging Face's save_to_disk wrote",
            lambda o, picture: tables.saved_dataset(
                o.path, picture, image=o.image, label=o.label, key=o.key, split=o.split
            ),
        ),
        "lsun": ("an LSUN category's LMDB", lambda o, picture: folders.lsun(o.path, picture)),
        "voc": ("a year of Pascal VOC", lambda o, picture: folders.voc(o.path, o.split, picture)),
        "coco": (
            "a COCO folder: annotations/ beside train2017/, val2017/",
            lambda o, picture: folders.coco(o.path, o.split, picture),
        ),
    }
    parsers = {
        name: _kind(kinds, name, text, partial(_list_pictures, make))
        for name, (text, make) in made.items()
    }
    for name, parser in parsers.items():
        several = name in ("tars", "parquet")
        parser.add_argument("paths" if several else "path", nargs="+" if several else None)
        flags.add(
            parser,
            (
                "--size",
                int,
                None,
                "resize and centre-crop images to this many pixels a side (default: unchanged)",
            ),
            ("--channels", int, 3, "3 for RGB, 1 for grey (default 3)"),
            (
                "--background",
                str,
                "white",
                "colour behind transparent parts, or refuse, which makes them bad inputs (default white)",
            ),
        )
        _add_layout(parser)
    for name in ("tars", "parquet", "dataset"):
        field = "extension" if name == "tars" else "column"
        known = "cls or json:FIELD; cls" if name == "tars" else "label"
        flags.add(
            parsers[name],
            ("--image", str, None, f"{field} of the image (default: the only one that can be)"),
            ("--label", str, None, f"{field} of the label, or none ({known} if all have one)"),
        )
    key: flags.Flag = ("--key", str, None, "column of keys (default: row numbers)")
    own: dict[str, tuple[flags.Flag, ...]] = {
        "tars": (("--prefix-keys", bool, False, "prefix keys with the name of their tar"),),
        "parquet": (key, ("--split", str, None, "of a folder of several splits: which one")),
        "dataset": (key, ("--split", str, None, "split of a saved DatasetDict")),
        "voc": (("--split", str, "trainval", "split (default trainval)"),),
        "coco": (("--split", str, "train2017", "split (default train2017)"),),
    }
    for name, its_own in own.items():
        flags.add(parsers[name], *its_own)


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        dest="kept",
        choices=get_args(Layout),
        default="samples",
        help="samples: one encoded picture per key; blocks: arrays of 256 decoded pictures (default samples)",
    )


def _add_arrays(kinds: Any) -> None:
    """Sources whose samples are arrays."""
    path: flags.Flag = ("path", str, None, "")
    _kind(
        kinds,
        "cifar",
        "CIFAR-10 or CIFAR-100, the published tar.gz for Python",
        lambda o: write_listing(o, arrays.cifar(o.path, o.split, o.labels)),
        path,
        ("--split", ("train", "test"), "train", "(default train)"),
        (
            "--labels",
            get_args(arrays.CifarLabels),
            "fine",
            "CIFAR-100's 100 classes, or its 20 superclasses (default fine)",
        ),
    )
    _kind(
        kinds,
        "downsampled",
        "Downsampled ImageNet as released: a batch, or a folder of train_data_batch_1 to _10",
        lambda o: write_listing(o, arrays.downsampled(o.path)),
        path,
    )
    _kind(
        kinds,
        "numpy",
        "a .npy or .npz of images or latents, (N, C, H, W) or (N, H, W, C)",
        _numpy,
        path,
        ("--x", str, None, "array of a .npz that holds the samples (default: its first)"),
        ("--y", str, None, "array of a .npz that holds the labels (default: none)"),
        ("--layout", ("nchw", "nhwc"), None, "axes of the array, where its shape does not say"),
        ("--encoder", str, None, "the values are latents of this encoder"),
        (
            "--scale",
            float,
            None,
            "normalise latents as (x - shift) * scale; needs --encoder (default 1)",
        ),
        ("--shift", float, None, "see --scale (default 0)"),
    )
    _kind(
        kinds,
        "lightningdit",
        "latents that LightningDiT extracted: a folder of .safetensors",
        _latents,
        path,
        (
            "--statistics FILE",
            str,
            None,
            "mean and std of the latents (default PATH/latents_stats.pt)",
        ),
        ("--encoder NAME", str, "va_vae", "encoder of the latents (default va_vae)"),
        (
            "--weights FILE",
            str,
            None,
            "weights of the encoder; their sha256 is recorded, and only they decode the latents",
        ),
        ("--classes", int, None, "number of classes (default: the greatest label + 1)"),
        ("--dtype", ("float16", "float32"), None, "dtype to store (default: unchanged)"),
    )


def _kind(
    kinds: Any,
    name: str,
    text: str,
    make: Callable[[argparse.Namespace], int],
    *own: flags.Flag,
) -> argparse.ArgumentParser:
    """The parser of a source, with the flags of all and those of its own."""
    parser = kinds.add_parser(name, help=text, description=text)
    flags.add(
        parser,
        ("--seed", int, 0, "seed of the shuffle before writing (default 0)"),
        ("--workers", int, 1, "worker processes (default 1)"),
    )
    report.add_out(parser)
    flags.add(
        parser,
        ("--dedupe", bool, False, "leave out inputs with the same bytes as an earlier one"),
        (
            "--max-skipped N|P%",
            str,
            "0",
            "number or share of bad inputs that may be left out (default 0)",
        ),
        (
            "--only FILE",
            str,
            None,
            "keep the classes or keys that a text file names, one a line; classes get the numbers of their lines",
        ),
        (
            "--per-class RULE",
            str,
            None,
            "keep the first N of each class, or by class//N the first floor(c / N) of class c",
        ),
        *own,
    )
    parser.set_defaults(make=make, kept="blocks")
    return parser


def run(options: argparse.Namespace) -> int:
    report.shard_bytes(options)
    Threshold.of(options.max_skipped)
    options.started = time.monotonic()
    return options.make(options)


def _list_pictures(
    make: Callable[[argparse.Namespace, Picture], Listing], options: argparse.Namespace
) -> int:
    picture = Picture(size=options.size, channels=options.channels, background=options.background)
    return write_listing(options, make(options, picture))


def _folder(options: argparse.Namespace, picture: Picture) -> Listing:
    inside = not storage.is_remote(options.out) and Path(options.out).resolve()
    if inside and inside.is_relative_to(Path(options.path).resolve()):
        raise UserError(
            f"--out {options.out} lies in {options.path}, where a folder is a class: name a place beside it"
        )
    return folders.image_folder(options.path, picture)


def _emoji(options: argparse.Namespace) -> int:
    given = (options.font, options.emoji_test)
    if None not in given:
        return _list_emoji(options, *given)
    if given != (None, None):
        raise UserError("--font and --emoji-test belong together: give both, or neither")
    with debian.files(EMOJI, "give --font NotoColorEmoji.ttf --emoji-test emoji-test.txt") as files:
        return _list_emoji(options, *map(str, files))


def _list_emoji(options: argparse.Namespace, font: str, emoji_test: str) -> int:
    listing = emoji.emoji(font, emoji_test, OnWhite(size=options.size), label=options.label)
    return write_listing(options, listing, notes=emoji.provenance(font, emoji_test))


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
        return write_listing(options, listing)
    header = Header(kind="latent", encoder=options.encoder, **normal)
    return write_listing(options, listing, header)


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
    return write_listing(options, listing, header)


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
    return _write_made(options, source, header)


def _write_made(options: argparse.Namespace, source: Source, header: Header) -> int:
    """Of a source without bad inputs: looked at first only where a part of it is wanted."""
    if options.dedupe or options.only is not None or options.per_class is not None:
        return write_listing(options, Listing.of_source(source), header)
    return write_source(options, source, header)
