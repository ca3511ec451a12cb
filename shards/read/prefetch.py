"""A background thread that stays a few items ahead of the consumer, and always ends.

An error of the producer is raised to the consumer, after the items that were made before it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over `items` ahead of time, at most `depth` of them; `waited` are seconds spent waiting."""

    def __init__(self, items: Iterator[T], depth: int, name: str) -> None:
        self.waited = 0.0
        self._buffer = _Buffer[T](depth)
        self._thread = threading.Thread(
            target=self._buffer.fill, args=(items,), name=name, daemon=True
        )
        self._thread.start()

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            return self._buffer.take()
        finally:
            self.waited += time.perf_counter() - started

    def ready(self, count: int, timeout_s: float = 0.0) -> bool:
        """Returns whether `count` items, or the error that comes instead, are there within `timeout_s` seconds."""
        started = time.perf_counter()
        try:
            return self._buffer.holds(count, timeout_s)
        finally:
            self.waited += time.perf_counter() - started

    def close(self) -> None:
        """Ends the thread, at the latest when the item it is at is made or fails. May be called twice."""
        self._buffer.stop()
        self._thread.join()

    def __del__(self) -> None:
        self._buffer.stop()  # the thread holds the buffer, not this object: it ends by itself


class _Buffer(Generic[T]):
    """What consumer and thread share; one condition guards it."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()

    def fill(self, items: Iterator[T]) -> None:
        """What the thread runs. A generator is closed at the end, and with it what it holds."""
        error: BaseException = StopIteration()
        try:
            for item in items:
                if not self._put(item):
                    break
            if isinstance(items, Generator):
                items.close()
        except BaseException as raised:  # noqa: BLE001 - the consumer raises it; else it would wait for ever
            error = raised
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < self._depth)
            self._items.append(item)
            self._changed.notify_all()
            return not self._stopped

    def take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._items or self._error is not None)
            if self._stopped:
                raise ValueError("this stream is closed")
            if not self._items:
                assert self._error is not None
                raise self._error
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def holds(self, count: int, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: len(self._items) >= count or self._error is not None, timeout_s
            )

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()
