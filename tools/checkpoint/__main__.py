"""Verify, list and export the checkpoints of a run, and make averages of any length from what it stored.

RUN is a run's folder, its id or the beginning of it, or its name; `verify`, `show` and `export` also take the folder of
one checkpoint, wherever it was copied, and `verify` and `show` the s3:// address of either in a store.

examples:
  python -m tools.checkpoint verify runs/in1k_dit/3f2a
  python -m tools.checkpoint show 3f2a
  python -m tools.checkpoint export 3f2a --out weights
  python -m tools.checkpoint ema 3f2a --std 0.07 --out ema-0.07
  python -m tools.checkpoint pin 3f2a --images 512000
  python -m tools.checkpoint pin 3f2a --images 512000 --snapshot
"""

from __future__ import annotations

from collections.abc import Sequence

from shards import cli
from tools import verbs

# each a module here: add(parser), run(options) -> exit code
VERBS = {
    "verify": "compare every file with its hash",
    "show": "list images, attempts, ranks, engine, averages",
    "export": "write whole fp32 weights and averages as safetensors",
    "ema": "make an average of any length from stored ones",
    "pin": "keep a checkpoint or a snapshot from retention",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = verbs.parse("tools.checkpoint", __doc__, VERBS, argv)
    return options.run(options)


if __name__ == "__main__":
    cli.run(main)
