"""A parser of command lines that takes settings, `key=value`, wherever they stand among options.

Python's own gives a list flag all words behind it, so that `--arms a b train.batch=64` has an arm train.batch=64; and
it takes no further arguments behind an option that it has taken some before.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

_SETTING = re.compile(r"[+~]*[A-Za-z_][\w.@/-]*=")


class Parser(argparse.ArgumentParser):
    """Where an argument without a flag is for settings, by an `=` in its metavar, all settings are its own.

    Those stay with an option that are its one value, as in `--like a=b.png`, or that its own metavar says it takes.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """(namespace, words left over), as argparse's."""
        return self._apart(super().parse_known_args, args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """(namespace, words left over), as argparse's."""
        return self._apart(super().parse_known_intermixed_args, args, namespace)

    def _apart(self, parse: Callable[..., Any], args: Sequence[str] | None, namespace: Any) -> Any:
        words = sys.argv[1:] if args is None else [*args]
        takes = next(
            (a for a in self._actions if not a.option_strings and "=" in str(a.metavar)), None
        )
        if takes is None:
            return parse(words, namespace)
        rest, settings = self._divided(words)
        found, left = parse(rest, namespace)
        if settings:
            setattr(found, takes.dest, [*(getattr(found, takes.dest, None) or ()), *settings])
        return found, left

    def _divided(self, words: list[str]) -> tuple[list[str], list[str]]:
        """(all other words, settings), each in their order."""
        rest: list[str] = []
        settings: list[str] = []
        own = 0  # words that belong to the option before them, whatever they look like
        for at, word in enumerate(words):
            if word == "--":
                return rest + words[at:], settings
            if word.startswith("--") or word in self._option_string_actions:
                own = self._values(word)
            elif own:
                own -= 1
            elif _SETTING.match(word):
                settings.append(word)
                continue
            rest.append(word)
        return rest, settings

    def _values(self, flag: str) -> int:
        """How many of the words behind a flag are values of it alone."""
        name, equals, _ = flag.partition("=")
        known = [a for option, a in self._option_string_actions.items() if option.startswith(name)]
        action = self._option_string_actions.get(name, known[0] if known else None)
        if equals or action is None:
            return 0
        if "=" in str(action.metavar):
            return sys.maxsize
        if isinstance(action.nargs, int):
            return action.nargs
        return int(action.nargs is None)
