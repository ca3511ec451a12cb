"""Writes what the study's runs say: a report in Markdown and in HTML, of the runs that have finished.

What has not been measured yet is measured first, and kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from launcher import code_copy
from shards import cli, storage
from shards.errors import UserError
from tools import flags
from tools.study import blocks, document, work
from tools.study.arms import ARMS
from tools.study.document import Block, Heading, Paragraph
from tools.study.findings import find_out
from tools.study.guided import Search


def add(parser: argparse.ArgumentParser) -> None:
    work.add(parser, range(3))
    flags.add(
        parser, ("--quick", bool, False, "one seed, fewer weights of guidance, fewer samples")
    )


def run(options: argparse.Namespace) -> int:
    study, seeds, search = planned(options)
    return write(
        study, study.known(ARMS, seeds), study.known(work.emoji(), seeds[:1]), search, options
    )


def planned(options: argparse.Namespace) -> tuple[work.Study, list[int], Search]:
    """The study, its seeds, and what guidance is searched."""
    study = work.Study.of(options)
    if options.quick:
        return study, options.seeds[:1], Search(weights=(1.5,), reports=1000)
    return study, options.seeds, Search(weights=(1.3, 2.0))


def write(
    study: work.Study,
    digits: work.Runs,
    emoji: work.Runs,
    search: Search,
    options: argparse.Namespace,
) -> int:
    """Measures what is missing, writes report.md and report.html, and says where they are.

    Raises:
        UserError: no arm has finished.
    """
    if not digits and not emoji:
        raise UserError(f"no arm has finished in {study.runs}: give `python -m tools.study run`")
    began = time.monotonic()
    found = {}
    for arm, runs in digits.items():
        cli.console(stderr=True).print(f"measuring {arm.name}, {len(runs)} runs")
        found[arm.name] = find_out(study.bench, arm, runs, search)
    about = _about(options, search, time.monotonic() - began)
    folder = study.out.absolute()
    whole: list[Block] = [
        Heading("How far can a model guide itself?", 1),
        Paragraph(about),
        *(blocks.of_digits(found, folder) if found else ()),
        *blocks.of_emoji(emoji),
    ]
    files = {
        "markdown": (folder / "report.md", document.markdown(whole, folder)),
        "html": (folder / "report.html", document.page(whole, "How far can a model guide itself?")),
    }
    for file, text in files.values():
        storage.publish(file, text.encode(), replace=True)
    if options.json:
        print(json.dumps({name: str(file) for name, (file, _) in files.items()}))
    else:
        print(*(file for file, _ in files.values()), sep="\n")
    return 0


def _about(options: argparse.Namespace, search: Search, seconds: float) -> str:
    """By which command, of which commit, on which machine, when, with what search and in what time."""
    arms = ["--arms", *options.arms] if getattr(options, "arms", None) else []
    places = ["--runs", str(options.runs), "--out", str(options.out)]
    quick = ["--quick"] if options.quick else []
    words = [options.verb, *arms, "--seeds", *map(str, options.seeds), *quick, *places]
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        f"`{shlex.join(['python', '-m', 'tools.study', *words, *options.overrides])}`, commit {_commit()}, {day}, "
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}. Guidance is searched over weights {', '.join(f'{g:g}' for g in search.weights)} with "
        f"{search.chooses:,} samples, and reported with {search.reports:,}. Measuring took {seconds / 60:.0f} minutes, "
        "without what had been kept."
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
