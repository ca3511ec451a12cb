"""Runs one function over many tasks, in this process or in worker processes.

Workers are spawned: a fork would carry over the connections and locks of an S3 client. They end when their
parent does, however it ends. A task that is done twice gives the same bytes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from shards import signals
from shards.errors import UserError

R = TypeVar("R")
T = TypeVar("T")

Watch = Callable[[Iterable[T], int], Iterable[T]]
"""Sees tasks go by as they are done, and their number: it may show progress."""

AHEAD = 2  # tasks for each worker: one that it is at, and one that it need not wait for
UNWIND = 10  # seconds in which a worker that was asked to end puts its things away


_work: Callable[[int], Any]  # of this worker process


def spread(work: Callable[[int], R], tasks: Iterable[int], workers: int) -> Iterator[R]:
    """`work(task)` of every task, in the order of the tasks; `work` must pickle for workers > 1.

    Workers are at most `AHEAD` tasks each ahead of what was taken from here, and no more tasks are asked for. What a
    task raises is raised here, and ends the other workers.

    Raises:
        UserError: workers below 1, or a worker died without a word.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: give at least 1")
    coming = iter(tasks)
    first = [*islice(coming, min(workers, 2))]
    if len(first) < 2:
        for task in chain(first, coming):
            yield work(task)
        return
    coming = chain(first, coming)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(work,),
    )
    try:
        at_work: deque[Future[R]] = deque()
        while True:
            for task in islice(coming, AHEAD * workers - len(at_work)):
                with children_ignore_sigint():
                    at_work.append(pool.submit(_do, task))
            if not at_work:
                break
            yield at_work.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process of workers={workers} died, most likely out of memory: give fewer workers "
            "and run the same command again; what is finished is kept"
        ) from None
    except BaseException:  # an error, Ctrl-C, or a consumer that has enough
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def children_ignore_sigint() -> Iterator[None]:
    """Processes that are started within do not hear Ctrl-C, from their first instruction on; here it waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(work: Callable[[int], Any]) -> None:
    """A worker's start. Ctrl-C reaches the whole terminal: the parent alone answers it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    signals.raise_until_heard(signal.SIGTERM, SystemExit)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _do(task: int) -> Any:
    try:
        return _work(task)
    except SystemExit:
        # back in the pool's loop it would wait for locks that a killed worker may hold
        os._exit(143)


def _stop(*_: object) -> None:
    """Unwinds the task at work, so that its temporary files go; what cannot be unwound ends all the same."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(UNWIND)
    raise SystemExit(143)


def exit_with_parent() -> None:
    """Ends this process, with 1, when its parent has ended; returns at once where it has none. Blocks: for a thread."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
