"""`python -m tools.guide RUN`: which guidance is best on a model, without labels and without a second training.

Guidance leads from a weak model's prediction to the model's own, f_weak + g (f - f_weak). Compared are the weak models
that a run has anyway: itself without its condition, another average, an earlier snapshot, its auxiliary head, its way
with fewer tokens. Of each, weight and interval are searched by scores of the same seeds, and the best is scored once
more from fresh seeds, of digits in a net that was fitted on other scans. Every score is a record of the run, so that a
search goes on where it was ended, and `tools.sample --recipe` takes the cheapest point that is not known to be worse
than the best.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import references
from launcher.compose import changed
from selfguide.snapshot import CONFIG, Snapshot
from selfguide.spec import recipe
from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.data_fit import check_samples
from selfguide.spec.files import read_config
from selfguide.spec.find import find
from selfguide.spec.lacks import encoder_of, lacks
from selfguide.spec.metrics import FEATURES
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate_scoring
from selfguide.spec.weak import weak_models
from shards import cli
from shards.errors import UserError
from tools import flags, guide_report
from tools.guide_search import Grid, Scorer, Search, chosen_by, confirm, lacking, methods
from tools.sample_run import load_snapshot

WEIGHTS = (1.25, 1.5, 2.0, 2.5, 3.0)
INTERVALS = ("0,1", "0,0.6", "0.2,0.8", "0.4,1")
# what digits are reported in, where nothing else is asked for: a net that saw none of the scans of the first
HELD_OUT = {"fd_digits": "fd_digits_odd", "fd_digits_odd": "fd_digits"}
EPILOG = """examples:
  python -m tools.guide RUN                              every weak model that the run has
  python -m tools.guide RUN --methods condition head     two of them
  python -m tools.guide RUN evaluation=fd_effnet         of a run that was submitted with evaluation=none
  python -m tools.guide RUN --budget 10                  ten minutes of search; again goes on
  python -m tools.sample RUN --recipe fd_digits          afterwards: samples, by all records of the run
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    flags.check_least(options, 10, "samples", "report_samples")
    grid = _grid(options)
    run = find(options.run, Path(options.runs))
    snapshot, folder = load_snapshot(str(run.root), options.runs, options.images, options.ema)
    config = _scored_as(read_config(folder / CONFIG), snapshot, options.settings)
    words, missing = _methods(run, snapshot, options.methods)
    by = _protocol(config, options.protocol, "--protocol")
    report_by = _protocol(
        config,
        options.report_protocol or HELD_OUT.get(by.protocol, by.protocol),
        "--report-protocol",
    )
    by = replace(by, samples=options.samples, seed=options.seed, average=options.ema)
    report_by = replace(
        # behind those of the search
        report_by,
        samples=options.report_samples,
        seed=by.next_seed,
        average=options.ema,
    )
    flags.check_image_seed(options, report_by.next_seed - by.seed)
    _check_enough(config, by, snapshot, "--samples")
    _check_enough(config, report_by, snapshot, "--report-samples")
    searcher = Scorer(
        run,
        config,
        snapshot.images,
        by,
        deadline=math.inf if options.budget is None else time.monotonic() + 60 * options.budget,
    )
    search = Search(searcher, snapshot.config.sampler, words, grid)
    doing = f"{len(words)} weak models of {run.root.name}"
    for _ in cli.track(search.points(), grid.points(len(words)), doing):
        pass
    if search.plain is None or not any(search.found.values()):
        raise UserError(
            f"--budget {options.budget:g}: it was spent before anything could be measured; give more"
        )
    reporter = Scorer(
        run,
        config,
        snapshot.images,
        report_by,
        selected=chosen_by(search.plain),
    )
    unguided, confirmed = confirm(search, reporter)
    for word in sorted(search.found.keys() - confirmed.keys()):
        missing[word] = (
            "none of its samples were finite, or none was scored; give smaller --weights"
            if search.found[word]
            else "the budget ended before its turn; the same command goes on"
        )
    if not confirmed:
        raise UserError(
            f"--weights {' '.join(f'{g:g}' for g in grid.weights)}: no weak model makes finite samples at any; give "
            "smaller ones"
        )
    said = guide_report.answer(snapshot, search, unguided, confirmed, missing)
    recipe.keep(run, records(run))
    figure = Path(options.figure or run.evals / "guide.png")
    guide_report.plot(figure, search, said)
    said["figure"] = str(figure)
    (run.evals / "guide.json").write_text(json.dumps(said, indent=1))
    if options.json:
        print(json.dumps(said))
    else:
        guide_report.show(said)
    return 0


def _scored_as(config: Config, snapshot: Snapshot, settings: Sequence[str]) -> Config:
    """The run's config, with samples scored as these settings say: once that can be done here.

    Raises:
        UserError: it cannot, or a setting is of something else.
    """
    if not settings:
        return config
    for word in settings:
        if not word.startswith(("evaluation=", "evaluation.")):
            raise UserError(
                f"{word}: settings say how to score samples, as evaluation=fd_effnet does; how to draw them is searched"
            )
    before, header = (config.evaluation, *config.more_evaluations), snapshot.data.get("header", {})
    config = changed(config, settings)
    validate_scoring(config)
    config = references.resolved(config, header, before, references.load_manifests)
    if missing := lacks(config, encoder_of(header)):
        raise UserError(missing[0].sentence)
    return config


