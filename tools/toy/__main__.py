"""Trains a small network on points of the plane along each path and draws how it samples them.

A column a path: how noise travels to data, what Euler's straight steps make of 5, 10 and 50 network evaluations, and
how near several solvers come to the data for how many. The code is the one that trains and samples images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from shards import cli
from shards.errors import UserError
from tools import drawing, flags
from tools.toy.figure import plot
from tools.toy.learn import BATCH, DATA, learn, preset
from tools.toy.measure import (
    EVALUATIONS,
    SAMPLES,
    SOLVERS,
    TRAJECTORIES,
    Measured,
    Reference,
    measure,
)

PATHS = ("rectified_flow", "ddpm", "vp", "ve", "edm")

EPILOG = """examples:
  python -m tools.toy                                    five paths on two data sets, about 10 minutes on one core
  python -m tools.toy --data moons --paths vp edm        two columns, about 2 minutes
  python -m tools.toy --paths rectified_flow sgfm lightning    any preset of configs/path
  python -m tools.toy --images 200_000                   a glance; the networks are not done learning
  python -m tools.toy --out docs/toy.png --json          checkerboard in docs/toy.png, moons in docs/toy-moons.png

D is the energy distance between the samples and as many points of the data, 0 for equal distributions; "off" is the
share of samples where no data is. The same arguments give the same numbers on the same machine.
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.images < BATCH:
        raise UserError(f"--images {options.images} is not one batch; take {BATCH} or more")
    if options.samples < TRAJECTORIES:
        raise UserError(
            f"--samples {options.samples} is too few to draw; take {TRAJECTORIES} or more"
        )
    presets = {name: preset(name) for name in options.paths}  # a wrong name ends here
    torch.set_num_threads(1)  # the nets are too small for more, and sums keep their order
    reports = []
    for data in dict.fromkeys(options.data):
        reference = Reference(data, options.seed, options.samples)
        measured: dict[str, Measured] = {}
        paths: dict[str, dict[str, Any]] = {}
        for name, config in presets.items():
            begun = time.monotonic()
            doing = f"{name} on {data}"
            training = {"images": options.images, "seed": options.seed}
            learned = learn(config, data, **training, doing=f"{doing}: training")
            seconds = round(time.monotonic() - begun, 1)
            found = measured[name] = measure(learned, reference, f"{doing}: sampling")
            scores = [asdict(score) for score in found.scores]
            paths[name] = {"training_seconds": seconds, "scores": scores}
        floor, figure = reference.floor(), options.out
        if data != options.data[0]:  # the name of another picture has its data's name in it
            figure = figure.with_name(f"{figure.stem}-{data}{figure.suffix}")
        plot(measured, reference, floor, figure)
        reports.append(
            {
                "data": data,
                "seed": options.seed,
                "images": options.images,
                "samples": options.samples,
                "floor": floor,
                "figure": str(figure),
                "paths": paths,
            }
        )
        if not options.json:
            title = f"{data}: energy distance D and share off the data; even draws of the data itself {floor:.4f}"
            cli.console().print(drawing.table(title, list(_rows(measured)), names=2))
            print(f"wrote {figure}")
    if options.json:
        print(json.dumps(reports))
    return 0


def _rows(measured: dict[str, Measured]) -> Iterator[dict[str, str]]:
    """A row of the table for each path and solver, a column for each number of evaluations."""
    for name, found in measured.items():
        for solver in SOLVERS:
            own = [s for s in found.scores if s.solver == solver]
            cells = [f"{s.distance:.3f} {s.off:4.0%}" for s in own]
            if solver == "dopri5":  # chooses its own number of evaluations
                cells = [f"{s.evaluations}: {cell}" for s, cell in zip(own, cells, strict=True)]
            heads = map(str, EVALUATIONS)
            yield {"path": name, "solver": solver, **dict(zip_longest(heads, cells, fillvalue=""))}


def _parser() -> argparse.ArgumentParser:
    images = "points each network is trained on (default: 1,500,000, about half a minute)"
    samples = f"how many are compared, best a power of two (default: {SAMPLES:,})"
    return flags.command(
        "tools.toy",
        __doc__,
        (
            "--paths PRESET+",
            str,
            PATHS,
            f"presets of path=, a column each (default: {' '.join(PATHS)})",
        ),
        ("--data +", DATA, DATA, "which points, a picture each (default: both)"),
        ("--images", int, 1_500_000, images),
        ("--samples", int, SAMPLES, samples),
        ("--seed", int, 0, "of weights, data and noise (default: 0)"),
        ("--out", Path, Path("runs/toy.png"), "the picture (default: runs/toy.png)"),
        ("--json", bool, False, "print one JSON list at the end"),
        epilog=EPILOG,
    )


if __name__ == "__main__":
    cli.run(main)
