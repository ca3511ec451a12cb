"""Signals that end a rank at once, wherever its main thread is."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from launcher.attempt.exits import Exit

_ENDING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def end_on_signals(exit_record: Path | None) -> None:
    """Makes SIGTERM, SIGUSR2 and SIGINT end the process at once, with an exit record where a path is given.

    Submitit's own handlers ignore the first and requeue on the second. A Python handler alone would wait for the
    collective that the main thread sits in, so a thread reads the signal from the wake-up pipe.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def end() -> None:
        number = signal.Signals(os.read(reader, 1)[0])
        while number not in _ENDING:  # a library's own handler writes to the same pipe
            number = signal.Signals(os.read(reader, 1)[0])
        if exit_record is not None:
            ended = Exit(code=128 + number, kind="signal", message=f"ended by {number.name}")
            ended.write(exit_record)
        os._exit(128 + number)

    for each in _ENDING:
        # the thread acts; a handler must exist for the pipe to be written
        signal.signal(each, lambda *_: None)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=end, name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_default_signals)  # a worker's SIGTERM is its own, not ours


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for each in _ENDING:
        signal.signal(each, signal.SIG_DFL)
