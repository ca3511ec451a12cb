"""What work has cost, written by ranks that are threads of one process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from selfguide.discovery.spent import spending, total


def test_spending_of_ranks_that_are_threads_loses_no_second(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def rank() -> None:
        for _ in range(50):
            together.wait()
            with spending(tmp_path, ranks=4):
                time.sleep(0.001)

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    found = total(tmp_path)
    assert found is not None and found["seconds"] >= 4 * 50 * 0.001 and found["ranks"] == 4
    assert len(list(tmp_path.iterdir())) == 4
