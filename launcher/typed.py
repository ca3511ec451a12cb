"""Values of text as a user types them, with no grammar but quotes, and in lists brackets and commas.

Hydra's grammar reads `9.10` as a number, `true` as a truth and refuses `a=b`. Where a field holds text, by its type,
what stands behind `key=` is that text: only one pair of quotes around all of it is taken off, and a backslash before a
character that means something to Hydra, as in Hydra. `null` is None where a field may be without a value.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from shards.errors import UserError

Shape = Literal["text", "texts", "mapping"]

_QUOTED = re.compile(r"""(?s)(?P<quote>['"])(?P<inside>(?:\\.|(?!(?P=quote))[^\\])*)(?P=quote)""")
_ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
_INTERPOLATION = re.compile(r"\$\{([^${}]*)")
# what begins `${...}` in a config beside the names of settings: resolvers, and in a file names beside or above
_RESOLVERS = ("oc.",)
_IN_FILES = (*_RESOLVERS, ".", "hydra:", "now:", "python_version:")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def shape(hints: Sequence[Any]) -> Shape | None:
    """Returns what a field of these types holds, one a class that has it; None of one that holds no text."""
    found = {_shape(hint) for hint in hints}
    return found.pop() if len(found) == 1 else None


def optional(hints: Sequence[Any]) -> bool:
    """Returns whether a field of these types may be without a value."""
    return any(type(None) in typing.get_args(hint) for hint in hints)


def _shape(hint: Any) -> Shape | None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = {_shape(each) for each in args if each is not type(None)}
        return inner.pop() if len(inner) == 1 else None
    if hint is str:
        return "text"
    if origin is tuple and set(args) <= {str, Ellipsis}:
        return "texts"
    return "mapping" if origin is dict and args == (str, str) else None


def value(key: str, typed: str, kind: Shape, roots: Sequence[str]) -> Any:
    """Returns what was typed behind `key=` as the value of a field of this kind, for OmegaConf.

    Args:
        roots: the first words of what `${...}` may name in a config; any other is part of the text.

    Raises:
        UserError: a mapping that is none.
    """
    stripped = typed.strip()
    if kind == "texts" and stripped.startswith("[") and stripped.endswith("]"):
        return [text(each, roots) for each in divided(stripped[1:-1])]
    if kind == "mapping" and stripped.startswith("{") and stripped.endswith("}"):
        made = {}
        for each in divided(stripped[1:-1]):
            name, colon, behind = each.partition(":")
            if not colon or not name.strip():
                raise UserError(
                    f"{key}={typed}: {each!r} is not NAME: VALUE; give {key}.NAME=VALUE"
                )
            made[text(name.strip(), roots)] = text(behind.strip(), roots)
        return made
    return text(typed, roots)


def text(typed: str, roots: Sequence[str] = ()) -> str:
    """Returns the text that was typed, less a pair of quotes around all of it."""
    quoted = _QUOTED.fullmatch(typed)
    if quoted:
        # as in Hydra: of backslashes before a quote every second one counts
        pattern = rf"(\\+)(?={quoted['quote']}|$)"
        found = re.sub(pattern, lambda found: found[1][: len(found[1]) // 2], quoted["inside"])
    else:
        found = _ESCAPED.sub(r"\1", typed)
    return _braces(found, roots, _RESOLVERS)


def written(value: Any, roots: Sequence[str]) -> Any:
    """Returns text that stands in a file, or all of it in a list or mapping, for OmegaConf: `roots` as in `value`."""
    if isinstance(value, dict):
        return {name: written(each, roots) for name, each in value.items()}
    if isinstance(value, list):
        return [written(each, roots) for each in value]
    return _braces(value, roots, _IN_FILES) if isinstance(value, str) else value


def _braces(found: str, roots: Sequence[str], resolvers: tuple[str, ...]) -> str:
    return re.sub(r"(\\*)\$\{", lambda at: _brace(at, found, roots, resolvers), found)


def _brace(at: re.Match[str], whole: str, roots: Sequence[str], resolvers: tuple[str, ...]) -> str:
    """`${` as OmegaConf leaves it, unless it begins the name of a setting or a resolver, such as `${oc.env:HOME}`."""
    if len(at[1]) % 2:
        return at[0]
    named = _INTERPOLATION.match(whole, at.end(1))
    name = named[1] if named else ""
    if name.startswith(resolvers) or re.split(r"[.\[]", name.strip())[0] in roots:
        return at[0]
    return f"{at[1] * 2}\\${{"


def divided(typed: str) -> list[str]:
    """Returns the parts of a list, less blanks around them: commas divide it outside of quotes and of brackets."""
    parts = list(_parts(typed))
    return [] if len(parts) == 1 and not parts[0] else parts


def _parts(typed: str) -> Iterator[str]:
    start, at, open_ = 0, 0, []
    while at < len(typed):
        char = typed[at]
        # a quote in the middle of a word is a character of it
        begins = not (before := typed[start:at].rstrip()) or before[-1] in ",:([{"
        quoted = _QUOTED.match(typed, at) if begins else None
        if quoted and re.match(r"\s*([,:)\]}]|$)", typed[quoted.end() :]):
            at = quoted.end()
            continue
        if char in _PAIRS and _closes(typed, at):
            open_.append(_PAIRS[char])
        elif open_ and char == open_[-1]:
            open_.pop()
        elif char == "," and not open_:
            yield typed[start:at].strip()
            start = at + 1
        # what is escaped divides nothing
        at += 2 if char == "\\" else 1
    yield typed[start:].strip()


def _closes(typed: str, at: int) -> bool:
    """Whether the bracket at `at` is closed further on; one that is not divides as any other character does."""
    return _PAIRS[typed[at]] in typed[at + 1 :]
