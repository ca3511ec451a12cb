"""Whether this process runs the code of its attempt: a node may see the copy later than the one that submitted.

Python passes over a folder of its path that is not there, and would import whatever is installed: other code than the
run was submitted with, without a word.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from selfguide.spec.nodes import NodeRefused, node_name
from shards.wait import wait_until

# after so long a copy that a node does not see is not there for it
PATIENCE_S = 60.0
# set in a process that has begun once more, on the copy
AGAIN = "SELFGUIDE_CODE_AGAIN"

log = logging.getLogger(__name__)


def foreign(copy: Path | None, here: Path) -> bool:
    """Whether a process runs other code than it should.

    Args:
        copy: the code copy of its job; None where it has none.
        here: the folder of this package, by which Python found it.
    """
    return copy is not None and not here.resolve().is_relative_to(copy.resolve())


def copy_of_job() -> Path | None:
    """Returns the code copy of the job that this process belongs to; None in a process of no job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    # a job has it in front (`backends`), an attempt's or one of the run's
    first = Path(os.environ.get("PYTHONPATH", "").split(os.pathsep)[0])
    return first if "code" in (first.name, first.parent.name) else None


def ensure() -> NodeRefused | None:
    """Starts this process once more, on its job's code copy, where it has imported other code before it saw that.

    Returns:
        Why this node will not do, where the copy does not appear; None where all is well.
    """
    copy = copy_of_job()
    # not for the jobs that this process submits
    again = os.environ.pop(AGAIN, None)
    if not foreign(copy, Path(__file__).parent):
        return None
    assert copy is not None
    if again is None:
        log.warning(f"this node does not see the run's code yet: waiting for {copy}")

        def there() -> bool:
            # a listing refreshes what a network file system remembers of the folder
            return copy.parent.is_dir() and copy in set(copy.parent.iterdir())

        if wait_until(there, timeout_s=PATIENCE_S, poll_s=1.0):
            os.environ[AGAIN] = "1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    what = f"it does not see the run's code in {copy} and would run that of {Path(__file__).parents[2]}"
    return NodeRefused(node_name(), "code", what)
