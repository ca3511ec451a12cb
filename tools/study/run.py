"""Trains every arm at equal images as one sweep, measures them, and writes the report.

What was ended goes on where it was by the same command. Arms on the emoji's latents, one seed each, are trained where
these are (`make demo-latents`), and not by --quick.
"""

from __future__ import annotations

import argparse
import sys

from tools.study import report, work
from tools.study.arms import ARMS, Arm

add = report.add


def run(options: argparse.Namespace) -> int:
    study = work.Study.of(options)
    runs = study.train(report.seeds(report.named(options) or _every(options.quick), options))
    return report.write(study, runs, options)


def _every(quick: bool) -> list[Arm]:
    """All arms that there are data for; of emoji no quick study."""
    found = () if quick else work.emoji()
    if not found and not quick:
        text = f"{work.LATENTS} is not there, so emoji are left out: `make demo-latents` makes it"
        print(text, file=sys.stderr)
    return [*ARMS, *found]
