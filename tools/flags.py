"""Command lines of tools: a parser for each command, its flags as a table, and what flags have in common."""

from __future__ import annotations

import argparse
from typing import Any

from shards.errors import refuse_if

Flag = tuple[str, Any, Any, str]  # as it is typed, its type, default and help
JSON: Flag = ("--json", bool, False, "print one JSON object")
RUNS: Flag = ("--runs DIR", str, "runs", "where runs are (runs)")


def command(
    module: str, about: str | None, *flags: Flag, epilog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of `python -m <module>`; the help shows `about` and `epilog` as they are written."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add(parser, *flags)
    return parser


def add(to: argparse._ActionsContainer, *flags: Flag) -> None:
    """Adds flags to a parser or to a group of one.

    `--count N` takes a value, `--size A B` two, `--seeds N+` one or more. The type bool takes none, and a tuple lists
    the values there are.
    """
    for typed, kind, default, text in flags:
        name, *values = typed.split()
        settings: dict[str, Any] = {"default": default, "help": text}
        if kind is bool:
            settings["action"] = "store_true"
        elif isinstance(kind, tuple):
            settings["choices"] = kind
        else:
            settings["type"] = kind
        if len(values) > 1:
            settings |= {"nargs": len(values), "metavar": tuple(values)}
        elif values:
            settings["metavar"] = values[0].removesuffix("+")
        if values and values[0].endswith("+"):
            settings["nargs"] = "+"
        to.add_argument(name, **settings)


def check_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """
    Raises:
        UserError: one of these options is given, and below `least`.
    """
    for name in names:
        value = getattr(options, name)
        refuse_if(
            value is not None and value < least,
            f"--{name.replace('_', '-')} {value}: take {least} or more",
        )
