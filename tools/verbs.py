"""Commands of several verbs: each verb is a module with `add(parser)` and `run(options)`, and a line of help."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

from tools import flags


def parse(
    package: str,
    about: str | None,
    verbs: Mapping[str, str],
    argv: Sequence[str] | None,
    common: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """What was typed after `python -m <package>`; its `run` is the verb's.

    `about` introduces the help, which has the line of each verb; `common` adds what every verb takes before its own.
    Only the verb that is called is imported: some take seconds.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = flags.command(package, about)
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, line in verbs.items():
        if name not in words:
            parsers.add_parser(name, help=line)
            continue
        module = importlib.import_module(f"{package}.{name}")
        verb = parsers.add_parser(
            name, help=line, description=module.__doc__, formatter_class=parser.formatter_class
        )
        common(verb)
        module.add(verb)
        verb.set_defaults(run=module.run)
    return parser.parse_args(words)
