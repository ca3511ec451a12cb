"""Annotations without labels: features, groups, boxes and masks of every sample of a set of shards, as sidecars.

    python -m tools.annotate features data/digits --snapshot RUN --layer 3 --pooling flat --out notes/features
    python -m tools.annotate kmeans data/digits --features notes/features --groups 10 --out notes/kmeans
    python -m launcher.submit experiment=digits_dit guidance=sidecar guidance.ids=notes/kmeans guidance.groups=10

A sidecar is a folder: rows.npy, memory-mapped, one row per sample, and a record of where it came from.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence

from shards import cli

VERBS = ("features", "kmeans", "temi", "bound", "lost", "stego")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.annotate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"tools.annotate.{name}")
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("root", metavar="SHARDS", help="folder or s3:// prefix of shards")
        verb.add_argument("--json", action="store_true", help="one JSON object on stdout")
        module.add(verb)
        verb.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    facts, text = options.run(options)
    print(json.dumps(facts) if options.json else text)
    return 0


if __name__ == "__main__":
    cli.run(main)
