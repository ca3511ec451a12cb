"""Starting an attempt, of a run or of an array: one submission at a time, a folder with its code copy, jobs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence

from launcher import backends, code_copy, sites
from launcher.backends import Job, Record
from launcher.choices import GROUPS
from launcher.folder import Attempt
from selfguide.spec.config import ClusterConfig
from selfguide.spec.run import RunFolder
from shards.errors import UserError
from shards.lock import lock


@contextlib.contextmanager
def submitting(run: RunFolder) -> Iterator[None]:
    """Holds the run against other submissions.

    Raises:
        UserError: its folder cannot be written.
    """
    path = run.root / "submit.lock"
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(
            f"runs={run.root.parent.parent} cannot be written ({error.strerror}); give another runs=FOLDER"
        ) from error
    # where the file system has no locks, the attempt's number has to do
    with lock(path, required=False):
        yield


def start(
    run: RunFolder, cluster: ClusterConfig, prepare: Callable[[Attempt], Sequence[Job]]
) -> tuple[Attempt, list[Record]]:
    """Opens the next attempt and submits its jobs, as one array where they are several; returns their records.

    Args:
        prepare: writes what the jobs read into the attempt's folder, which holds the code copy, and returns the jobs.

    Raises:
        UserError: the cluster refused them. As after any error of `prepare`, the attempt's folder is gone.
    """
    at = Attempt(run.attempt(run.open_attempt()))
    try:
        code_copy.copy(at.code)
        sites.copy(GROUPS, at.configs)
        jobs = prepare(at)
    except BaseException:
        shutil.rmtree(at.root)
        raise
    # a submission that is interrupted may have left jobs, which need the folder: only a refusal says there are none
    try:
        return at, backends.of(cluster).submit_array(jobs)
    except UserError:
        shutil.rmtree(at.root)
        raise
