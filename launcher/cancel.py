"""`python -m launcher.cancel RUN`: ends the watcher, the evaluations and the training of a run, on any cluster.

Safe to call again. What is published stays; the run can be submitted again and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from launcher.folder import find
from launcher.reconcile.act import cancel
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


if __name__ == "__main__":
    cli.run(main)
