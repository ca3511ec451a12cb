"""`python -m launcher.successor RUN`: whether a run goes on, asked from inside a Slurm job of it. No command for users.

With a training job waits a second one. When the first has ended, rank 0 of the second asks here: the run's next
attempt is opened in that job, or the job ends. So a run goes on after a time limit, a preemption, a lost node or a
killed rank, and nobody has to wait for that.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from launcher import notify, watch
from launcher.attempt import job_name, logs
from launcher.reconcile import act, decide, launch
from launcher.reconcile.view import read
from selfguide.spec.run import RunFolder, write_record
from shards import cli

log = logging.getLogger("launcher.successor")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.successor",
        description="Called by the Slurm jobs of a run, to learn whether it goes on.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--requeue", action="store_true", help="in this very job, once more: ends with 0"
    )
    what.add_argument("--dismiss", action="store_true", help="it does not: end what waits")
    options = parser.parse_args(arguments)
    logs.configure(None)
    run = RunFolder(options.run)
    if options.dismiss:
        view = read(run)
        if decide.next_attempt(view).action == "stop":
            launch.dismiss(view)
        # of the attempt before, on which the last word may have been said meanwhile
        act.keep_endings(view)
        notify.tell(view)
        _replace_watcher(run)
        return 0
    if options.requeue:
        mine = launch.read_in(run, os.environ["SLURM_JOB_ID"])
        if mine is not None:
            notify.tell(mine)
        return 0 if mine and decide.next_attempt(mine).action == "start" else 1
    from submitit.slurm.slurm import SlurmJobEnvironment

    at, reason = launch.take_over(
        run,
        os.environ["SLURM_JOB_ID"],
        Path(os.environ["SUBMITIT_FOLDER"]),
        SlurmJobEnvironment().hostnames,
    )
    log.info(f"attempt {at.number} follows: {reason}" if at else f"nothing follows: {reason}")
    answer = {"attempt": str(at.root) if at else None, "reason": reason}
    write_record(run.root / "successors" / f"{job_name(os.environ)}.json", answer)
    notify.tell(read(run))
    if at:
        # it may have ended with the same node
        _replace_watcher(run)
    return 0


def _replace_watcher(run: RunFolder) -> None:
    """Where the run's watcher is gone: only one job of a run asks, so it need not have been gone for a while."""
    for sentence in watch.tend(read(run), settle_s=0.0):
        log.info(sentence)


if __name__ == "__main__":
    cli.run(main)
