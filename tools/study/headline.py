"""Label-free with its best guidance against human labels with theirs: same images, same network, several seeds.

How each arm is guided best, and which label-free arm is best, is searched in the same way, in a net that was fitted on
half of the scans; the distances that are reported are those of other samples, in a net that was fitted on the other
half. The interval is Student's, of the differences between runs of one seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shards import cli
from shards.errors import UserError
from tools import drawing, flags
from tools.study import work
from tools.study.arms import CLASS, KMEANS, ONLINE, Arm
from tools.study.blocks import spread
from tools.study.guided import WEIGHTS, Candidates, Guided, Scores, Search, guided, paired
from tools.study.measure import CHOOSES, REPORTS, Half

ARMS = {arm.name: arm for arm in (CLASS, KMEANS, ONLINE)}


def add(parser: argparse.ArgumentParser) -> None:
    work.add(parser, range(5))
    flags.add(
        parser,
        (
            "--arms +",
            tuple(ARMS),
            list(ARMS),
            f"class, and which label-free ones ({' '.join(ARMS)})",
        ),
        (
            "--weights G+",
            float,
            list(WEIGHTS),
            f"guidance weights that are searched ({' '.join(f'{g:g}' for g in WEIGHTS)})",
        ),
        ("--search N", int, 1000, "samples of each point of the search (1000)"),
        ("--samples N", int, 5000, "samples that are reported (5000)"),
    )


def run(options: argparse.Namespace) -> int:
    flags.check_least(options, 20, "search", "samples")
    for weight in options.weights:
        if not 1 < weight < math.inf:
            raise UserError(f"--weights {weight:g}: give weights above 1, which is no guidance")
    arms = [ARMS[name] for name in dict.fromkeys(["class", *options.arms])]
    if len(arms) < 2:
        raise UserError(f"--arms class: name what it is compared with, {', '.join(list(ARMS)[1:])}")
    study = work.Study.of(options)
    runs = study.train(dict.fromkeys(arms, options.seeds))
    search = Search(weights=options.weights, chooses=options.search, reports=options.samples)
    each = guided(
        study.bench, [Candidates.of(arm.name, own, search) for arm, own in runs.items()], search
    )
    found = {arm: each[arm.name] for arm in runs}
    said = summary(found)
    if options.json:
        print(json.dumps(said))
        return 0
    cli.console().print(
        drawing.table("in the net that chose nothing; lower is better", rows(found))
    )
    print("\n".join(sentences(said)))
    return 0


def summary(found: Mapping[Arm, Guided]) -> dict[str, Any]:
    """Every arm's distances, and each label-free one's paired difference with the arm of labels, as JSON."""
    labels = next(each for arm, each in found.items() if not arm.label_free)
    free = {arm: each for arm, each in found.items() if arm.label_free}
    best = min(free, key=lambda arm: free[arm].choice)
    return {
        "best_label_free": best.name,
        "arms": {arm.name: _plain(each) for arm, each in found.items()},
        "differences": {
            arm.name: {
                "guided": _difference(each.best, labels.best),
                "unguided": _difference(each.unguided, labels.unguided),
                "by_guidance": _difference(each.best, each.unguided),
            }
            for arm, each in free.items()
        },
    }


def _plain(each: Guided) -> dict[str, Any]:
    return {
        "guidance": str(each.chosen),
        "searched": {str(guide): _values(scores) for guide, scores in each.searched.items()},
        "unguided": {half: _values([one[half] for one in each.unguided]) for half in _HALVES},
        "guided": {half: _values([one[half] for one in each.best]) for half in _HALVES},
    }


_HALVES: tuple[Half, ...] = (CHOOSES, REPORTS)


def _values(scores: Sequence[Any]) -> list[float]:
    return [score.corrected for score in scores]


def _difference(a: Sequence[Scores], b: Sequence[Scores]) -> dict[str, Any]:
    found = paired([each[REPORTS] for each in a], [each[REPORTS] for each in b])
    said = {"lower": "better", "higher": "worse"}.get(found.verdict, found.verdict)
    return {**asdict(found), "verdict": said}


def rows(found: Mapping[Arm, Guided]) -> list[dict[str, str]]:
    """The table: an arm a row."""
    return [
        {
            "conditioned on": arm.title,
            "unguided": spread([one[REPORTS] for one in each.unguided]),
            "best guidance": str(each.chosen),
            "guided": spread([one[REPORTS] for one in each.best]),
            "each seed": ", ".join(f"{one[REPORTS].corrected:.2f}" for one in each.best),
        }
        for arm, each in found.items()
    ]


def sentences(said: Mapping[str, Any]) -> list[str]:
    """What the differences say, the best label-free arm first."""
    order = sorted(said["differences"], key=lambda name: name != said["best_label_free"])
    lines = []
    for name in order:
        for what in ("guided", "unguided"):
            each = said["differences"][name][what]
            lines.append(
                f"{name} less class, {what}: {each['mean']:+.2f}, 95 % of {each['over']} in "
                f"[{each['low']:+.2f}, {each['high']:+.2f}]: {each['verdict']}"
            )
    return lines
