"""`python -m launcher.local FOLDER`: the controller of a job on this machine, started by the local backend only.

It runs the job's ranks, and the first that fails ends the others. It is imported from the attempt's code copy, which
may be of an older commit than the launcher that starts it: so its name, argument and variables stay what they are.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path

from launcher.backends.local import END_S, SAVE_S


def control(folder: Path) -> None:
    """Runs the ranks of the job whose files Submitit wrote into `folder`."""
    from submitit.local.local import Controller

    class FirstFailureEndsAll(Controller):
        """Submitit's waits for every task: a rank whose peer has died would sit in a collective."""

        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            # of the clock: when the ranks are killed that are left; never while nobody asked them to end
            self.killed_at = math.inf
            for each in (signal.SIGTERM, signal.SIGUSR2):
                signal.signal(each, lambda number, _: self.ask(number, SAVE_S))

        def ask(self, number: int, patience: float) -> None:
            """Sends the ranks a signal; those that have not ended in time are killed."""
            self.killed_at = min(self.killed_at, time.monotonic() + patience)
            self._forward_signal(signal.Signals(number))

        def wait(self, freq: int = 24) -> list[int | None]:
            deadline = time.monotonic() + self.timeout_s
            failed = False
            while True:
                codes = [task.poll() for task in self.tasks]
                # `run` kills what is left
                if time.monotonic() > self.killed_at or all(code is not None for code in codes):
                    return codes
                if not failed and any(code not in (None, 0) for code in codes):
                    failed = True
                    self.ask(signal.SIGTERM, END_S)
                if self.killed_at == math.inf and time.monotonic() > deadline:
                    self.ask(signal.SIGTERM, SAVE_S)
                time.sleep(1 / freq)

    FirstFailureEndsAll(folder).run(max_retry=1)


if __name__ == "__main__":
    control(Path(sys.argv[1]))
