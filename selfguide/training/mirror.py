"""A run's checkpoints in its store, as training sees it: a process of rank 0 copies the newest one, beside training.

No step waits for it, and nothing that fails there ends a run: the log says so, and the next checkpoint is tried. Where
checkpoints come faster than they are copied, those between are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from selfguide.distributed import RankInfo, on_rank_0_at_length
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import Lease
from selfguide.training.writer_process import Memory, Writer

log = logging.getLogger(__name__)


class Mirror:
    """Of one rank; only that of rank 0 copies anything."""

    def __init__(self, place: str, rank_info: RankInfo, lease: Lease, status: RankStatus) -> None:
        """`place` is that of `store.place_of`."""
        self._place, self._lease, self._status = place, lease, status
        # images of the checkpoint that is being copied, which retention keeps
        self.busy: int | None = None
        # of the last one that was asked for, and of the last that is there
        self._asked, self._there = 0, 0
        self._writer: Writer | None = None
        if rank_info.rank == 0:
            self._memory = Memory(torch.device("cpu"))
            self._writer = Writer(self._memory)

    def poll(self, saved: int, keep: Mapping[str, int | None]) -> None:
        """At every step boundary: has the newest checkpoint copied, that at `saved` images, without waiting.

        `keep` is that of `retention.prune`.
        """
        if self._writer is None:
            return
        self._look(wait=False)
        if self.busy is None and saved not in (0, self._asked):
            self._ask(saved, keep)

    def wait(self, saved: int, keep: Mapping[str, int | None]) -> None:
        """All ranks call: returns once the newest checkpoint is in the store, or cannot be copied."""
        with self._status.within("checkpoint"):
            on_rank_0_at_length(lambda: self._finish(saved, keep))

    def close(self, *, wait: bool) -> None:
        """Ends the process; `wait` until it has."""
        if self._writer is not None:
            self._writer.close(wait=wait)
            self._memory.close()

    def _finish(self, saved: int, keep: Mapping[str, int | None]) -> None:
        self._look(wait=True)
        # also one that failed before: the last of an attempt is tried twice
        if saved not in (0, self._there):
            self._ask(saved, keep)
            self._look(wait=True)

    def _ask(self, images: int, keep: Mapping[str, int | None]) -> None:
        assert self._writer is not None
        self._asked = self.busy = images
        request = {
            "task": "put",
            "run": str(self._lease.run.root),
            "number": self._lease.number,
            "place": self._place,
            "images": images,
            "keep": {**keep, "busy": None},
        }
        try:
            self._writer.ask([request])
        except OSError as error:
            self._failed(error)

    def _look(self, *, wait: bool) -> None:
        """How far the process is."""
        if self.busy is None:
            return
        assert self._writer is not None
        try:
            done = self._writer.answers(wait=wait)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run's own folder holds the checkpoint
            self._failed(error)
            return
        if done is None:
            return
        if done[0]:
            log.info(f"the checkpoint at {self.busy:,} images is in {self._place}")
            self._there = self.busy
        else:
            log.info(f"the checkpoint at {self.busy:,} images was gone before it was copied")
        self.busy = None

    def _failed(self, error: Exception) -> None:
        log.warning(
            f"the checkpoint at {self.busy:,} images is not in {self._place}: {error}. Training goes on, with the "
            "run's folder alone until the next one is copied"
        )
        self.busy = None
