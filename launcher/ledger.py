"""`python -m launcher.ledger [RUN]`: where the GPU-hours of a run went, or one line for each run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import folder
from launcher.follow import minutes
from launcher.reconcile.hours import CLASSES, Hours, JobHours, hours
from launcher.reconcile.lived import Lived, Sums, read_lived
from launcher.reconcile.spans import measured
from launcher.reconcile.view import LOOK_S, RunView, read
from shards import cli


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.ledger",
        "Says where the GPU-hours of a run went: each second of its allocations is in one class, and all of\n"
        "them add up to what Slurm accounts for. Rows are jobs; without RUN, a line a run. Ranks count where a\n"
        "run has no GPUs; --json is in seconds.",
        "3f2a",
    )
    folder.takes_run(parser, nargs="?")
    options = parser.parse_args(arguments)
    if options.run:
        (view,) = measured([read(folder.find(options.run, Path(options.runs)), patience_s=LOOK_S)])
        found = hours(view)
        if options.json:
            sums = plain(Sums.of(found))
            print(json.dumps({"run": view.id, **sums, "jobs": _jobs(found)}, indent=1))
        else:
            _show(view, found)
        return 0
    lived, problems = read_lived(folder.runs(Path(options.runs).resolve()))
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if options.json:
        print(json.dumps([{"run": each.id, **plain(each.sums)} for each in lived], indent=1))
    elif lived:
        _list(lived)
    else:
        print(
            f"no run in {options.runs}; start one: python -m launcher.submit experiment=digits_dit"
        )
    return 0


def plain(sums: Sums) -> dict[str, Any]:
    """Returns the sums of a run as JSON holds them, in GPU-seconds."""
    return {name: value for name, value in asdict(sums).items() if name != "training"}


def _jobs(found: Hours) -> list[dict[str, Any]]:
    return [
        {
            **asdict(job),
            "elapsed_s": job.elapsed_s,
            "seconds": {name: job.seconds.get(name, 0.0) for name in CLASSES},
        }
        for job in found.jobs
    ]


# ---- for people --------------------------------------------------------------------------------------


def _show(view: RunView, found: Hours) -> None:
    if not found.jobs:
        print(f"no job of {view.id} has had a node yet")
        return
    sums = found.seconds()
    shown = [name for name in CLASSES if sums[name]]
    divisor, name = _scale(found.total_s, found.unit)
    heads = ["", "job", "elapsed", f"{found.unit}s", name, *shown, "waited for data", "queued"]
    rows = [_row(job, shown, divisor) for job in found.jobs]
    total = ["all", "", "", "", _number(found.total_s / divisor)]
    rows.append([*total, *(_number(sums[each] / divisor) for each in shown), "", ""])
    if found.total_s:
        shares = [f"{sums[each] / found.total_s:.1%}" for each in shown]
        rows.append(["share", "", "", "", "100%", *shares, "", ""])
    _print(heads, rows)
    if found.about:
        print("about: of some jobs the scheduler says no times, so those of their own files count")


def _row(job: JobHours, shown: Sequence[str], divisor: float) -> list[str]:
    what = job.kind if job.images is None else f"evaluation of {job.images:,}"
    state = ", running" if job.running else ""
    trained = job.seconds.get("train", 0.0)
    return [
        f"{'attempt' if job.kind == 'training' else what} {job.attempt}{state}",
        job.job,
        f"{'about ' if job.about else ''}{minutes(job.elapsed_s)}",
        str(job.units),
        _number(job.units * job.elapsed_s / divisor),
        *(_number(job.units * job.seconds.get(name, 0.0) / divisor) for name in shown),
        f"{job.waited_s / trained:.1%}" if trained else "",
        "" if job.queued_s is None else minutes(job.queued_s),
    ]


def _list(lived: Sequence[Lived]) -> None:
    heads = ["run", "experiment", "GPU-hours", "effective", "train", "lost", "queued"]
    rows = []
    for each in lived:
        sums = each.sums
        lost = sum(sums.training[name] for name in ("replayed", "hung", "failed", "idle"))
        total = f"{'about ' if sums.about else ''}{sums.total_s / 3600:,.2f}"
        hour = "" if sums.unit == "GPU" else " (ranks)"
        effective = "" if sums.effective is None else f"{sums.effective:.1%}"
        shares = [sums.training["train"] / 3600, lost / 3600]
        rows.append([each.id, each.experiment, total + hour, effective])
        rows[-1] += [*(f"{share:,.2f}" for share in shares), minutes(sums.queued_s)]
    _print(heads, rows)


def _print(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; Rich would take a third of a second for 200 rows."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    sides = ["<" if i < 2 else ">" for i in range(len(heads))]
    bold, end = ("\033[1m", "\033[0m") if cli.colours(sys.stdout) else ("", "")
    for i, row in enumerate([heads, *rows]):
        cells = (f"{cell:{side}{n}}" for cell, side, n in zip(row, sides, widths, strict=True))
        line = "  ".join(cells).rstrip()
        print(f"{bold}{line}{end}" if i == 0 else line)


def _scale(total_s: float, unit: str) -> tuple[float, str]:
    """In what the cells of a table are: hours, or seconds of what is over in minutes."""
    return (3600.0, f"{unit}-hours") if total_s >= 3600 else (1.0, f"{unit}-seconds")


def _number(value: float) -> str:
    return f"{value:,.1f}" if value else ""


if __name__ == "__main__":
    cli.run(main)
