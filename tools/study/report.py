"""Writes what the study's runs say: a report in Markdown and in HTML, of the runs that have finished.

What has not been measured yet is measured first, and kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from launcher import code_copy
from shards import storage
from shards.errors import UserError
from tools import flags
from tools.study import blocks, document, work
from tools.study.arms import ARMS, BY_NAME, Arm
from tools.study.document import Block, Heading, Paragraph
from tools.study.findings import find_out
from tools.study.guided import Search
from tools.study.measure import Bench, cores

TITLE = "How far can a model guide itself?"


def add(parser: argparse.ArgumentParser) -> None:
    work.add(parser, range(3))
    flags.add(
        parser,
        ("--quick", bool, False, "one seed, one weight of guidance, fewer samples and probes"),
        (
            "--arms +",
            tuple(BY_NAME),
            None,
            "rows of the report (all; of emoji where there are latents)",
        ),
    )


def run(options: argparse.Namespace) -> int:
    arms = named(options) or [*ARMS, *work.emoji()]
    study = work.Study.of(options)
    return write(study, study.known(seeds(arms, options)), options)


def named(options: argparse.Namespace) -> list[Arm]:
    """The arms that were asked for."""
    return [BY_NAME[name] for name in dict.fromkeys(options.arms or ())]


def seeds(arms: Sequence[Arm], options: argparse.Namespace) -> dict[Arm, list[int]]:
    """Of each arm; one on the emoji."""
    several = options.seeds[:1] if options.quick else options.seeds
    return {arm: several if arm.data == "digits" else several[:1] for arm in arms}


def searched(options: argparse.Namespace) -> Search:
    """What guidance is searched, and with how many samples."""
    if options.quick:
        return Search(weights=(1.5,), reports=1000, probes_through=False)
    return Search(weights=(1.3, 2.0))


def write(study: work.Study, runs: work.Runs, options: argparse.Namespace) -> int:
    """Measures what is missing, writes report.md and report.html, and says where they are.

    Raises:
        UserError: no arm has finished.
    """
    if not runs:
        raise UserError(f"no arm has finished in {study.runs}: give `python -m tools.study run`")
    digits, emoji = (
        {arm: own for arm, own in runs.items() if arm.data == data} for data in ("digits", "emoji")
    )
    search = searched(options)
    found, left_out = find_out(study.bench, digits, search)
    folder = study.out.absolute()
    whole: list[Block] = [
        Heading(TITLE, 1),
        Paragraph(_about(options, search, study.bench)),
        *(Paragraph(f"{name} is left out: {why}.") for name, why in left_out.items()),
        *(blocks.of_digits(found, folder) if found else ()),
        *blocks.of_emoji(emoji),
        *blocks.of_training(runs),
    ]
    files = {
        "markdown": (folder / "report.md", document.markdown(whole, folder)),
        "html": (folder / "report.html", document.page(whole, TITLE)),
    }
    for file, text in files.values():
        storage.publish(file, text.encode(), replace=True)
    if options.json:
        print(json.dumps({name: str(file) for name, (file, _) in files.items()}))
    else:
        print(*(file for file, _ in files.values()), sep="\n")
    return 0


def _about(options: argparse.Namespace, search: Search, bench: Bench) -> str:
    """By which command, of which commit, on which machine, when, with what search and in what time."""
    arms = ["--arms", *options.arms] if options.arms else []
    places = ["--runs", str(options.runs), "--out", str(options.out)]
    quick = ["--quick"] if options.quick else []
    words = [options.verb, *arms, "--seeds", *map(str, options.seeds), *quick, *places]
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        f"`{shlex.join(['python', '-m', 'tools.study', *words, *options.overrides])}`, commit {_commit()}, {day}, "
        f"{_processor()}, {cores()} cores, Python {platform.python_version()}, torch {torch.__version__}. Guidance is "
        f"searched over weights {', '.join(f'{g:g}' for g in search.weights)} with {search.chooses:,} samples, and "
        f"reported with {search.reports:,}. What is measured here took {sum(bench.seconds.values()) / 60:.0f} minutes "
        "of one process in all, whenever that was."
    )


def _commit() -> str:
    found = code_copy.git(Path(__file__).parents[2])
    if not found:
        return "of an installation"
    return found["revision"][:8] + ("-dirty" if found["dirty"] else "")


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines: Sequence[str] = file.read_text().splitlines() if file.exists() else ()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
