"""Trains a model of its own groups beside its floor and its ceiling at equal images, and draws what it closes.

    python -m tools.compare                            digits_dit, three seeds each, about 35 minutes on 2 cores
    python -m tools.compare --figure docs/compare.png  also the picture of the README
    python -m tools.compare --seeds 0 train.images=64_000   shorter; every key=value goes to each submission
    python -m tools.compare --data emoji --seeds 0 1   emoji_dit, on latents that `make compare-latents` makes first

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

from selfguide.spec.records import records
from shards import cli
from shards.errors import UserError
from tools import drawing, flags
from tools.study import work
from tools.study.arms import BY_NAME, CLASS, ONLINE, UNCONDITIONAL, Arm
from tools.study.measure import Bench, Guide, Set, Wanted, loaded
from tools.study.training import Trained

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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Three experiments on the same images: the floor is unconditional, the ceiling conditioned on human labels."""

    data: str
    # floor, ours and ceiling
    arms: tuple[Arm, Arm, Arm]
    metric: str
    # what the metric is, in words
    axis: str

    @property
    def floor(self) -> str:
        return f"{self.data}_uncond"

    @property
    def ours(self) -> str:
        return f"{self.data}_dit"

    @property
    def ceiling(self) -> str:
        return f"{self.data}_class"

    @property
    def by_experiment(self) -> dict[str, Arm]:
        return dict(zip((self.floor, self.ours, self.ceiling), self.arms, strict=True))

    @property
    def conditions(self) -> dict[str, str]:
        """In words."""
        return {
            self.floor: "unconditional",
            self.ours: "its own groups",
            self.ceiling: "human labels",
        }

    def gap_closed(self, results: Results) -> dict[str, Any]:
        """Mean and standard deviation over seeds, and the share of the way from floor to ceiling."""
        scores = {e: [r.scores[self.metric] for r in several] for e, several in results.items()}
        mean = {e: statistics.mean(s) for e, s in scores.items()}
        spread = {e: statistics.stdev(s) if len(s) > 1 else 0.0 for e, s in scores.items()}
        closed = (mean[self.floor] - mean[self.ours]) / (mean[self.floor] - mean[self.ceiling])
        return {self.metric: scores, "mean": mean, "sd": spread, "gap_closed": closed}

    def row(
        self, experiment: str, results: Sequence[Result], summary: dict[str, Any]
    ) -> dict[str, str]:
        """The experiment's row of the table; of what was not measured there is no column."""
        scores = [r.scores for r in results]
        one = {
            "experiment": experiment,
            self.metric: f"{summary['mean'][experiment]:.2f} ± {summary['sd'][experiment]:.2f}",
            "each seed": ", ".join(self._with_error(s) for s in scores),
            "half vs half": f"{scores[0]['floor']:.2f}",
        }
        if "floor_reconstruction" in scores[0]:
            one["decoded data"] = f"{scores[0]['floor_reconstruction']:.2f}"
        if "confident" in scores[0]:
            one["confident"] = f"{statistics.mean(s['confident'] for s in scores):.1%}"
            one["copies"] = f"{statistics.mean(s['copy_rate'] for s in scores):.1%}"
            nmi = [s["nmi"] for s in scores if "nmi" in s]
            one["NMI"] = f"{statistics.mean(nmi):.2f}" if nmi else ""
        return one

    def _with_error(self, scores: Mapping[str, float]) -> str:
        error = scores.get(f"{self.metric}_se")
        return f"{scores[self.metric]:.2f}" + (f" (SE {error:.2f})" if error is not None else "")

    def plot(self, results: Results, summary: dict[str, Any], path: Path) -> None:
        """Samples of each experiment's first seed over a bar of its distance, every seed a dot."""
        highest = max(max(s) for s in summary[self.metric].values())
        size, heights = (11, 3.2), [1.5, 1]
        columns = len(results)
        with drawing.figure(path, 2, columns, size=size, height_ratios=heights) as (figure, axes):
            for (above, below), (experiment, several) in zip(axes.T, results.items(), strict=True):
                image = Image.open(several[0].grid)
                above.imshow(image, cmap="gray", interpolation="nearest")
                above.set_title(f"{experiment}: {self.conditions[experiment]}", fontsize=12)
                above.axis("off")
                mean, own = summary["mean"][experiment], summary[self.metric][experiment]
                colour = "#4c78a8" if experiment == self.ours else "#b0b7c0"
                below.barh([0], [mean], color=colour, height=0.5)
                below.plot(own, [0] * len(own), "o", color="black", markersize=4)
                below.set(xlim=(0, highest * 1.25), ylim=(-0.6, 0.6), yticks=[])
                below.set_xlabel(f"{self.axis} ({self.metric})")
                right = max(mean, *own) + highest * 0.02
                text = f"{mean:.1f} ± {summary['sd'][experiment]:.1f}"
                below.text(right, 0, text, va="center")
                drawing.open_frame(below, "top", "right", "left")
            closed, seeds = summary["gap_closed"], len(results[self.ours])
            what = "closes {:.0%} of the gap to" if closed <= 1 else "goes beyond"
            figure.suptitle(
                f"Self-guidance {what.format(closed)} human labels, seeing none of them (seeds: {seeds})",
                fontsize=14,
            )
        print(f"wrote {path}")


