"""`python -m tools.score FOLDER|NPZ --protocol P`: anybody's samples, by the code that scores ours.

FOLDER holds PNG or other lossless images of one size; in a .npz the first array is taken, or arr_0, uint8 (N, H, W, C)
as ADM writes samples. They are compared with a reference that `python -m tools.reference make` wrote, with ADM's or
clean-fid's, or with shards of real images, whose reference is made first and kept in .references. A killed command goes
on where it was, from parts in .scores. With --as NAME the scores are kept beside the runs, in .others, and stand on the
board below the runs that were measured alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from selfguide.spec.config.evaluation import Extra
from selfguide.spec.extras import OF_MODELS
from shards import cli
from shards.errors import UserError
from tools import flags, score_others
from tools.feature_flags import NET

EPILOG = """examples:
  python -m tools.score samples.npz --protocol fid_adm --reference VIRTUAL_imagenet256_labeled.npz
  python -m tools.score samples/ --protocol fd_effnet --shards data/val --json
  python -m tools.score samples/ --protocol fid_clean --reference in1k.npz --weights pt_inception.pth
  python -m tools.score samples/ --protocol fd_effnet --shards data/train --metrics kid ood_auroc \\
    --setting kid_size=500 test=data/test
  python -m tools.score adm_g.npz --protocol fid_adm --reference VIRTUAL_imagenet256_labeled.npz --as ADM-G \\
    --note "guidance 1.5, published samples" && python -m launcher.board ls
"""
# further metrics that need no model
METRICS = tuple(name for name in get_args(Extra) if name not in OF_MODELS)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 1, "batch")
    if not options.reference and not options.shards:
        raise UserError("nothing to compare with: give --reference FILE or --shards ROOT")
    if options.reference and options.shards:
        raise UserError(
            f"--reference {options.reference} and --shards {options.shards}: give one of them to compare with"
        )
    score_others.check(options)
    # torch takes seconds to import: not for help or a mistake
    from tools import score_run

    return score_run.run(options)


def _parser() -> argparse.ArgumentParser:
    return flags.command(
        "tools.score",
        __doc__,
        ("samples", str, None, "a folder of images, or a .npz"),
        *NET,
        (
            "--reference FILE",
            str,
            None,
            "compare with a .npz of mean and covariance; this or --shards",
        ),
        ("--shards ROOT", str, None, "compare with these shards of real images"),
        ("--metrics M+", METRICS, (), f"to measure beside: {', '.join(METRICS)} (none)"),
        ("--setting KEY=VALUE+", str, (), "of a metric or a reference, as evaluation.KEY of a run"),
        ("--as NAME", str, None, "keep the scores beside the runs under this name (not kept)"),
        ("--runs DIR", flags.here, "runs", "with --as: where runs are (runs)"),
        ("--note TEXT", str, "", "with --as: what else is to be known of the samples"),
        flags.JSON,
        epilog=EPILOG,
    )


if __name__ == "__main__":
    cli.run(main)
