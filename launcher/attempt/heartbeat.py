"""What a rank last said of itself, in a file that others read while it works or hangs."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import write_record

# between two at least, however often a rank begins something else
LEAST_S = 0.5

log = logging.getLogger(__name__)


def heartbeat_path(folder: Path, rank: int | str) -> Path:
    """Returns where a rank says what it is at."""
    return folder / f"heartbeat-{rank}.json"


def begin(folder: Path, rank: str, status: RankStatus) -> None:
    """Writes `heartbeat-<rank>.json` from a thread, every `status.beat_s` seconds and where another section begins.

    It is written where nothing moves, too: a process that is stopped, or holds the interpreter's lock, writes none.

    section, images   as `RankStatus` has them
    progressed        when the rank last made a step or entered a section, in seconds since 1970
    step_s            seconds of its last step
    collectives       how many it has entered; null where it is alone or has not joined the others
    seconds           of each class of time until then, and `waited_s` of training for data
    """
    path = heartbeat_path(folder, rank)

    def beat() -> None:
        while not status.ending:
            if status.section is not None:
                names = ("section", "images", "progressed", "step_s", "seconds", "waited_s")
                record = {name: getattr(status, name) for name in names}
                record["collectives"] = status.collectives and status.collectives()
                try:
                    write_record(path, record, replace=True)
                except OSError as error:  # training does not depend on it
                    log.warning(f"{path}: {error}")
            time.sleep(LEAST_S)
            status.due.wait(max(0.0, status.beat_s - LEAST_S))
            status.due.clear()

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