def _samples(trained: Trained) -> Wanted:
    return Wanted(trained.final, Guide.of(loaded(trained.final).config.sampler), SAMPLES)


def sampled(bench: Bench, trained: Trained) -> Result:
    """What the last snapshot of digits comes to, as evaluation=fd_digits scores it."""
    snapshot, experiment = loaded(trained.final), trained.config.experiment
    found = bench.sampled(snapshot, _samples(trained).guide, SAMPLES)
    groups = bench.groups(snapshot) if experiment == COMPARISONS["digits"].ours else {}
    scores = {**found.more, **groups}
    return Result(experiment, trained.config.seed, trained.run.root.name, scores, str(found.grid))


def recorded(metric: str, trained: Trained) -> Result:
    """What the run's own evaluation of the run's last snapshot came to.

    Raises:
        UserError: it has not been scored.
    """
    images, run = trained.config.train.images, trained.run
    found = [
        record
        for record in records(run)
        # a sweep's are of other protocols
        if record.done and record.images == images and record.metric == metric and not record.sweep
    ]
    grid = found[-1].grid(run) if found else None
    if grid is None:
        raise UserError(
            f"{run.root} has no {metric} at {images:,} images: give `python -m launcher.evaluate {run.root}`, "
            "and then this command again"
        )
    scores = dict(found[-1].scores)
    return Result(trained.config.experiment, trained.config.seed, run.root.name, scores, str(grid))


COMPARISONS = {
    "digits": Comparison(
        data="digits",
        arms=(UNCONDITIONAL, ONLINE, CLASS),
        metric="fd_digits",
        axis="Frechet distance in digit-net features",
    ),
    "emoji": Comparison(
        data="emoji",
        arms=(BY_NAME["emoji-unconditional"], BY_NAME["emoji-online"], BY_NAME["emoji-class"]),
        metric="fd_effnet",
        axis="Frechet distance",
    ),
}


def add(parser: argparse.ArgumentParser) -> None:
    work.add(parser, range(3))
    flags.add(
        parser,
        ("--data", tuple(COMPARISONS), "digits", "of which images (digits)"),
        ("--figure FILE", str, None, "write the picture here"),
    )


def run(options: argparse.Namespace) -> int:
    # only the end is compared: a cadence is no part of a run, and evaluations cost training its cores
    study = replace(work.Study.of(options), snapshots=1, evaluated=True)
    compared = COMPARISONS[options.data]
    arms = compared.by_experiment
    runs = study.train(dict.fromkeys(arms.values(), options.seeds))

    if compared.data == "digits":
        wanted = [_samples(run) for several in runs.values() for run in several]
        study.bench.measure(wanted, "measuring")

    def result(trained: Trained) -> Result:
        if compared.data == "digits":
            return sampled(study.bench, trained)
        return recorded(compared.metric, trained)

    results = {experiment: list(map(result, runs[arm])) for experiment, arm in arms.items()}
    summary = compared.gap_closed(results)
    if options.json:
        each = [asdict(r) for of_seed in zip(*results.values(), strict=True) for r in of_seed]
        print(json.dumps({**summary, "runs": each}))
    else:
        rows = [compared.row(e, several, summary) for e, several in results.items()]
        title = f"equal images, {compared.metric}: lower is better"
        cli.console().print(drawing.table(title, rows))
        text = (
            f"gap closed from {compared.floor} to {compared.ceiling}: {summary['gap_closed']:.0%}"
        )
        cli.console().print(text)
    if options.figure:
        compared.plot(results, summary, Path(options.figure))
    return 0
