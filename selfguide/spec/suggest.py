"""Help with names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from shards.errors import UserError


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name closest to `word`, or that it is short for, or nothing."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    close = close or [name for name in names if len(word) > 1 and _initials(name) == word][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


def _initials(name: str) -> str:
    """lr of learning_rate."""
    return "".join(each[:1] for each in name.split("_"))


def check_known(what: str, word: str, known: Collection[str]) -> None:
    """Raises UserError with the nearest name where `word`, given as `what`, is not one of the `known` names."""
    if word not in known:
        raise UserError(
            f"{what}={word!r} is unknown{nearest(word, known)}; known: {', '.join(known)}"
        )
