"""What is asked of a run while it trains reaches all ranks at one step, at no cost while nothing is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.distributed import world_size
from selfguide.spec.rank_status import RankStatus
from shards.read.stream import Stream

# seconds between two questions while a rank waits for data
POLL_S = 1.0


class StopVote:
    """Asks all ranks at each step boundary whether one was asked to stop, and reads the answer at the next.

    The newest request to change the run (`selfguide.training.tuning`) goes the same way: `request` is its number.

    So no rank waits for another that would not have waited anyway. Where a rank may have to wait for its next images,
    all ranks wait for them together before the step, since one that sits in a step cannot stop: they ask again each
    second, and the answer is read at once.
    """

    def __init__(
        self,
        status: RankStatus,
        stream: Stream,
        newest: Callable[[], int] = lambda: 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """All ranks call. A group of its own, so that an answer which is under way delays no other collective.

        Args:
            newest: returns the number of the newest request that this rank has seen.
            group: of the vote before this one, which may still have an answer under way; None makes one.
        """
        self._status, self._stream, self._newest = status, stream, newest
        self.request = 0
        if group is None and world_size() > 1:
            made = dist.new_group(backend="gloo")
            assert not isinstance(made, int), "this rank is in the group"
            group = made
        self.group = group
        self._asked: tuple[Tensor, dist.Work | None] | None = None

    def stop(self, *, at_once: bool) -> int:
        """All ranks call between two steps; returns the number of the signal that a rank got, or 0 on all alike.

        Args:
            at_once: waits for today's answer, for example after a checkpoint, which took its time anyway.
        """
        number, behind = self._answer() if self._asked else (0, True)
        while not number and (at_once or behind):
            at_once = False
            # one that waits for the others' data asks as well
            there = self._stream.ready(1, POLL_S if behind else 0.0)
            self._ask(not there)
            number, behind = self._answer()
            self._status.touch()
            if behind and self._status.section != "data":
                self._status.enter("data")
        if not number:
            if self._status.section == "data":
                self._status.enter("train")
            # the next step's images are here on all ranks; are those of the one after it?
            self._ask(not self._stream.ready(2))
        return number

    def _ask(self, behind: bool) -> None:
        mine = torch.tensor([self._status.stop, behind, self._newest()], dtype=torch.int32)
        work = None
        if self.group is not None:
            work = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._asked = mine, work

    def _answer(self) -> tuple[int, bool]:
        assert self._asked is not None
        answer, work = self._asked
        if work is not None:
            work.wait()
        number, behind, self.request = answer.tolist()
        return number, bool(behind)
