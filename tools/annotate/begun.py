"""Annotations that were begun under settings from before a correction are continued under them, and say so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def as_begun(
    asked: T, old: T, begun: Callable[[T], bool], said: Callable[[T], Mapping[str, Any]]
) -> T:
    """Returns `asked`, or `old` where only work under that is there; `said` is what a record would say of either."""
    new, before = said(asked), said(old)
    if new == before or begun(asked) or not begun(old):
        return asked
    changed = [key for key in new if before.get(key) != new[key]]
    now = ", ".join(f"{key}={new[key]}" for key in changed)
    print(
        f"continued as it was begun, before these were its source's: {now}; to begin anew, name another --out",
        file=sys.stderr,
    )
    return old
