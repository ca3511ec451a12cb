"""`python -m launcher.cancel RUN`: ends the watcher, the evaluations and the training of a run, on any cluster.

Safe to call again. What is published stays; the run can be submitted again and goes on where it stopped. A sweep is
ended with all its runs, also those that wait for this machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher import sweep_folder
from launcher.folder import find, takes_run
from launcher.reconcile.act import cancel
from launcher.sweep_folder import SweepFolder
from shards import cli
from shards.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.cancel",
        "Ends every job of a run, or of all runs of a sweep. Snapshots and scores stay, and submitting\n"
        "the run again resumes it.",
        "3f2a",
    )
    takes_run(parser, what="run, or id of a sweep")
    options = parser.parse_args(arguments)
    root = Path(options.runs)
    sweep = sweep_folder.named(options.run, root.resolve())
    if sweep is not None:
        done = _cancel_sweep(sweep)
        about: dict[str, Any] = {"sweep": sweep.id}
    else:
        run = find(options.run, root)
        done = cancel(run)
        about = {"run": run.root.name}
    if options.json:
        print(json.dumps({**about, "cancelled": done}, indent=1))
        return 0
    for each in done:
        of = f" of run {each['run']}" if "run" in each else ""
        print(f"cancelled {each['what']}{of}: {each['kind']} job {each['id']}")
    if not done:
        print(f"nothing of {' '.join(*about.items())} was at work")
    return 0


def _cancel_sweep(sweep: SweepFolder) -> list[dict[str, Any]]:
    """Ends what would start more runs first, then each run; one that cannot be reached does not spare the others.

    Raises:
        UserError: some cannot be reached from here.
    """
    done: list[dict[str, Any]] = []
    if (runner := sweep.stop()) is not None:
        done.append({"what": "queue of this machine", "kind": runner["kind"], "id": runner["id"]})
    problems = []
    for run in sweep.begun():
        try:
            done += [{**each, "run": run.root.name} for each in cancel(run)]
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return done


if __name__ == "__main__":
    cli.run(main)
