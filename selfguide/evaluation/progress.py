"""Saying that an evaluation goes on: what takes long says so after each of its steps, or it is taken for a hang."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
# says that something was done
Progress = Callable[[], object]


def silent() -> None:
    """Says nothing: nobody watches."""


def reported(items: Iterable[T], progress: Progress) -> Iterator[T]:
    """The items; whenever the next one is asked for, what was done with the last one is progress."""
    for item in items:
        yield item
        progress()