def _check_enough(config: Config, by: EvaluationConfig, snapshot: Snapshot, flag: str) -> None:
    """Raises UserError where a protocol could not score so many samples."""
    # how they are drawn is searched
    scored = replace(
        config, evaluation=by, more_evaluations=(), sampler=replace(config.sampler, g=1.0)
    )
    try:
        validate_scoring(scored)
        check_samples(scored, encoder_of(snapshot.data.get("header", {})) is not None)
    except UserError as error:
        raise UserError(f"{flag} {by.samples}: {error}") from error


def _grid(options: argparse.Namespace) -> Grid:
    weights = tuple(sorted({*options.weights}))
    for g in weights:
        if g <= 1:
            raise UserError(f"--weights {g:g}: guidance is a weight above 1, which is none")
    intervals = tuple(_interval(text) for text in options.intervals)
    return Grid(weights, intervals)


def _interval(text: str) -> tuple[float, float]:
    """An interval as LOW,HIGH.

    Raises:
        UserError: it is none.
    """
    ends = text.split(",")
    try:
        low, high = map(float, ends)
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UserError(f"--intervals {text}: give noise-times as LOW,HIGH, such as 0.2,0.8")
    return low, high


def _methods(
    run: RunFolder, snapshot: Snapshot, asked: Sequence[str] | None
) -> tuple[list[str], dict[str, str]]:
    """The weak models to compare, and why others are missing.

    Raises:
        UserError: one that was asked for is missing, or there is none at all.
    """
    found, missing = methods(snapshot, run.published())
    if asked:
        for word in asked:
            weak_models(word, "--methods")
            why = lacking(snapshot, word)
            if why:
                raise UserError(f"--methods {word}: {why}")
        return list(dict.fromkeys(asked)), {}
    if not found:
        reasons = "; ".join(f"{word}: {why}" for word, why in missing.items())
        raise UserError(f"{run.root.name} has no weak model to guide it: {reasons}")
    return found, missing


def _protocol(config: Config, name: str | None, flag: str) -> EvaluationConfig:
    """The protocol of that name, with the run's settings where it is one of the run's; the run's first by default.

    Raises:
        UserError: the run is scored by no such protocol, and it is none of digits.
    """
    own = {
        by.protocol: by
        for each in config.scored_by
        # layers are those of the network, however it is guided
        if not FEATURES[(by := each.evaluation).protocol].of_layers
    }
    name = name or next(iter(own), None)
    digits = [each for each, features in FEATURES.items() if features.of_digits]
    if name is None and config.data.shape == (1, 8, 8):
        name = digits[0]
    if name in own:
        return replace(own[name], metrics=())
    if name in digits and config.data.shape == (1, 8, 8):
        return EvaluationConfig(protocol=name)  # type: ignore[arg-type]
    if name is None:
        raise UserError(
            "samples of this run are scored by no protocol, so there is nothing to search by; add a setting that says "
            "how, such as evaluation=fd_effnet"
        )
    raise UserError(
        f"{flag} {name}: samples of this run are scored by {', '.join(own) or 'none'}; give one of these, or of "
        f"digits one of {', '.join(digits)}"
    )


def _parser() -> argparse.ArgumentParser:
    return flags.command(
        "tools.guide",
        __doc__,
        ("run RUN", str, None, "id, name or folder of a run"),
        (
            "settings evaluation.KEY=VALUE*",
            str,
            None,
            "how samples are scored, where not as the run's are: evaluation=fd_effnet evaluation.shards=ROOT",
        ),
        flags.RUNS,
        ("--images N", int, None, "the snapshot at N images seen (default: the newest)"),
        ("--ema I", int, 0, "index of the average that is guided, from 0 (0)"),
        (
            "--methods WEAK+",
            str,
            None,
            "weak models, or joined ones, such as condition+head (all that the run has)",
        ),
        (
            "--weights G+",
            float,
            WEIGHTS,
            f"total weights, above 1 ({' '.join(f'{g:g}' for g in WEIGHTS)})",
        ),
        ("--intervals LOW,HIGH+", str, INTERVALS, f"noise-times ({' '.join(INTERVALS)})"),
        ("--samples N", int, 2000, "images a point of the search (2000)"),
        ("--seed N", int, 0, "of the search; image i is a function of seed + i (0)"),
        ("--budget MINUTES", float, None, "of the search (until it is complete)"),
        ("--protocol P", str, None, "what to search by (the run's first, of digits fd_digits)"),
        ("--report-protocol P", str, None, "what to report by (the same; of digits fd_digits_odd)"),
        ("--report-samples N", int, 5000, "images a reported score, from fresh seeds (5000)"),
        (
            "--figure FILE",
            str,
            None,
            "where to draw the score over g (guide.png with the run's records)",
        ),
        flags.JSON,
        epilog=EPILOG,
    )


if __name__ == "__main__":
    cli.run(main)
