"""Commands of several verbs: each verb is a module with `HELP`, `add(parser)` and `run(options)`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence

from tools import flags


def parse(
    package: str,
    about: str | None,
    verbs: Sequence[str],
    argv: Sequence[str] | None,
    common: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """What was typed after `python -m <package>`; its `run` is the verb's.

    `about` introduces the help; `common` adds what every verb takes before its own.
    """
    parser = flags.command(package, about)
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in verbs:
        module = importlib.import_module(f"{package}.{name}")
        verb = parsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=parser.formatter_class,
        )
        common(verb)
        module.add(verb)
        verb.set_defaults(run=module.run)
    return parser.parse_args(argv)
