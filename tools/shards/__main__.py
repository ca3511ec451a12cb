"""Write data sets as WebDataset shards, check them, look at them.

examples:
  python -m tools.shards make digits --out data/digits
  python -m tools.shards make folder imagenet/train --size 256 --workers 16 --out s3://bucket/in1k-256
  python -m tools.shards make synthetic --out data/latents --count 1024 --shape 4 32 32 --classes 1000
  python -m tools.shards verify data/digits
  python -m tools.shards stats data/digits --json
  python -m tools.shards explain data/digits --images 40960 --batch 64
  python -m tools.shards copy data/digits s3://bucket/digits
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from shards import cli

# each a module here: HELP, add(parser), run(options) -> exit code
VERBS = (
    *("make", "copy", "verify", "repair", "diff"),
    *("stats", "inspect", "explain", "simulate"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"tools.shards.{name}")
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add(verb)
        verb.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    cli.run(main)
