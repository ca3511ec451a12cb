"""Completion of `selfguide` in bash, zsh and fish; argcomplete speaks to the shell.

The shell calls the command itself with the line so far. The first word is a command; the parser that this builds
answers for the words behind it, in whatever module it is built, so nothing has to be listed twice.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import argcomplete
from argcomplete.lexers import split_line


def answer(modules: Mapping[str, str]) -> NoReturn:
    """Writes the completions of the shell's line and ends the process; `modules` holds the commands' by their names."""
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    first = int(os.environ["_ARGCOMPLETE"])
    # those before the cursor's own word
    words = split_line(line, point)[3][first:]
    if not words:
        parser = argparse.ArgumentParser()
        parser.add_argument("command", choices=modules)
        _complete(parser)
    if words[0] not in modules:
        raise SystemExit(1)
    # the words that argcomplete is to take for the program's name
    os.environ["_ARGCOMPLETE"] = str(first + 1)
    if words[0] == "submit":
        _complete(_submit())
    names = ("parse_args", "parse_known_args", "parse_intermixed_args")
    with contextlib.ExitStack() as replaced:
        for name in names:
            replaced.enter_context(patch.object(argparse.ArgumentParser, name, _parsed))
        try:
            importlib.import_module(modules[words[0]]).main(words[1:])
        except _Built as built:
            parser = built.parser
    _complete(parser)


class _Built(BaseException):
    """A command is about to parse its words; past everything that handles exceptions."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _parsed(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
    raise _Built(parser)


def _complete(parser: argparse.ArgumentParser) -> NoReturn:
    for action in parser._actions:
        complete = COMPLETERS.get(action.dest)
        if complete is not None:
            action.completer = complete  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)
    raise SystemExit(1)


def _submit() -> argparse.ArgumentParser:
    """The words of `submit`, which reads them without a parser."""
    from launcher.submit import FLAGS

    parser = argparse.ArgumentParser(add_help=False)
    for flag in FLAGS:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("settings", nargs="*")
    return parser


def _ids(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Ids of runs and of sweeps."""
    root = Path(getattr(parsed_args, "runs", "runs"))
    records = (*root.glob("*/*/run.json"), *root.glob(".sweeps/*/sweep.json"))
    return [path.parent.name for path in records]


def _settings(prefix: str, **_: Any) -> list[str]:
    from launcher.usage import complete_setting

    return complete_setting(prefix)


def _either(prefix: str, **about: Any) -> list[str]:
    return _settings(prefix) if "=" in prefix else [*_ids(prefix, **about), *_settings(prefix)]


# what stands for the words of an argument, by the name that commands give it
COMPLETERS: Mapping[str, Callable[..., list[str]]] = {
    "run": _ids,
    "settings": _settings,
    "words": _either,
}
