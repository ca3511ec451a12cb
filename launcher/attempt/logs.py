"""Messages of a job's processes: time, rank and level in front, so that the merged log of many ranks can be read."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

# of whose messages rank 0 shows those at level info; of other libraries only warnings are of use
OURS = ("selfguide", "shards", "launcher")


def configure(rank: int | None, out: TextIO | None = None) -> None:
    """Sends all messages of this process to stdout: rank 0's from info up, other ranks' from warning up.

    Args:
        rank: None for a process that is no rank, such as the watcher; it shows what rank 0 would.
        out: in place of stdout.
    """
    name = "" if rank is None else f"rank {rank} "
    handler = logging.StreamHandler(out or sys.stdout)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {name}%(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # it has a handler of its own, before ours exists
    logging.getLogger("submitit").propagate = False
    for package in OURS:
        logging.getLogger(package).setLevel(logging.INFO if rank in (None, 0) else logging.WARNING)
