"""Replace the damaged shards of a data set, which `verify` finds, from an intact copy of it.

The sha256 of every tar is verified before it is written. Without a copy, run `make` on the unchanged source into an
empty folder: it writes the same shards, byte for byte.

example:
  python -m tools.shards repair data/digits --from s3://bucket/digits
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from shards import storage, transfer
from tools import flags
from tools.shards import report


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root", metavar="ROOT", help="folder or s3:// prefix of the damaged data set"
    )
    parser.add_argument(
        "--from",
        dest="good",
        type=storage.place,
        required=True,
        metavar="COPY",
        help="folder or s3:// prefix of an intact copy",
    )
    flags.add(parser, flags.JSON)


def run(options: argparse.Namespace) -> int:
    done = transfer.repair(options.root, options.good, watch=report.watch("reading shards"))
    if report.as_json(options, {"root": options.root, "from": options.good, **asdict(done)}):
        return 0
    for name in done.written:
        print(f"written again: {name}")
    print(f"{report.tars(done.kept)} sound, {len(done.written)} written again")
    return 0
