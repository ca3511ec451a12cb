"""Write, verify and inspect data sets of WebDataset shards.

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

from collections.abc import Sequence

from shards import cli
from tools import verbs

# each a module here: HELP, add(parser), run(options) -> exit code
VERBS = (
    *("make", "encode", "index", "copy", "verify", "repair", "diff"),
    *("stats", "inspect", "explain", "simulate", "sweep"),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = verbs.parse("tools.shards", __doc__, VERBS, argv)
    return options.run(options)


if __name__ == "__main__":
    cli.run(main)
