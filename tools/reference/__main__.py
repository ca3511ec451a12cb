"""References and weights of evaluations.

A reference is the mean and covariance of real images' features under one protocol, in one .npz that also says how it
was made, how far its halves are from each other, and holds the features of 10,000 images for precision and recall.

examples:
  python -m tools.reference make data/in1k --protocol fid_adm --out in1k.npz
  python -m tools.reference make data/val --protocol fd_effnet --out val.npz --json
  srun sh -c 'python -m tools.reference make ... --rank $SLURM_PROCID --world $SLURM_NTASKS'
  python -m tools.reference samples RUN --protocol fd_effnet --out uncond.npz
  python -m tools.reference fetch inception --out /project/weights
  python -m tools.reference fetch VIRTUAL_imagenet256_labeled.npz
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from shards import cli
from tools import flags
from tools.verbs import parse

VERBS = {
    "make": "mean and covariance of real images' features, from any shards",
    "samples": "mean and covariance of a run's samples, for uFID",
    "fetch": "download weights or a published reference, on a machine with a network",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(
        "tools.reference", __doc__, VERBS, argv, lambda verb: flags.add(verb, flags.JSON)
    )
    found, text = options.run(options)
    print(json.dumps(found, indent=1) if options.json else text)
    return 0


if __name__ == "__main__":
    cli.run(main)
