"""What a rank last said of itself, in a file that others read while it works or hangs."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import write_record

# cheap for a shared file system with a thousand ranks, and often enough to say within a minute that nothing moves
EVERY_S = 10.0

log = logging.getLogger(__name__)


def begin(folder: Path, rank: str, status: RankStatus) -> None:
    """Writes `heartbeat-<rank>.json` from a thread, each time that there was progress since the last look.

    section, images   as `RankStatus` has them
    progressed        when the rank last made a step or entered a section, in seconds since 1970
    step_s            seconds of its last step
    seconds           of each class of time until then, and `waited_s` of training for data
    """
    path = folder / f"heartbeat-{rank}.json"

    def beat() -> None:
        written = None
        while not status.ending:
            names = ("section", "images", "progressed", "step_s", "seconds", "waited_s")
            record = {name: getattr(status, name) for name in names}
            if status.section is not None and record != written:
                written = record
                try:
                    write_record(path, record, replace=True)
                except OSError as error:  # training does not depend on it
                    log.warning(f"{path}: {error}")
            time.sleep(EVERY_S)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
