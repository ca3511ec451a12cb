"""Verify checksums: read the whole data set, compare every hash, and list what is damaged and which samples it affects.

For latents that `encode` wrote, --reencode N --source IMAGES also encodes N samples again and prints how far the
stored latents are from the new ones.

examples:
  python -m tools.shards verify data/digits
  python -m tools.shards verify data/digits-latents --reencode 64 --source data/digits
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.verify import verify
from tools import flags
from tools.shards import report

if TYPE_CHECKING:
    from selfguide.data.autoencoders.reencode import Reencoded


def add(parser: argparse.ArgumentParser) -> None:
    report.add_root(parser)
    flags.add(
        parser,
        ("--reencode N", int, None, "also encode N samples of these latents again, and compare"),
        ("--source DIR", str, None, "data set of the images that were encoded"),
        ("--weights PATH", str, None, "weights of the encoder (default: found as by encode)"),
        (
            "--statistics PATH",
            str,
            None,
            "statistics of va_vae's latents (default: found as by encode)",
        ),
        ("--seed", int, 0, "seed that selects the N samples (default 0)"),
    )


def run(options: argparse.Namespace) -> int:
    again = _reencode(options)
    found = verify(options.root, watch=report.watch("reading shards"))
    well = not found.problems and (again is None or again.well)
    if options.json:
        facts = {} if again is None else {"reencoded": {**asdict(again), "well": again.well}}
        print(json.dumps({"root": options.root, "well": well, **asdict(found), **facts}))
    else:
        for problem in found.problems:
            print(f"damaged: {problem}")
        read = f"{found.samples:,} samples in {report.tars(found.shards)}, {report.size(found.bytes)} read"
        print(f"{read}: {f'{len(found.problems)} problems' if found.problems else 'all well'}")
        if again is not None:
            print(
                f"{again.samples:,} encoded again: {again.mean:.2g} standard deviations off on average, at most "
                f"{again.worst:.2g} ({again.worst_key}): {'all well' if again.well else 'other latents'}"
            )
    return 0 if well else 1


def _reencode(options: argparse.Namespace) -> Reencoded | None:
    if options.reencode is None:
        if options.source or options.weights:
            raise UserError("--source and --weights are for --reencode N: say how many samples")
        return None
    if options.source is None:
        raise UserError(
            f"--reencode {options.reencode} without --source: name the data set of images"
        )
    from selfguide.data.autoencoders.reencode import reencode

    return reencode(
        options.root,
        options.source,
        options.reencode,
        seed=options.seed,
        weights=options.weights,
        statistics=options.statistics,
        watch=report.watch("encoding again"),
    )
