"""Read all of a data set and compare every hash; says what is damaged, and which samples that hits."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from shards.verify import verify
from tools.shards import report

HELP = "read everything, compare every hash"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="folder or s3:// prefix")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    found = verify(options.root, watch=report.watch("reading shards"))
    if options.json:
        print(json.dumps({"root": options.root, "well": not found.problems, **asdict(found)}))
    else:
        for problem in found.problems:
            print(f"damaged: {problem}")
        read = f"{found.samples:,} samples in {report.tars(found.shards)}, {report.size(found.bytes)} read"
        print(f"{read}: {f'{len(found.problems)} problems' if found.problems else 'all well'}")
    return 1 if found.problems else 0
