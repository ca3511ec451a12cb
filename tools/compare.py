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
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from launcher.compose import compose
from selfguide.spec.config import Config
from selfguide.spec.records import Protocol, grid_path, records
from selfguide.spec.run import RunFolder
from shards import cli
from shards.errors import UserError

FLOOR, OURS, CEILING = "digits_uncond", "digits_dit", "digits_class"
CONDITIONS = {FLOOR: "unconditional", OURS: "its own groups", CEILING: "human labels"}


@dataclass(frozen=True)
class Result:
    """The final record of one run."""

    experiment: str
    seed: int
    run: str
    scores: dict[str, float]
    grid: str


def train(experiment: str, seed: int, runs: Path, overrides: list[str]) -> Result:
    """Submits the run, follows it to its last evaluation, and returns that record."""
    given = [
        f"experiment={experiment}",
        f"seed={seed}",
        "cluster=local",
        f"runs={runs}",
        *overrides,
    ]
    # only the end is compared: a cadence is no part of a run, and evaluations cost training its cores
    given.append(f"train.snapshot_every={compose(given).train.images}")
    print(f"== {experiment}, seed {seed}", flush=True)
    command = [sys.executable, "-m", "launcher.submit", *given, "follow=true", "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            f"{experiment} with seed {seed} ended with exit code {done.returncode}; see above"
        )
    return result(RunFolder(Path(json.loads(done.stdout)["folder"])), compose(given))


def result(run: RunFolder, config: Config) -> Result:
    """The record of the run's final snapshot under the protocol of `config`."""
    images = config.train.images
    protocol = Protocol.of(config, run.snapshot_manifest(images))
    for record in records(run):
        if record.done and (record.images, record.protocol_key) == (images, protocol.key):
            grid = grid_path(run, record.key, record.attempt)
            return Result(
                config.experiment, config.seed, record.run, dict(record.scores), str(grid)
            )
    raise UserError(f"{run.root} has no score of its final snapshot; its evaluation failed")


def gap_closed(results: list[Result]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the share of the way from floor to ceiling."""
    scores = {
        e: [r.scores["fd_digits"] for r in results if r.experiment == e]
        for e in (FLOOR, OURS, CEILING)
    }
    mean = {e: statistics.mean(s) for e, s in scores.items()}
    spread = {e: statistics.stdev(s) if len(s) > 1 else 0.0 for e, s in scores.items()}
    closed = (mean[FLOOR] - mean[OURS]) / (mean[FLOOR] - mean[CEILING])
    return {"fd_digits": scores, "mean": mean, "sd": spread, "gap_closed": closed}


def table(results: list[Result], summary: dict[str, Any]) -> Table:
    made = Table(title="equal images, fd_digits: lower is better", title_justify="left")
    for name in (
        "experiment",
        "fd_digits",
        "each seed",
        "half vs half",
        "confident",
        "copies",
        "NMI",
    ):
        made.add_column(name, justify="left" if name == "experiment" else "right")
    for experiment in (FLOOR, OURS, CEILING):
        mine = [r.scores for r in results if r.experiment == experiment]
        nmi = [s["nmi"] for s in mine if "nmi" in s]
        made.add_row(
            experiment,
            f"{summary['mean'][experiment]:.2f} ± {summary['sd'][experiment]:.2f}",
            ", ".join(f"{s['fd_digits']:.2f}" for s in mine),
            f"{mine[0]['floor']:.2f}",
            f"{statistics.mean(s['confident'] for s in mine):.1%}",
            f"{statistics.mean(s['copy_rate'] for s in mine):.1%}",
            f"{statistics.mean(nmi):.2f}" if nmi else "",
        )
    return made


def plot(results: list[Result], summary: dict[str, Any], path: Path) -> None:
    """Samples of each experiment's first seed over a bar of its distance, every seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    order = (FLOOR, OURS, CEILING)
    figure, axes = plt.subplots(
        2, 3, figsize=(11, 3.2), height_ratios=[1.5, 1], layout="constrained"
    )
    highest = max(max(s) for s in summary["fd_digits"].values())
    for column, experiment in enumerate(order):
        above, below = axes[0, column], axes[1, column]
        first = next(r for r in results if r.experiment == experiment)
        above.imshow(Image.open(first.grid), cmap="gray", interpolation="nearest")
        above.set_title(f"{experiment}: {CONDITIONS[experiment]}", fontsize=12)
        above.axis("off")
        mean, own = summary["mean"][experiment], summary["fd_digits"][experiment]
        below.barh([0], [mean], color="#4c78a8" if experiment == OURS else "#b0b7c0", height=0.5)
        below.plot(own, [0] * len(own), "o", color="black", markersize=4)
        below.set(xlim=(0, highest * 1.25), ylim=(-0.6, 0.6), yticks=[])
        below.set_xlabel("Frechet distance in digit-net features (fd_digits)")
        below.text(
            max(mean, *own) + highest * 0.02,
            0,
            f"{mean:.1f} ± {summary['sd'][experiment]:.1f}",
            va="center",
        )
        for side in ("top", "right", "left"):
            below.spines[side].set_visible(False)
    figure.suptitle(
        f"Self-guidance closes {summary['gap_closed']:.0%} of the gap to human labels, seeing none of them",
        fontsize=14,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every submission")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--figure", type=Path, help="write the picture here")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args(argv)
    results = [
        train(experiment, seed, options.runs, options.overrides)
        for seed in options.seeds
        for experiment in (FLOOR, OURS, CEILING)
    ]
    summary = gap_closed(results)
    if options.json:
        print(json.dumps({**summary, "runs": [asdict(r) for r in results]}))
    else:
        cli.console().print(table(results, summary))
        cli.console().print(f"gap closed from {FLOOR} to {CEILING}: {summary['gap_closed']:.0%}")
    if options.figure:
        plot(results, summary, options.figure)
    return 0


if __name__ == "__main__":
    cli.run(main)
