"""`python -m launcher.status RUN [--follow]`: everything about one run, once or until it has ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import watch
from launcher.folder import find, takes_run
from launcher.follow import advice, follow
from launcher.reconcile.decide import next_attempt, staying, summary
from launcher.reconcile.view import LOOK_S, RunView, read
from selfguide.spec.run import RunFolder
from shards import cli
from shards.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.status",
        "Shows everything about one run: state, progress, rate, time left, scores, jobs, evaluations and\n"
        "advice. --follow stays with it until it has ended, and ends with 1 where it failed; Ctrl-C leaves\n"
        "the run alone.",
        "3f2a --follow",
    )
    takes_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    options = parser.parse_args(arguments)
    if options.json and options.follow:
        raise UserError("--json with --follow: a stream is no JSON object; drop one of them")
    run = find(options.run, Path(options.runs))
    if options.follow:
        return follow(run, sys.stdout)
    return show(run, as_json=options.json)


def show(run: RunFolder, *, as_json: bool) -> int:
    """Prints everything about a run; returns the exit code."""
    view = read(run, patience_s=LOOK_S)
    tend([view])
    row: dict[str, Any] = asdict(summary(view))
    following = next_attempt(view)
    if row["state"] == "failed" and following.action == "stop":
        row["not_continued"] = following.reason
    results = {(record.key, record.attempt): record.status for record in view.records}
    evaluations = [
        {
            "snapshot": each.images,
            "attempt": each.attempt,
            "job": each.job.state if each.job else "gone",
            "result": results.get((each.key, each.attempt)),
        }
        for each in view.evaluations
    ]
    kept = staying(view)
    retention = {
        "kept": {str(images): why for images, why in kept.items()},
        "deleted": [asdict(each) for each in view.deleted.values()],
    }
    said = [{"images": each.images, "text": each.text} for each in advice(run)]
    if as_json:
        print(
            json.dumps(
                row | {"evaluations": evaluations, "retention": retention, "advice": said}, indent=1
            )
        )
        return 0
    for key, value in row.items():
        if value not in (None, ""):
            print(f"{key.replace('_', ' '):<20}{_text(value)}")
    for each in evaluations:
        outcome = each["result"] or each["job"]
        print(
            f"{'evaluation':<20}{each['snapshot']:,} images, attempt {each['attempt']}: {outcome}"
        )
    for images, why in kept.items():
        print(f"{'kept':<20}snapshot at {images:,} images: {why}")
    for gone in view.deleted.values():
        print(
            f"{'deleted':<20}snapshot at {gone.images:,} images, {gone.bytes / 1e9:,.2f} GB ({gone.setting})"
        )
    for line in said:
        print(f"{'advice':<20}at {line['images']:,} images: {line['text']}")
    return 0


def tend(views: Sequence[RunView]) -> None:
    """Does for the runs that are shown what every command does, and says so on stderr."""
    for view in views:
        for sentence in watch.tend(view):
            print(f"note: {sentence}", file=sys.stderr)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    cli.run(main)
