"""Index existing WebDataset tars, such as img2dataset's, so that they can be read in place; they are not changed.

Every tar is read once, for its sha256, the xxh3 of each sample, labels, and the exact mean and standard deviation of
the channels; every picture is decoded once, turned and put on --background as by `make`, and counted. The index is
written to the folder of the tars, or to --out with the full paths of the tars. It is then read like any data set,
shuffled in windows, with the same checks. A tar that is damaged or truncated is an error; a sample that does not decode
is left out and listed in skipped.jsonl, and so is what is no sample. An interrupted index continues with the next tar.
A tar on S3 is loaded into memory by the process that reads it.

Samples are not shuffled beforehand: rewrite tars that are sorted by class with `make tars`.
Pictures are decoded each time they are read; use data.decoders processes for that in training. With --image npy,
samples are arrays (C, H, W), which webdataset's decoders read; pickles are refused, because they can run any code.

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
from shards.sources.listing import NO_LABEL, beside
from shards.write import indexing
from shards.write.scan import Threshold
from tools import flags
from tools.shards import report


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("tars TARS+", str, None, "tars, folders or s3:// prefixes of them"),
        ("--out DIR", str, None, "folder of the index (default: the folder of the tars)"),
        (
            "--size",
            int,
            None,
            "resize and centre-crop images to this many pixels a side (default: unchanged)",
        ),
        ("--channels", int, 3, "3 for RGB, 1 for grey (default 3)"),
        (
            "--image EXT",
            str,
            None,
            "extension of the image (default: the first that is one), or of arrays: npy, npz, ten, tb",
        ),
        ("--encoder", str, None, "the arrays are latents of this encoder"),
        ("--scale", float, 1.0, "normalise latents as (x - shift) * scale (default 1)"),
        ("--shift", float, 0.0, "see --scale (default 0)"),
        (
            "--background",
            str,
            "white",
            "colour behind transparent parts, or refuse, which makes them bad samples (default white)",
        ),
        (
            "--label EXT",
            str,
            None,
            "cls, json:field or json:outer.inner, where text is numbered, or none (default: cls if all have one)",
        ),
        ("--prefix-keys", bool, False, "prefix keys with the name of their tar"),
        (
            "--max-skipped N|P%",
            str,
            "0",
            "number or share of bad samples that may be left out (default 0)",
        ),
        ("--workers", int, 1, "worker processes (default 1)"),
        flags.JSON,
    )


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
    pictures = foreign.kind_of(options.image) is None
    decode = Decode(
        picture=Picture(
            size=options.size,
            channels=options.channels,
            background=options.background if pictures else None,
        ),
        image=options.image,
        label=None if label == NO_LABEL else label,
        prefix=options.prefix_keys,
    )
    header = _header(options)
    root, tars = indexing.find(options.tars, options.out)
    read = report.Counted("reading tars")
    manifest, counts, new = indexing.index(
        root,
        tars,
        decode if label == NO_LABEL else indexing.with_label(decode, tars),
        header=header,
        unlabelled=label == NO_LABEL,
        passed=beside(options.tars, ".tar"),
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
    left += (
        f", {counts.passed_over:,} passed over (see skipped.jsonl)" if counts.passed_over else ""
    )
    left += f", {report.changed(counts)}" if counts.changed else ""
    print(
        f"{status} {report.line(manifest)}{left}, in {root}, manifest {manifest.hash[:12]}; "
        f"{read.count:,} of {len(tars):,} tars read by this call in {seconds:,.1f} s"
    )
    report.say_renumbered(manifest)
    return 0
