"""A rank runs from its job's code copy, also where a network file system shows that copy late.

A batch script goes to the copy and names it first in PYTHONPATH. Where neither is visible yet, Python imports what is
installed, or the checkout that the job was submitted from, which somebody may have edited since.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from shards.wait import wait_until

# network file systems remember for up to a minute that there was no such folder
VISIBLE_S = 120.0


def enter() -> None:
    """Returns at once in a rank that runs from its job's code copy; another one waits for it and starts again there.

    Raises:
        RuntimeError: the copy is not visible after `VISIBLE_S`.
    """
    first = os.environ.get("PYTHONPATH", "").partition(os.pathsep)[0]
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or Path(__file__).is_relative_to(first):
        return
    copy = Path(first)
    began, wanted = time.monotonic(), copy / "launcher/attempt/own_code.py"
    print(f"this rank waits for its code copy {copy}, and runs {__file__} so far", flush=True)
    if not wait_until(lambda: _listed(wanted), timeout_s=VISIBLE_S, poll_s=0.5):
        raise RuntimeError(
            f"{copy}: the job's code copy is not visible on this node after {VISIBLE_S:.0f} s; "
            "`selfguide doctor` checks what nodes see of the file system of runs="
        )
    print(f"it is there after {time.monotonic() - began:.1f} s; starting again from it", flush=True)
    # `python -m` looks in the working directory first
    os.chdir(copy)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _listed(path: Path) -> bool:
    """Whether a file is there; a listing refreshes what a network file system remembers of a folder."""
    return path.parent.is_dir() and path in set(path.parent.iterdir())
