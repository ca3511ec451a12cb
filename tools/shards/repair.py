"""Make a damaged data set whole out of a good copy of it: what `verify` finds is read there and written again.

Every tar's sha256 is compared before it is written. Without a copy, shards of a source that still is what it
was are made again by `make` into an empty folder, byte for byte the same.

example:
  python -m tools.shards repair data/digits --from s3://bucket/digits
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from shards import transfer
from tools.shards import report

HELP = "replace damaged shards out of a good copy"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="folder or s3:// prefix that is damaged")
    parser.add_argument(
        "--from", dest="good", required=True, metavar="COPY", help="a good copy of it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    done = transfer.repair(options.root, options.good, watch=report.watch("reading shards"))
    if options.json:
        print(json.dumps({"root": options.root, "from": options.good, **asdict(done)}))
        return 0
    for name in done.written:
        print(f"written again: {name}")
    print(f"{report.tars(done.kept)} sound, {len(done.written)} written again")
    return 0
