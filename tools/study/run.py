"""Trains every arm at equal images as one sweep, measures them, and writes the report.

What was ended goes on where it was by the same command. Arms on the emoji's latents, one seed each, are trained where
these are (`make demo-latents`), and not by --quick.
"""

from __future__ import annotations

import argparse
import sys

from tools import flags
from tools.study import report, work
from tools.study.arms import ARMS, BY_NAME, Arm


def add(parser: argparse.ArgumentParser) -> None:
    report.add(parser)
    flags.add(
        parser,
        (
            "--arms +",
            tuple(BY_NAME),
            None,
            "what is trained, a row of the report each (all; of emoji where there are latents)",
        ),
    )


def run(options: argparse.Namespace) -> int:
    study, seeds, search = report.planned(options)
    arms = chosen(options)
    runs = study.train({arm: seeds if arm.data == "digits" else seeds[:1] for arm in arms})
    digits = {arm: each for arm, each in runs.items() if arm.data == "digits"}
    emoji = {arm: each for arm, each in runs.items() if arm.data == "emoji"}
    return report.write(study, digits, emoji, search, options)


def chosen(options: argparse.Namespace) -> list[Arm]:
    """The arms that were named; of none all, those of emoji where their latents are."""
    if options.arms:
        return [BY_NAME[name] for name in dict.fromkeys(options.arms)]
    if options.quick:
        return list(ARMS)
    found = work.emoji()
    if not found:
        text = f"{work.LATENTS} is not there, so emoji are left out: `make demo-latents` makes it"
        print(text, file=sys.stderr)
    return [*ARMS, *found]
