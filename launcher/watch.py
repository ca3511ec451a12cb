"""The run's watcher: snapshots that exist, minus scores that exist, are evaluation jobs. Old ones it deletes.

A loop of three steps: read the run's view, decide what it wants, act. It never speaks to the trainer; killing it
loses nothing, since the next one reads the same files. It starts the next one itself before its time limit, and every
command that sees the run without one does, too (`tend`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launcher import backends, notify
from launcher.attempt import logs, own_code
from launcher.attempt.signals import end_on_signals
from launcher.folder import find, takes_run
from launcher.reconcile import act, decide, launch, prune
from launcher.reconcile.view import RunView, read
from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder
from shards import cli
from shards.errors import UserError
from shards.lock import lock

REFUSED_S = 30.0  # before asking again a cluster that refused an evaluation
REFUSALS = 60  # half an hour of them, and the watcher leaves it to the next one

# how long before its time limit a watcher starts the next one
RENEW_S = 300.0
# before snapshots that other runs keep are looked at again
PRUNE_S = 600.0
# a watcher that is gone so soon after its submission is not replaced by everybody who looks
SETTLE_S = 30.0

log = logging.getLogger("launcher.watch")


def watch(root: Path, until: float = math.inf) -> None:
    """Watches until the run needs nothing more. A second watcher of a run waits here for the first to end.

    Args:
        until: seconds since 1970 at which the next watcher takes over.

    Raises:
        UserError: the run's files are of another version.
    """
    run = RunFolder(root)
    with lock(root / "watch.lock", required=False):
        refused, prune_at = 0, 0.0
        while True:
            view = read(run)
            if view.newest is None:
                return
            if view.config is None:
                if view.newest.files.config.exists() and view.problems:
                    raise UserError(view.problems[0])
                time.sleep(1.0)  # a newer attempt is being submitted
                continue
            act.keep_endings(view)
            try:
                if _cancelled(view):
                    return
                goes_on = launch.tend(view)
                notify.tell(view, goes_on)
                wanted = decide.all_wanted(view, view.config)
                if (goes_on or not wanted.done) and view.time > until:
                    act.launch_watcher(view.newest.files, view.config, entry)
                    log.info("the next watcher goes on from here")
                    return
                settle(view, wanted)
                if view.time >= prune_at or (wanted.done and not goes_on):
                    found = prune.prune(view)
                    prune_at = view.time + PRUNE_S if found.stay or found.problems else 0.0
                if wanted.done and not goes_on:
                    log.info("nothing left to evaluate")
                    return
                refused = 0 if start(view, wanted) else refused
            except UserError as error:
                refused += 1
                log.warning(f"the cluster refused ({refused} of {REFUSALS}): {error}")
                if refused >= REFUSALS:
                    return
            time.sleep(REFUSED_S if refused else backends.of(view.config.cluster).poll_s)


def settle(view: RunView, wanted: decide.Wanted) -> None:
    """Writes what is known of the run's snapshots: failed and left out ones, and how they are best sampled."""
    for point in wanted.give_up:
        act.record_failure(view, point)
    for point in wanted.skip:
        act.record_skip(view, point, decide.left_out(view, point.config, point.images))
    act.keep_recipe(view)


def start(view: RunView, wanted: decide.Wanted) -> list[str]:
    """Submits what is to be started; returns the names of the evaluations.

    Raises:
        UserError: the cluster refused one.
    """
    begun = []
    for config, plan in wanted.plans:
        begun += [
            name for images in plan.start for name in act.start_evaluation(view, config, images)
        ]
    return begun + (act.start_points(view, wanted.points) if wanted.points else [])


def _cancelled(view: RunView) -> bool:
    """Whether nothing is to be watched any more; ends what a cancellation has left, where it was not completed."""
    assert view.newest is not None
    if view.newest.cancelled and not view.newest.cancel_done:
        act.cancel(view.folder, watchers=False)
    return view.newest.cancelled and decide.evaluations_stopped(view)


def tend(view: RunView, settle_s: float = SETTLE_S) -> list[str]:
    """Does what every command does for a run that it sees: completes its cancellation, replaces its lost watcher.

    Args:
        settle_s: how long after its submission a watcher is not replaced.

    Returns:
        What was done or could not be, as sentences. Runs of other users, and of clusters that do not answer, are left.
    """
    at = view.newest
    if at is None or not _mine(view.folder):
        return []
    try:
        if at.cancelled and not at.cancel_done and decide.training_state(view) != "unknown":
            act.cancel(view.folder)
            return [f"{view.id}: what somebody cancelled has been ended"]
        submitted = view.watcher.record.get("submitted", 0.0) if view.watcher else 0.0
        if decide.watcher_missing(view) and view.time > submitted + settle_s:
            config = view.config or read_config(at.files.config)
            waits = at.job.record if at.job and at.job.state == "queued" else None
            record = act.launch_watcher(at.files, config, entry, after=waits)
            return [f"{view.id}: its watcher was lost, {record['kind']} job {record['id']} goes on"]
    except UserError as error:
        return [f"{view.id}: {error}"]
    return []


def _mine(run: RunFolder) -> bool:
    return run.root.stat().st_uid == os.getuid()


def renewal(config: Config, now: float) -> float:
    """Returns when a watcher that starts now has to start the next one, in seconds since 1970."""
    limit_s = 60.0 * config.cluster.watcher_timeout_min
    return now + limit_s - min(RENEW_S, limit_s / 2)


def entry(run: str) -> None:
    """What Submitit calls where the watcher is a Slurm job."""
    own_code.enter()
    end_on_signals()
    logs.configure(None)
    config = read(RunFolder(Path(run))).config
    watch(Path(run), renewal(config, time.time()) if config else math.inf)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.watch",
        "Turns the snapshots of a run that have no score into evaluation jobs, until none is left.\n"
        "`launcher.submit` starts it; by hand it is of use where a watcher was lost and none can be queued.",
        "runs/digits_dit/3f2a91c05d77",
    )
    takes_run(parser)
    options = parser.parse_args(arguments)
    run = find(options.run, Path(options.runs))
    # the one JSON object has stdout to itself
    logs.configure(None, sys.stderr if options.json else sys.stdout)
    watch(run.root)
    if options.json:
        print(json.dumps(asdict(decide.summary(read(run))), indent=1))
    return 0


if __name__ == "__main__":
    cli.run(main)
