"""`python -m launcher.evaluate RUN [--retry]`: starts the evaluations that a run's snapshots still need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher import watch
from launcher.folder import find, takes_run
from launcher.reconcile import act, decide
from launcher.reconcile.decide import counted
from launcher.reconcile.view import read
from selfguide.spec.run import RunFolder
from shards import cli
from shards.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.evaluate",
        "Scores the snapshots of a run that have no score, as its config says; returns at once. What is\n"
        "being scored already is left alone.",
        "3f2a --retry",
    )
    takes_run(parser)
    parser.add_argument("--retry", action="store_true", help="also those whose evaluation failed")
    options = parser.parse_args(arguments)
    done = evaluate(find(options.run, Path(options.runs)), retry=options.retry)
    if options.json:
        print(json.dumps(done, indent=1))
        return 0
    images = ", ".join(f"{each:,}" for each in done["snapshots"])
    for sentence in done["waits_for"] if images else ():
        print(f"waiting: {sentence}")
    if images:
        print(f"{counted(len(done['snapshots']), 'snapshot')} to score, at {images} images")
        if done["watcher"]:
            print(f"watcher {done['watcher']} starts their evaluations")
    else:
        print(f"every snapshot of run {done['run']} has an outcome; nothing was started")
    if done["failed"]:
        failed = counted(len(done["failed"]), "evaluation")
        print(f"{failed} failed: --retry tries again")
    return 0


def evaluate(run: RunFolder, *, retry: bool) -> dict[str, Any]:
    """Sees to it that a watcher starts what is missing; returns which snapshots that are, and who does it.

    Raises:
        UserError: the run is evaluated by nothing, or the cluster refused the watcher.
    """
    view = read(run)
    at, config = view.newest, view.config
    if at is None or config is None:
        problem = view.problems[0] if view.problems else f"run {view.id} has no attempt yet"
        raise UserError(f"{problem}; submit it again by its own command")
    if config.evaluation.protocol == "none":
        raise UserError(
            f"run {view.id} was submitted with evaluation=none, so nothing says how to score it"
        )
    act.ask_for_scores(run, retry=retry)
    view = read(run)
    missing = decide.unscored(view)
    watcher = view.watcher.label if view.watcher else None
    startable = decide.startable(view)
    if startable and not decide.watched(view):
        record = act.launch_watcher(at.files, config, watch.entry)
        watcher = f"{record['kind']} job {record['id']}"
    return {
        "run": view.id,
        "snapshots": list(missing),
        "failed": sorted(set(decide.unscorable(view)) - set(missing)),
        "watcher": watcher if startable else None,
        "waits_for": [lack.sentence for lack in view.lacks],
    }


if __name__ == "__main__":
    cli.run(main)
