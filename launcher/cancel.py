"""`python -m launcher.cancel RUN`: ends the watcher, the evaluations and the training of a run, on any cluster.

Safe to call again. What is published stays; the run can be submitted again and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import getpass
import json
import socket
from pathlib import Path
from typing import Any

from launcher import clusters, status
from launcher.folder import Attempt, find
from selfguide.spec.run import RunFolder, read_record, write_record
from shards import cli


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.cancel",
        description="Ends every job of a run. Snapshots and scores stay, and submitting the run again resumes it.",
        epilog="example: python -m launcher.cancel 3f2a",
    )
    parser.add_argument("run", help="id, beginning of an id, name, or folder of a run")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs are (runs)")
    parser.add_argument("--json", action="store_true", help="JSON instead of sentences")
    options = parser.parse_args(arguments)
    run = find(options.run, Path(options.runs))
    done = cancel(run)
    if options.json:
        print(json.dumps({"run": run.root.name, "cancelled": done}, indent=1))
        return 0
    for each in done:
        print(f"cancelled {each['what']}: {each['kind']} job {each['id']}")
    if not done:
        print(f"nothing of run {run.root.name} was at work")
    return 0


def cancel(run: RunFolder) -> list[dict[str, Any]]:
    """Ends all jobs of the run, of every attempt; what was still there, as {"what", "kind", "id"}."""
    attempts = [Attempt(run.attempt(number)) for number in run.attempt_numbers()]
    works = attempts and status.training_state(attempts[-1]) != "gone"
    if works and not attempts[-1].cancelled.exists():
        who = f"{getpass.getuser()}@{socket.gethostname()}"
        write_record(
            attempts[-1].cancelled, {"by": who}, replace=True
        )  # first: the watcher then starts nothing more
    done = _end("watcher", [at.watcher for at in attempts])
    done += _end("training", [at.job for at in attempts])
    # last, when the watcher can start no more of them
    done += _end("evaluation", [e.folder / "job.json" for e in status.evaluation_jobs(run)])
    return done + _strays(run, attempts)


def _end(what: str, paths: list[Path]) -> list[dict[str, Any]]:
    there = [record for path in paths if (record := read_record(path)) is not None]
    states = clusters.states(there)
    # what cannot be seen from here is tried all the same: `cancel` says why it cannot be reached
    return [
        {"what": what, "kind": record["kind"], "id": record["id"]}
        for record, state in zip(there, states, strict=True)
        if state != "gone" and clusters.cancel(record)
    ]


def _strays(run: RunFolder, attempts: list[Attempt]) -> list[dict[str, Any]]:
    """Jobs that Slurm has and the folder does not: their submitter died before it wrote the record."""
    found = []
    for record in [r for at in attempts[-1:] if (r := read_record(at.job)) is not None]:
        for stray in clusters.stray(str(run.root), record):
            if clusters.cancel(stray):
                found.append({"what": "unrecorded job", "kind": stray["kind"], "id": stray["id"]})
    return found


if __name__ == "__main__":
    cli.run(main)
