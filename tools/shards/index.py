"""Read WebDataset tars of others where they lie, such as img2dataset's: an index is written, the tars stay as they are.

Every tar is read once: its sha256, the xxh3 of each sample, a decode of each picture, labels, and the channels' exact
mean and deviation. The index goes into the tars' own folder, or to --out, which then names the tars by their full
paths. What is there is read as every data set, shuffled in windows, and checked as strictly. A tar that is
damaged or cut short is an error; a sample that does not decode is left out and told in skipped.jsonl. What was
interrupted goes on behind the tars that are done. A tar on S3 is held in memory by the process that reads it.

Nothing is shuffled before: tars whose samples are sorted by class should be written anew with `make tars`.
Pictures are decoded each time they are read; give training data.decoders processes for that. Samples may be arrays
(C, H, W) as well, --image npy, which webdataset's decoders read; pickles are not read, as they may run any code.

examples:
  python -m tools.shards index laion/ --size 256 --workers 8
  python -m tools.shards index s3://bucket/cc12m --label json:class --prefix-keys --out data/cc12m --size 64
  python -m tools.shards index latents/ --image npy --encoder sd_vae --scale 0.18215
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from shards.errors import UserError
from shards.format import foreign_arrays as foreign
from shards.format.header import PIXELS, Header
from shards.format.members import Decode
from shards.format.pictures import Picture
from shards.write import indexing
from shards.write.scan import Threshold
from tools.shards import report

HELP = "read other people's WebDataset tars where they lie"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tars", nargs="+", metavar="TARS", help="tars, folders or s3:// prefixes of them"
    )
    parser.add_argument("--out", metavar="DIR", help="where the index goes (the tars' folder)")
    parser.add_argument(
        "--size", type=int, help="pixels a side, by box, bicubic and centre crop; none: as they are"
    )
    parser.add_argument("--channels", type=int, default=3, help="3 RGB, 1 grey (3)")
    parser.add_argument(
        "--image",
        metavar="EXT",
        help="extension of the image, the first that is one; or of arrays: npy, npz, ten, tb",
    )
    parser.add_argument("--encoder", help="arrays are latents, and this is what encoded them")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of latents: (x - shift) * scale (1)"
    )
    parser.add_argument("--shift", type=float, default=0.0, help="(0)")
    parser.add_argument(
        "--label", metavar="EXT", help="cls or json:field; cls where the first sample has one"
    )
    parser.add_argument(
        "--prefix-keys", action="store_true", help="put each tar's name before its keys"
    )
    parser.add_argument(
        "--max-skipped", default="0", metavar="N|P%", help="bad samples to put up with (0)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _header(options: argparse.Namespace) -> Header:
    """What the numbers are; refuses options that say nothing of them."""
    arrays = foreign.kind_of(options.image) is not None
    if arrays and (options.size is not None or options.channels != 3):
        raise UserError("--size and --channels are for pictures: arrays are taken as they are")
    if options.encoder is not None:
        if not arrays:
            raise UserError(
                f"--encoder {options.encoder}: name the arrays that hold latents, such as --image npy"
            )
        return Header(
            kind="latent", shift=options.shift, scale=options.scale, encoder=options.encoder
        )
    if (options.scale, options.shift) != (1.0, 0.0):
        raise UserError("--scale and --shift are for latents: give --encoder NAME")
    return PIXELS


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    label = options.label
    if label is not None and label.endswith(":"):
        raise UserError(f"--label {label}: name the field, such as json:class")
    decode = Decode(
        picture=Picture(size=options.size, channels=options.channels),
        image=options.image,
        label=label,
        prefix=options.prefix_keys,
    )
    header = _header(options)
    root, tars = indexing.find(options.tars, options.out)
    read = report.Counted("reading tars")
    manifest, counts, new = indexing.index(
        root,
        tars,
        indexing.with_label(decode, tars),
        header=header,
        max_skipped=Threshold.of(options.max_skipped),
        workers=options.workers,
        watch=read,
    )
    seconds = round(time.monotonic() - started, 3)
    if options.json:
        facts = {"root": root, "written": new, "tars_read": read.count, "seconds": seconds}
        print(json.dumps({**facts, "inputs": asdict(counts), **report.summary(manifest)}))
        return 0
    status = "indexed" if new else "already there, nothing written:"
    left = f", {counts.skipped:,} left out (see skipped.jsonl)" if counts.skipped else ""
    print(
        f"{status} {report.line(manifest)}{left}, in {root}, manifest {manifest.hash[:12]}; "
        f"{read.count:,} of {len(tars):,} tars read by this call in {seconds:,.1f} s"
    )
    return 0
