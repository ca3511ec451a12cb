"""`python -m launcher.runs [RUN]`: a table of runs, or everything about one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from launcher import folder, status, sweep_folder
from launcher.reconcile.decide import Summary, counted, minutes, summary
from launcher.reconcile.view import read_many
from selfguide.spec.run import RunFolder
from shards import cli

# a start that is nearer is said by the day of the week
SOON_S = 6 * 86_400.0

_COLOURS = {
    "running": "\033[32m",
    "evaluating": "\033[32m",
    "failed": "\033[31m",
    "cancelled": "\033[2m",
}
# heading -> side
_COLUMNS = {
    **dict.fromkeys(("run", "experiment", "state"), "<"),
    **dict.fromkeys(("images", "images/s", "ETA", "GPU-hours", "best score", "attempts"), ">"),
    **dict.fromkeys(("job", "nodes", "sweep"), "<"),
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.runs",
        "Lists runs with their state, progress, rate, time left and best score; with RUN, shows all about\n"
        "that one, as `launcher.status` does; with a sweep's id, lists its runs.",
        "--json | python -m json.tool",
    )
    folder.takes_run(parser, nargs="?", what="run, or id of a sweep")
    options = parser.parse_args(arguments)
    root = Path(options.runs).resolve()
    sweep = sweep_folder.named(options.run, root) if options.run else None
    if options.run and sweep is None:
        return status.show(folder.find(options.run, root), as_json=options.json)
    runs = sweep.begun() if sweep else folder.runs(root)
    return _list(runs, _sweeps(root), options.runs, as_json=options.json)


def _list(
    runs: Sequence[RunFolder], sweeps: Mapping[Path, str], root: str, *, as_json: bool
) -> int:
    views, problems = read_many(runs)
    found = [summary(view) for view in views]
    for problem in [*problems, *(problem for view in views for problem in view.problems)]:
        print(f"warning: {problem}", file=sys.stderr)
    status.tend(views)
    of = {id(each): sweeps.get(Path(each.folder)) for each in found}
    if as_json:
        print(json.dumps([asdict(each) | {"sweep": of[id(each)]} for each in found], indent=1))
    elif found:
        _table(found, [of[id(each)] for each in found])
    else:
        folder.check_level(Path(root))
        print(f"no run in {root}; start one: python -m launcher.submit experiment=digits_dit")
    return 0


def _sweeps(root: Path) -> dict[Path, str]:
    """The newest sweep of each run that belongs to one."""
    found = sorted(sweep_folder.sweeps(root), key=lambda each: each.describe().get("time", 0.0))
    return {run.root: each.id for each in found for run in each.runs()}


def _table(found: Sequence[Summary], sweeps: Sequence[str | None]) -> None:
    """Prints a row for each run, without empty columns. Rich would take a third of a second for 200."""
    rows = [_cells(each, sweep) for each, sweep in zip(found, sweeps, strict=True)]
    names = [name for name in _COLUMNS if any(row[name] for row in rows)]
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    bold, end = ("\033[1m", "\033[0m") if cli.colours(sys.stdout) else ("", "")

    def line(cells: Mapping[str, str]) -> str:
        padded = (f"{cells[name]:{_COLUMNS[name]}{width[name]}}" for name in names)
        return "  ".join(padded).rstrip()

    print(f"{bold}{line({name: name for name in names})}{end}")
    for each, row in zip(found, rows, strict=True):
        colour = _COLOURS.get(each.state, "") if bold else ""
        print(f"{colour}{line(row)}{end if colour else ''}")
    for each in found:
        for sentence in _notes(each):
            print(f"{each.id}: {sentence}")


def _cells(each: Summary, sweep: str | None) -> dict[str, str]:
    # what a finished run lacks, and for how long a running one has not moved, belongs to its state
    more = each.state in ("finished", "running") and each.message
    return {
        "run": each.id,
        "experiment": each.experiment,
        "state": f"{each.state}, {each.message}" if more else each.state,
        "images": f"{each.images:,} / {each.of:,}",
        "images/s": f"{each.images_per_s:,.0f}" if each.images_per_s else "",
        "ETA": minutes(each.eta_s) if each.eta_s is not None else "",
        "GPU-hours": f"{each.gpu_hours:,.{2 if each.gpu_hours < 10 else 0}f}"
        if each.gpu_hours
        else "",
        "best score": _score(each),
        "attempts": str(each.attempts),
        "job": f"{each.job or ''}{f', {each.nodes} nodes' if each.nodes else ''}",
        "nodes": each.nodes or "",
        "sweep": sweep or "",
    }


def _score(each: Summary) -> str:
    """The best score, and where it was if that is not the newest snapshot that has one."""
    if each.metric is None or each.best_score is None or each.best_images is None:
        return ""
    where = "" if each.best_images == each.score_images else f" at {each.best_images:,}"
    return f"{each.metric} {each.best_score:.3g}{where}"


def _notes(each: Summary) -> list[str]:
    """What a row has no room for."""
    notes = []
    if each.message and each.state in ("failed", "unknown", "queued"):
        reason = f" ({each.waits_for})" if each.waits_for else ""
        notes.append(f"{each.message}{reason}{_expected(each)}")
    if each.damaged_checkpoints:
        damaged = counted(each.damaged_checkpoints, "damaged checkpoint")
        notes.append(f"{damaged} set aside, in its checkpoints/damaged")
    return notes


def _expected(each: Summary) -> str:
    """When Slurm expects to start a queued job."""
    if each.starts is None:
        return ""
    soon = each.starts - time.time() < SOON_S
    when = time.strftime("%a %H:%M" if soon else "%Y-%m-%d %H:%M", time.localtime(each.starts))
    return f", expected to start {when}"


if __name__ == "__main__":
    cli.run(main)
