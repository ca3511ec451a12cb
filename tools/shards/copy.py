"""Copy a data set between folders and S3; every tar's sha256 is compared on the way, the pointer comes last.

What was interrupted goes on where it stopped, and a data set that is only half there is none to its readers. Tars
that lie in TO with their record and size are taken for finished and not read: `verify TO` reads them, and
`repair TO --from FROM` mends what it finds.

examples:
  python -m tools.shards copy data/digits s3://bucket/digits
  python -m tools.shards copy s3://bucket/latents /scratch/latents
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from shards import transfer
from tools.shards import report, sweep

HELP = "copy a data set between folders and S3, verified"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="FROM", help="folder or s3:// prefix that holds the data set"
    )
    parser.add_argument("target", metavar="TO", help="folder or s3:// prefix to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    done = transfer.copy(options.source, options.target, watch=report.watch("copying shards"))
    sweep.afterwards(options.target)
    if options.json:
        print(json.dumps({"from": options.source, "to": options.target, **asdict(done)}))
        return 0
    kept = f", {report.tars(done.kept)} already there" if done.kept else ""
    print(
        f"copied {report.tars(len(done.written))}, {report.size(done.bytes)}{kept}, to {options.target}, "
        f"manifest {done.manifest[:12]}"
    )
    return 0
