"""`python -m launcher.local FOLDER`: the controller of a job on this machine, started by the local backend only.

It runs the job's ranks, and the first that fails ends the others. It is imported from the attempt's code copy, which
may be of an older commit than the launcher that starts it: so its name, argument and variables stay what they are.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.backends import Ending, submitit_names
from launcher.backends.local import END_S, SAVE_S, ending_path
from selfguide.spec.run import write_record


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
            said: Ending | None = None
            while True:
                codes = [task.poll() for task in self.tasks]
                late = self.killed_at == math.inf and time.monotonic() > deadline
                over = None not in codes
                if said is None and (over or late or any(codes)):
                    # by who failed, before the others are ended for it
                    said = ending(codes, late)
                # `run` kills what is left
                if over or time.monotonic() > self.killed_at:
                    write_record(ending_path(folder, self.pid), said or ending(codes, late))
                    return codes
                if not failed and any(codes):
                    failed = True
                    self.ask(signal.SIGTERM, END_S)
                if late:
                    self.ask(signal.SIGTERM, SAVE_S)
                time.sleep(1 / freq)

    submitit_names.install()
    FirstFailureEndsAll(folder).run(max_retry=1)


def ending(codes: Sequence[int | None], late: bool) -> Ending:
    """Returns how a job ended whose ranks have these return codes: None where they work, negative after a signal."""
    signals = {str(rank): -code for rank, code in enumerate(codes) if code and code < 0}
    failed = [*signals, *(str(rank) for rank, code in enumerate(codes) if code and code > 0)]
    state = "TIMEOUT" if late else "FAILED" if failed else "COMPLETED"
    return {"state": state, "signals": signals, **({"first": failed[0]} if failed else {})}


if __name__ == "__main__":
    control(Path(sys.argv[1]))
