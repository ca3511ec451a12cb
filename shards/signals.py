"""Signals that end a process by an exception."""

from __future__ import annotations

import signal
import sys

_SOON = 0.01  # seconds; in the hook itself Python would drop the exception once more


def raise_until_heard(number: int, error: type[BaseException]) -> None:
    """Has the handler of signal `number` raise `error` once more where Python drops it; to be called once.

    Python runs a handler between any two instructions of the main thread, and what it raises in a callback of a weak
    reference or in `__del__` reaches nobody: `sys.unraisablehook` is told, and the program goes on. This takes the
    process's real-time timer then.
    """
    before = sys.unraisablehook

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if what.exc_type is error:
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
            signal.setitimer(signal.ITIMER_REAL, _SOON)
        else:
            before(what)

    sys.unraisablehook = dropped
