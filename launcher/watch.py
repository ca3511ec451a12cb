"""The run's watcher: snapshots that exist, minus scores that exist, are evaluation jobs.

A loop of three steps: read the run's view, decide what it wants, act. It never speaks to the trainer; killing it
loses nothing, since the next one reads the same files.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from launcher import backends
from launcher.attempt import logs
from launcher.attempt.signals import end_on_signals
from launcher.reconcile import act, decide, launch
from launcher.reconcile.view import read
from selfguide.spec.run import RunFolder
from shards import cli
from shards.errors import UserError
from shards.lock import lock

REFUSED_S = 30.0  # before asking again a cluster that refused an evaluation
REFUSALS = 60  # half an hour of them, and the evaluation counts as failed

log = logging.getLogger("launcher.watch")


def watch(root: Path) -> None:
    """Watches until the run needs nothing more. A second watcher of a run waits here for the first to end.

    Raises:
        UserError: the run's files are of another version.
    """
    run = RunFolder(root)
    with lock(root / "watch.lock", required=False):
        refused = 0
        while True:
            view = read(run)
            if view.newest is None:
                return
            if view.config is None:
                if view.newest.files.config.exists() and view.problems:
                    raise UserError(view.problems[0])
                time.sleep(1.0)  # a newer attempt is being submitted
                continue
            if decide.next_attempt(view).action == "stop":
                launch.dismiss(view)
            elif launch.go_on(run) is not None:
                continue
            plan = decide.evaluations_wanted(view, view.config)
            for images in plan.give_up:
                act.record_failure(view, view.config, images)
            if plan.done:
                log.info("nothing left to evaluate")
                return
            try:
                for images in plan.start:
                    act.start_evaluation(view, view.config, images)
                refused = 0 if plan.start else refused
            except UserError as error:
                refused += 1
                log.warning(f"the cluster refused an evaluation ({refused} of {REFUSALS}): {error}")
                if refused >= REFUSALS:
                    for images in plan.start:
                        act.record_failure(view, view.config, images, str(error))
            time.sleep(REFUSED_S if refused else backends.of(view.config.cluster).poll_s)


def entry(run: str) -> None:
    """What Submitit calls where the watcher is a Slurm job."""
    end_on_signals()
    logs.configure(None)
    watch(Path(run))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.watch",
        description="Turns the snapshots of a run that have no score into evaluation jobs, until none is left. "
        "`launcher.submit` starts it; by hand it is of use when a watcher was lost.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    arguments = parser.parse_args()
    if not (arguments.run / "run.json").is_file():
        raise UserError(
            f"run={str(arguments.run)!r} is no run folder; `python -m launcher.runs` lists them"
        )
    logs.configure(None)
    watch(arguments.run.resolve())
    return 0


if __name__ == "__main__":
    cli.run(main)
