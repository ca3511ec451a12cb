"""What a process of a job does when it is asked to end: heard by a thread, wherever the main thread is.

A Python handler alone would wait for the collective or the compiler that the main thread sits in, so a thread reads
signals from the wake-up pipe. Submitit's own handlers ignore SIGTERM and requeue on SIGUSR2.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launcher.attempt import steps
from launcher.attempt.exits import Exit, exit_path, peer_failed
from selfguide.spec.rank_status import RankStatus

# of one meaning: schedulers send either, with or without a lead
_STOPPING = (signal.SIGTERM, signal.SIGUSR2)
_ENDING = (*_STOPPING, signal.SIGINT)

# a rank that was asked to stop and makes no step for so long waits for a rank that is gone; with `_LOOK_S` and a
# record to write it ends within 15 s
STOP_S = 12.0
# a step may take longer than that, so a rank waits for as many of its own
_STEPS = 3
_LOOK_S = 0.5


def end_on_signals() -> None:
    """Makes SIGTERM, SIGUSR2 and SIGINT end a process at once that has nothing to lose."""
    _listen(lambda number: os._exit(128 + number), lambda: None)


def stop_on_signals(folder: Path, rank: str, status: RankStatus) -> None:
    """Makes SIGTERM and SIGUSR2 ask a rank to stop, and SIGINT end it; a record in `folder` says how it ended.

    Before the first step nothing can be lost, and the rank ends at once. Later `status.stop` is set, and the trainer
    reads it. The rank is ended from here where it cannot stop by itself: a peer has failed, or it makes no progress.
    Asked again, it does nothing else.
    """
    asked = 0.0

    def end(number: int, *, preempted: bool = False) -> None:
        how = Exit.signalled(number, status, preempted=preempted)
        how.write(exit_path(folder, rank))
        with contextlib.ExitStack() as last:
            last.callback(os._exit, how.code)
            # as in `entry`
            steps.end_srun(folder)

    def hear(number: int) -> None:
        nonlocal asked
        if status.ending or status.stop:
            return
        if number not in _STOPPING:
            end(number)
        if not status.begun:
            end(number, preempted=not peer_failed(folder, rank))
        asked = time.monotonic()
        status.stop = number

    def look() -> None:
        if status.ending or not status.stop:
            return
        patience = max(STOP_S, _STEPS * status.step_s)
        stuck = time.monotonic() - max(asked, status.moved) > patience
        if peer_failed(folder, rank) or (stuck and status.section in ("train", "data")):
            end(status.stop)

    _listen(hear, look)


def _listen(hear: Callable[[int], object], look: Callable[[], object]) -> None:
    """Calls `hear(number)` for each signal in a thread of its own, and `look()` twice a second after the first."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        heard = False
        while True:
            if not select.select([reader], [], [], _LOOK_S if heard else None)[0]:
                look()
                continue
            number = os.read(reader, 1)[0]
            if number in _ENDING:  # a library's own handler writes to the same pipe
                heard = True
                hear(number)

    for each in _ENDING:
        # the thread acts; a handler must exist for the pipe to be written
        signal.signal(each, lambda *_: None)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_default_signals)  # a worker's SIGTERM is its own, not ours


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for each in _ENDING:
        signal.signal(each, signal.SIG_DFL)
