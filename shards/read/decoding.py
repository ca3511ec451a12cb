"""Worker processes that decode pictures: in threads, decoding would hold Python's lock for too long.

They are spawned: a fork would carry over the connections and locks of an S3 client. Each has its own pipe and
shares nothing with the others, so that a killed worker is seen as the end of its pipe rather than as a lock that
is never released. They end with their parent, however it ends. Until one has started, which takes a second, the
caller's thread decodes as well. Which process decodes what does not change any result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from shards import parallel
from shards.errors import UserError

A = TypeVar("A")
R = TypeVar("R")

_SHARES = 2  # pieces of a batch for each process: one that is slower then does less


class Decoders:
    """`workers` processes, started when first used; 0 works in the caller's thread. For one thread."""

    def __init__(self, workers: int) -> None:
        """Raises UserError where `workers` is below 0."""
        if workers < 0:
            raise UserError(f"decoders={workers}: give 0 to decode in the reading process, or more")
        self._workers = workers
        self._processes: dict[Connection, BaseProcess] = {}
        self._starting: set[Connection] = set()

    def map(self, work: Callable[[A], R], items: Sequence[A]) -> Iterable[R]:
        """`work` of each item, in their order; it must pickle where there are workers. Without, each when asked for.

        Raises:
            UserError: a process died. And what `work` raises.
        """
        if not self._workers or len(items) < 2:
            return (work(item) for item in items)
        size = -(-len(items) // (self._workers * _SHARES))
        shares = [items[i : i + size] for i in range(0, len(items), size)]
        try:
            found = self._share_out(work, shares)
        except (EOFError, OSError):
            self.close()
            raise UserError(
                f"a process of decoders={self._workers} died: most likely out of memory, then give fewer; or "
                "it could not start, then put what your script does under `if __name__ == '__main__'`"
            ) from None
        except BaseException:  # what comes later must not find answers to this
            self.close()
            raise
        return [each for share in found for each in share]

    def close(self) -> None:
        """Ends the processes. May be called twice."""
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.join()
        self._processes, self._starting = {}, set()

    def _share_out(self, work: Callable[[A], R], shares: list[Sequence[A]]) -> list[list[R]]:
        """A process has one share at a time, so neither end of a pipe waits for the other to read."""
        found: list[list[R]] = [[] for _ in shares]
        todo = [*range(len(shares))][::-1]
        busy: dict[Connection, int] = {}
        self._start(work, shares[0][0])
        free = [c for c in self._processes if c not in self._starting]
        while todo or busy:
            while todo and free:
                connection = free.pop()
                busy[connection] = todo.pop()
                connection.send((work, shares[busy[connection]]))
            helping = bool(todo and self._starting)
            if helping:
                mine = todo.pop()
                found[mine] = [work(item) for item in shares[mine]]
            ready = wait([*busy, *self._starting], timeout=0 if helping else None)
            for connection in [c for c in self._processes if c in ready]:
                answer = connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                if connection in self._starting:
                    self._starting.remove(connection)
                else:
                    found[busy.pop(connection)] = answer
                free.append(connection)
        return found

    def _start(self, work: Callable[[A], R], item: A) -> None:
        """Starts those that are missing."""
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < self._workers:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, item), daemon=True)
            with parallel.children_ignore_sigint():
                process.start()
            theirs.close()  # else its death would not be an end of the pipe
            self._processes[ours] = process
            self._starting.add(ours)


def _serve(connection: Connection, work: Callable[[A], R], item: A) -> None:
    """What a process runs. Ctrl-C reaches all processes of a terminal: only the parent reacts to it.

    It has started when it has done `item`, and so imported what that takes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=parallel.exit_with_parent, daemon=True).start()
    # what is wrong with the item is said by who does it in earnest
    with contextlib.suppress(Exception):
        work(item)
    with contextlib.suppress(BrokenPipeError):
        connection.send(None)
    while True:
        try:
            work, items = connection.recv()
        except EOFError:  # the parent needs us no more
            return
        try:
            answer: Any = [work(item) for item in items]
        except Exception as error:  # noqa: BLE001 - raised again where it was asked for
            answer = error
        connection.send(answer)
