"""Trains digits_dit beside its floor and its ceiling at equal images, and draws what self-guidance closes.

    python -m tools.compare                        three seeds each, about 35 minutes on 2 cores; then the table
    python -m tools.compare --figure docs/compare.png      also the picture of the README
    python -m tools.compare --seeds 0 train.images=64_000  shorter; every key=value goes to each submission

Runs that are finished are not trained again, so an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from selfguide.snapshot import load
from shards import cli
from tools import drawing, flags
from tools.study import work
from tools.study.arms import CLASS, ONLINE, UNCONDITIONAL
from tools.study.measure import Bench, Guide, Set
from tools.study.training import Trained

HELP = "digits_dit beside its floor and its ceiling"

FLOOR, OURS, CEILING = "digits_uncond", "digits_dit", "digits_class"
CONDITIONS = {FLOOR: "unconditional", OURS: "its own groups", CEILING: "human labels"}
ARMS = {FLOOR: UNCONDITIONAL, OURS: ONLINE, CEILING: CLASS}
# as evaluation=fd_digits draws them
SAMPLES = Set(0, 5000)


@dataclass(frozen=True)
class Result:
    """How one run samples at its end."""

    experiment: str
    seed: int
    run: str
    scores: dict[str, float]
    # file of its samples
    grid: str


# by experiment, a result each seed
Results = Mapping[str, Sequence[Result]]


def gap_closed(results: Results) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the share of the way from floor to ceiling."""
    scores = {e: [r.scores["fd_digits"] for r in several] for e, several in results.items()}
    mean = {e: statistics.mean(s) for e, s in scores.items()}
    spread = {e: statistics.stdev(s) if len(s) > 1 else 0.0 for e, s in scores.items()}
    closed = (mean[FLOOR] - mean[OURS]) / (mean[FLOOR] - mean[CEILING])
    return {"fd_digits": scores, "mean": mean, "sd": spread, "gap_closed": closed}


def row(experiment: str, results: Sequence[Result], summary: dict[str, Any]) -> dict[str, str]:
    """The experiment's row of the table."""
    scores = [r.scores for r in results]
    nmi = [s["nmi"] for s in scores if "nmi" in s]
    return {
        "experiment": experiment,
        "fd_digits": f"{summary['mean'][experiment]:.2f} ± {summary['sd'][experiment]:.2f}",
        "each seed": ", ".join(f"{s['fd_digits']:.2f}" for s in scores),
        "half vs half": f"{scores[0]['floor']:.2f}",
        "confident": f"{statistics.mean(s['confident'] for s in scores):.1%}",
        "copies": f"{statistics.mean(s['copy_rate'] for s in scores):.1%}",
        "NMI": f"{statistics.mean(nmi):.2f}" if nmi else "",
    }


def plot(results: Results, summary: dict[str, Any], path: Path) -> None:
    """Samples of each experiment's first seed over a bar of its distance, every seed a dot."""
    highest = max(max(s) for s in summary["fd_digits"].values())
    size, heights = (11, 3.2), [1.5, 1]
    with drawing.figure(path, 2, len(results), size=size, height_ratios=heights) as (figure, axes):
        for (above, below), (experiment, several) in zip(axes.T, results.items(), strict=True):
            image = Image.open(several[0].grid)
            above.imshow(image, cmap="gray", interpolation="nearest")
            above.set_title(f"{experiment}: {CONDITIONS[experiment]}", fontsize=12)
            above.axis("off")
            mean, own = summary["mean"][experiment], summary["fd_digits"][experiment]
            colour = "#4c78a8" if experiment == OURS else "#b0b7c0"
            below.barh([0], [mean], color=colour, height=0.5)
            below.plot(own, [0] * len(own), "o", color="black", markersize=4)
            below.set(xlim=(0, highest * 1.25), ylim=(-0.6, 0.6), yticks=[])
            below.set_xlabel("Frechet distance in digit-net features (fd_digits)")
            right = max(mean, *own) + highest * 0.02
            below.text(right, 0, f"{mean:.1f} ± {summary['sd'][experiment]:.1f}", va="center")
            drawing.open_frame(below, "top", "right", "left")
        figure.suptitle(
            f"Self-guidance closes {summary['gap_closed']:.0%} of the gap to human labels, seeing none of them",
            fontsize=14,
        )
    print(f"wrote {path}")


def result(bench: Bench, experiment: str, trained: Trained) -> Result:
    """What the run's last snapshot comes to, as evaluation=fd_digits scores it."""
    snapshot = load(trained.final)
    found = bench.sampled(snapshot, Guide.of(snapshot.config.sampler), SAMPLES)
    groups = bench.groups(snapshot) if experiment == OURS else {}
    scores = {**found.more, **groups}
    return Result(experiment, trained.config.seed, trained.run.root.name, scores, str(found.grid))


def add(parser: argparse.ArgumentParser) -> None:
    work.add(parser, range(3))
    flags.add(parser, ("--figure", Path, None, "write the picture here"))


def run(options: argparse.Namespace) -> int:
    # only the end is compared: a cadence is no part of a run, and evaluations cost training its cores
    study = replace(work.Study.of(options), snapshots=1)
    runs = study.train(dict.fromkeys(ARMS.values(), options.seeds))
    results = {
        experiment: [result(study.bench, experiment, each) for each in runs[arm]]
        for experiment, arm in ARMS.items()
    }
    summary = gap_closed(results)
    if options.json:
        each = [asdict(r) for of_seed in zip(*results.values(), strict=True) for r in of_seed]
        print(json.dumps({**summary, "runs": each}))
    else:
        rows = [row(e, several, summary) for e, several in results.items()]
        cli.console().print(drawing.table("equal images, fd_digits: lower is better", rows))
        cli.console().print(f"gap closed from {FLOOR} to {CEILING}: {summary['gap_closed']:.0%}")
    if options.figure:
        plot(results, summary, options.figure)
    return 0
