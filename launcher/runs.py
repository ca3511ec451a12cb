"""`python -m launcher.runs [RUN]`: a table of runs, or everything about one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import folder, watch
from launcher.follow import minutes
from launcher.reconcile.decide import Summary, next_attempt, summary
from launcher.reconcile.view import LOOK_S, RunView, read, read_many
from selfguide.spec.run import RunFolder
from shards import cli

_COLOURS = {
    "running": "green",
    "evaluating": "green",
    "finished": "bold",
    "failed": "red",
    "cancelled": "dim",
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.runs",
        description="Lists runs with their state, progress and newest score; with RUN, shows all about that one.",
        epilog="example: python -m launcher.runs --json | python -m json.tool",
    )
    parser.add_argument("run", nargs="?", help="id, beginning of an id, name, or folder of a run")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs are (runs)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.run:
        return _one(folder.find(options.run, Path(options.runs)), options.json)
    views, problems = read_many(folder.runs(Path(options.runs).resolve()))
    found = [summary(view) for view in views]
    for problem in [*problems, *(problem for view in views for problem in view.problems)]:
        print(f"warning: {problem}", file=sys.stderr)
    _tend(views)
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    elif found:
        _table(found)
    else:
        print(
            f"no run in {options.runs}; start one: python -m launcher.submit experiment=digits_dit"
        )
    return 0


def _tend(views: Sequence[RunView]) -> None:
    for view in views:
        for sentence in watch.tend(view):
            print(f"note: {sentence}", file=sys.stderr)


def _table(found: list[Summary]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in (
        "run",
        "experiment",
        "state",
        "images",
        "images/s",
        "ETA",
        "score",
        "attempts",
        "job",
    ):
        table.add_column(
            name, justify="right" if name in ("images", "images/s", "ETA", "score") else "left"
        )
    for each in found:
        colour = _COLOURS.get(each.state, "")
        # what a finished run lacks belongs to its state
        state = f"{each.state}, {each.message}" if _lacks(each) else each.state
        table.add_row(
            each.id,
            each.experiment,
            f"[{colour}]{state}[/]" if colour else state,
            f"{each.images:,} / {each.of:,}",
            f"{each.images_per_s:,.0f}" if each.images_per_s else "",
            minutes(each.eta_s) if each.eta_s is not None else "",
            f"{each.metric} {each.score:.3g}" if each.metric and each.score is not None else "",
            str(each.attempts),
            f"{each.job or ''}{f', {each.nodes} nodes' if each.nodes else ''}",
        )
    console = cli.console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no edge at which to break ids
    console.print(table)
    for each in found:
        if each.message and each.state in ("failed", "unknown", "queued"):
            print(f"{each.id}: {each.message}")


def _lacks(each: Summary) -> bool:
    return each.state == "finished" and bool(each.message)


def _one(run: RunFolder, as_json: bool) -> int:
    view = read(run, patience_s=LOOK_S)
    _tend([view])
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
    if as_json:
        print(json.dumps(row | {"evaluations": evaluations}, indent=1))
        return 0
    for key, value in row.items():
        if value not in (None, ""):
            print(f"{key.replace('_', ' '):<20}{_text(value)}")
    for each in evaluations:
        outcome = each["result"] or each["job"]
        print(
            f"{'evaluation':<20}{each['snapshot']:,} images, attempt {each['attempt']}: {outcome}"
        )
    return 0


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    cli.run(main)
