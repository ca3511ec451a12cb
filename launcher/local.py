"""`python -m launcher.local FOLDER`: the controller of a job on this machine, started by the local backend only.

It runs the job's ranks, and the first that fails ends the others. It is imported from the attempt's code copy, which
may be of an older commit than the launcher that starts it: so its name, argument and variables stay what they are.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.backends import Ending
from launcher.backends.local import GRACE_S, ending_path
from selfguide.spec.run import write_record
from shards.wait import wait_until


def control(folder: Path) -> None:
    """Runs the ranks of the job whose files Submitit wrote into `folder`."""
    from submitit.local.local import Controller

    class FirstFailureEndsAll(Controller):
        """Submitit's waits for every task: a rank whose peer has died would sit in a collective."""

        def wait(self, freq: int = 24) -> list[int | None]:
            deadline = time.monotonic() + self.timeout_s
            while True:
                codes = [task.poll() for task in self.tasks]
                late = time.monotonic() > deadline
                if late or any(codes) or all(code is not None for code in codes):
                    # by who failed before the others were ended for it
                    said = ending(codes, late)
                    codes = codes if None not in codes else self.end()
                    write_record(ending_path(folder, self.pid), said)
                    return codes
                time.sleep(1 / freq)

        def end(self) -> list[int | None]:
            self._forward_signal(signal.SIGTERM)
            wait_until(
                lambda: all(task.poll() is not None for task in self.tasks), timeout_s=GRACE_S
            )
            return [task.poll() for task in self.tasks]  # `run` kills what is left

    FirstFailureEndsAll(folder).run(max_retry=1)


def ending(codes: Sequence[int | None], late: bool) -> Ending:
    """Returns how a job ended whose ranks have these return codes: None where they work, negative after a signal."""
    signals = {str(rank): -code for rank, code in enumerate(codes) if code and code < 0}
    failed = [*signals, *(str(rank) for rank, code in enumerate(codes) if code and code > 0)]
    state = "TIMEOUT" if late else "FAILED" if failed else "COMPLETED"
    return {"state": state, "signals": signals, **({"first": failed[0]} if failed else {})}


if __name__ == "__main__":
    control(Path(sys.argv[1]))
