"""Takes a run that its numbers have broken back to a checkpoint from before, and on with other images.

What was seen since that checkpoint is passed over: the images that follow it are those that would have come after the
break, at positions of their own, and so with noise of their own. PaLM's loss spikes did not come back after this
(Chowdhery et al. 2022, arXiv 2204.02311, section 5.1). A run goes back `train.roll_backs` times over all its attempts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfguide.distributed import on_rank_0
from selfguide.spec.run import Lease, RunFolder, strict_json
from selfguide.training import checkpoint, loop
from selfguide.training.stability import Stability
from selfguide.training.unstable import RollBackError, Unstable
from selfguide.training.work import Training
from shards import storage
from shards.read.stream import Stream

log = logging.getLogger(__name__)


def train(job: Training, open_stream: Callable[[], Stream]) -> None:
    """Trains to the end, through breaks that `train.unstable=roll_back` allows.

    `open_stream` opens this rank's stream at the position that `job.state` is at.

    Raises:
        Unstable: the run breaks once more than it may go back, or before its first checkpoint. And what `loop.train`
            raises.
    """
    while True:
        try:
            return loop.train(job)
        except RollBackError as error:
            go_back(job, error, open_stream)


def go_back(job: Training, error: RollBackError, open_stream: Callable[[], Stream]) -> None:
    """All ranks call, between two steps: `job` is as it was at the newest checkpoint from before the break.

    Raises:
        Unstable: it may not go back again, or there is no such checkpoint.
    """
    state, run, limit = job.state, job.lease.run, job.config.train.roll_backs
    known = on_rank_0(lambda: records(run))
    if len(known) >= limit:
        raise Unstable(f"{error} The run went back {limit} times (train.roll_backs)") from error
    if job.saver is not None:
        job.saver.wait()
    target = on_rank_0(lambda: _newest(run, state.stability.good))
    if target is None:
        raise Unstable(f"{error} There is no checkpoint from before to go back to") from error
    broken, passed = state.images, state.passed + state.images - target
    record = {"from": broken, "to": target, "passed": passed, "reason": str(error)}
    on_rank_0(lambda: _forget(job.lease, target, [*known, record]))
    log.warning(
        f"{error}. Going back from {broken:,} to {target:,} images, behind which {broken - target:,} are passed over: "
        f"{len(known) + 1} of {limit} times"
    )
    job.stream.close()
    checkpoint.load(run.checkpoint(target), state, job.rank_info)
    # of the data before the break, which are not read again
    state.passed, state.audits = passed, None
    state.stability = Stability(job.config.train, good=target)
    job.stream = open_stream()
    job.telemetry.go_back(target)


def records(run: RunFolder) -> Sequence[Mapping[str, Any]]:
    """How often a run went back, oldest first: `from` and `to` in images, positions `passed` in all, and the reason."""
    path = _path(run)
    return json.loads(storage.read_bytes(path)) if storage.exists(path) else []


def passed(run: RunFolder, images: int) -> tuple[int, bool]:
    """Positions of the data that a run has passed over, and whether its checkpoint at `images` is from before that.

    From a checkpoint before the one that it went back to, as where that was damaged since, all up to the break are.
    """
    known = records(run)
    if not known:
        return 0, False
    last = known[-1]
    return last["passed"] + max(0, last["to"] - images), images <= last["to"]


def _path(run: RunFolder) -> Path:
    return run.checkpoints / "roll_backs.json"


def _newest(run: RunFolder, images: int) -> int | None:
    """The newest checkpoint of up to so many images whose bytes hold."""
    for each in reversed(run.saved()):
        if each <= images and storage.read_complete(run.checkpoint(each), verify="hashes"):
            return each
    return None


def _forget(lease: Lease, target: int, known: Sequence[Mapping[str, Any]]) -> None:
    """Sets aside what is newer than `target`, and then says so: an attempt that dies in between goes back again.

    Of pictures nothing is kept.
    """
    run = lease.run
    lease.check()
    newer = [run.checkpoint(n) for n in run.checkpoint_folders() if n > target]
    for folder in [*newer, *(run.snapshot(n) for n in run.snapshot_folders() if n > target)]:
        kept = lease.set_aside(folder)
        log.warning(
            f"{folder.parent.name}/{folder.name} is from after the break: set aside as {kept}"
        )
    for images in run.previewed():
        if images > target:
            # the newest is what the board shows
            run.preview(images).unlink()
    path = _path(run)
    storage.publish(
        path, strict_json(known, indent=1).encode(), replace=True, fence=lease.fence(path)
    )
