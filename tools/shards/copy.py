"""Copy a data set between folders and S3. Checksums are verified on the way; LATEST is written last.

An interrupted copy continues where it stopped, and readers do not see a data set before it is complete. Tars that TO
already has, with their record and the right size, are not read again: `verify TO` verifies their checksums, and
`repair TO --from FROM` replaces damaged ones.

examples:
  python -m tools.shards copy data/digits s3://bucket/digits
  python -m tools.shards copy s3://bucket/latents /scratch/latents
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from shards import transfer
from tools import flags
from tools.shards import report, sweep


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("source FROM", str, None, "folder or s3:// prefix that holds the data set"),
        ("target TO", str, None, "folder or s3:// prefix to write"),
        flags.JSON,
    )


def run(options: argparse.Namespace) -> int:
    done = transfer.copy(options.source, options.target, watch=report.watch("copying shards"))
    sweep.afterwards(options.target)
    if report.as_json(options, {"from": options.source, "to": options.target, **asdict(done)}):
        return 0
    kept = f", {report.tars(done.kept)} already there" if done.kept else ""
    print(
        f"copied {report.tars(len(done.written))}, {report.size(done.bytes)}{kept}, to {options.target}, "
        f"manifest {done.manifest[:12]}"
    )
    return 0
