"""Submits runs to this machine or to Slurm, goes on with them, and shows them. Imports torch in a job alone."""

import contextlib
import os
import signal
import sys

# while a command imports its modules nobody has work to lose: Ctrl-C ends it without a traceback, until `cli.run` takes
# over; before pathlib, whose import takes a moment
_BEGINS = sys.argv[:1] == ["-m"] or sys.argv[0].endswith("/selfguide")
if _BEGINS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # in a thread, whose import interrupts nobody, Python takes no handler
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from pathlib import Path  # noqa: E402

# `python -m` puts the working directory first: packages there that are called like ours must not be taken for them,
# unless this one lies there too, as in a checkout and in an attempt's code copy
_ROOT = str(Path(__file__).resolve().parents[1])
# one that was removed has no name, and nothing in it
with contextlib.suppress(FileNotFoundError):
    if sys.argv[:1] == ["-m"] and sys.path[:1] == [str(Path.cwd())] != [_ROOT]:
        del sys.path[0]
