"""`python -m launcher.local FOLDER`: the controller of a job on this machine, started by the local backend only.

It runs the job's ranks, and the first that fails ends the others. It is imported from the attempt's code copy, which
may be of an older commit than the launcher that starts it: so its name, argument and variables stay what they are.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from launcher.backends.local import GRACE_S
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
                if all(code is not None for code in codes):
                    return codes
                if any(code not in (None, 0) for code in codes) or time.monotonic() > deadline:
                    return self.end()
                time.sleep(1 / freq)

        def end(self) -> list[int | None]:
            self._forward_signal(signal.SIGTERM)
            wait_until(
                lambda: all(task.poll() is not None for task in self.tasks), timeout_s=GRACE_S
            )
            return [task.poll() for task in self.tasks]  # `run` kills what is left

    FirstFailureEndsAll(folder).run(max_retry=1)


if __name__ == "__main__":
    control(Path(sys.argv[1]))
