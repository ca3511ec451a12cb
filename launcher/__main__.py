"""`selfguide COMMAND ...`, or `python -m launcher COMMAND ...`: every command of the project under one name.

A command is imported when it is called, so that this page, a misspelt name and completion cost nothing. Tools are
named here and imported by name: nothing of the launcher depends on them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from shards import cli
from shards.errors import UserError


@dataclass(frozen=True)
class Command:
    """One row of the table: the module whose `main` takes the words behind the name, and what it does."""

    module: str
    line: str


# by what somebody wants of a run, in the order in which it is wanted
COMMANDS: dict[str, dict[str, Command]] = {
    "run": {
        "submit": Command("launcher.submit", "check and queue a run, or a sweep of runs with -m"),
        "resume": Command(
            "launcher.resume", "train a stopped run on, or further, by its own config"
        ),
        "evaluate": Command("launcher.evaluate", "score snapshots that have no score"),
        "tune": Command("launcher.tune", "change a run while it trains: log, trace, save, stop"),
        "cancel": Command("launcher.cancel", "end training, evaluations and watcher of a run"),
    },
    "look": {
        "runs": Command("launcher.runs", "all runs: state, progress, rate, time left, best score"),
        "status": Command("launcher.status", "everything about one run; --follow stays"),
        "logs": Command("launcher.logs", "what the ranks of a run wrote; -f follows"),
        "why": Command("launcher.why", "what happened to a run, and why it stopped"),
        "ledger": Command("launcher.ledger", "what runs cost: GPU-hours by what they went into"),
        "plan": Command("launcher.plan", "when a run will have finished, and what it will cost"),
        "board": Command("launcher.board.__main__", "the leaderboard, here and as one HTML page"),
    },
    "repair": {
        "doctor": Command("launcher.doctor", "what a run would lose here; tests disks and nodes"),
        "nodes": Command("launcher.nodes", "nodes, what speaks against them, which are left out"),
        "watch": Command("launcher.watch", "be the watcher of a run that has lost its own"),
        "drill": Command(
            "launcher.drill.__main__", "put faults on a small run and see that it goes on"
        ),
        "notify": Command("launcher.notify", "send a test message to those whom runs will tell"),
        "array": Command(
            "launcher.array", "the tasks of an array, such as `shards encode` submits"
        ),
    },
    "data": {
        "shards": Command(
            "tools.shards.__main__", "make, verify, inspect and copy data as WebDataset shards"
        ),
    },
}
EPILOG = """\
`selfguide COMMAND --help` has an example of each; `python -m launcher.runs` is `selfguide runs`.
Exit codes: 0 done, 1 the answer is "not well", 2 a mistake that you can mend, 130 interrupted."""


def main(words: Sequence[str] | None = None) -> int:
    """Calls a command; returns its exit code.

    Raises:
        UserError: there is no such command.
    """
    if "_ARGCOMPLETE" in os.environ:
        from launcher import completion

        completion.answer(modules())
    name, *rest = (list(sys.argv[1:] if words is None else words)) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(page())
        return 0
    return call(name, rest)


def call(name: str, words: Sequence[str]) -> int:
    """Calls one command with the words behind its name."""
    import importlib

    known = modules()
    if name not in known:
        from selfguide.spec.suggest import nearest

        raise UserError(
            f"{cli.SCRIPT} {name}: there is no such command{nearest(name, list(known))}; {cli.SCRIPT} --help lists them"
        )
    # help and usage of the command name it as it was called
    sys.argv = [f"{cli.SCRIPT} {name}", *words]
    code: int | None = importlib.import_module(known[name]).main(list(words))
    return code or 0


def modules() -> dict[str, str]:
    """Returns the module of each command."""
    return {name: each.module for group in COMMANDS.values() for name, each in group.items()}


def page() -> str:
    """The help page."""
    lines = [f"usage: {cli.SCRIPT} COMMAND [ARGUMENT ...]"]
    for title, group in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<10}{each.line}" for name, each in group.items())]
    return "\n".join([*lines, "", EPILOG])


def script() -> None:
    """The entry of the console script."""
    cli.run(main)


if __name__ == "__main__":
    script()
