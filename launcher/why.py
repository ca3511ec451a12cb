"""`python -m launcher.why RUN`: what happened to a run over all its attempts, and why it stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.folder import find, takes_run
from launcher.reconcile import decide
from launcher.reconcile.conclusion import Conclusion, conclude
from launcher.reconcile.timeline import Event, events, verdict
from launcher.reconcile.view import LOOK_S, read
from shards import cli
from shards.errors import UserError

# of kinds of events on a terminal, as codes of ANSI
_COLOURS = {
    "cause": "31",
    "damaged": "31",
    "cancelled": "33",
    "unknown": "33",
    "log": "2",
    "slurm": "33",
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.why",
        "Tells what happened to a run over all its attempts, in the order of time, and why it stopped:\n"
        "from what its ranks left, and from what the scheduler says while it knows.",
        "3f2a --attempt 2",
    )
    takes_run(parser)
    parser.add_argument("--attempt", type=int, metavar="N", help="only this attempt (all)")
    options = parser.parse_args(arguments)
    run = find(options.run, Path(options.runs))
    view = read(run, patience_s=LOOK_S, evidence=True)
    numbers = [at.number for at in view.attempts]
    if options.attempt is not None and options.attempt not in numbers:
        known = ", ".join(map(str, numbers)) or "none"
        raise UserError(
            f"--attempt {options.attempt}: run {view.id} has no such attempt; it has {known}"
        )
    found = verdict(view, options.attempt)
    chosen = [each for each in events(view) if options.attempt in (None, each.attempt)]
    end = conclude(view, found)
    for problem in view.problems:
        print(f"warning: {problem}", file=sys.stderr)
    if options.json:
        about: dict[str, Any] = {"run": view.id, "state": decide.state(view).word}
        about |= {"cause": found and asdict(found), "conclusion": asdict(end)}
        print(json.dumps(about | {"events": [asdict(each) for each in chosen]}, indent=1))
    else:
        print("\n".join(text(chosen, end, colour=sys.stdout.isatty())))
    return 0


def text(chosen: Sequence[Event], end: Conclusion, *, colour: bool = False) -> list[str]:
    """Returns the timeline as lines, with its conclusion at the end."""
    lines, day = [], ""
    for each in chosen:
        date, clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)).split()
        if date != day:
            lines.append(date)
            day = date
        lines.append(f"{clock} {_painted(each.text, each.kind, colour)}")
        lines += [f"           {_painted(line, each.kind, colour)}" for line in each.lines]
    lines += ["", str(end)]
    return [*lines, f"    {end.command}"] if end.command else lines


def _painted(line: str, kind: str, colour: bool) -> str:
    code = _COLOURS.get(kind) if colour else None
    return f"\033[{code}m{line}\033[0m" if code else line


if __name__ == "__main__":
    cli.run(main)
