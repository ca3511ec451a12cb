"""Checkpoints that training does not wait for: a snapshot in host memory, which a process of its own writes.

At a step boundary each rank copies what it owns into memory that it shares with its writer (`training.writer`) and goes
on. While a snapshot is being written the ranks tell each other at every step how far their writers are, in a reduction
that is read one step later, so that nobody waits. Once all parts are written rank 0 has the manifest published, and
once that is there all ranks count the checkpoint as saved. So a checkpoint is complete on every rank's word, as one
that is written at once, and all ranks come to the same decisions at the same step.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.distributed import RankInfo, gather, on_rank_0
from selfguide.spec.config import TrainConfig
from selfguide.spec.run import Lease
from selfguide.training import checkpoint, retention
from selfguide.training.engine.layout import Range, length
from selfguide.training.state import State
from selfguide.training.telemetry import Telemetry
from selfguide.training.writer_process import Memory, Writer, WriterDiedError, room
from shards.errors import FencedError

log = logging.getLogger(__name__)

# how far a rank is with a save: it failed, writes, or has written
_FAILED, _WRITING, _WRITTEN = -1, 0, 1


@dataclass
class _Save:
    """A checkpoint that is being written."""

    folder: Path
    images: int
    # what its manifest says beside its files
    extra: dict[str, Any]
    # returns the arguments of `retention.prune` behind it, asked when it is published: what must stay may have changed
    keep: Callable[[], Mapping[str, int | None]]
    requests: Sequence[Mapping[str, Any]]
    # an event behind the copies that a device still makes, and what they are made of; None where all are made
    copied: Any
    sources: list[Tensor]
    # the manifest is being published
    publishes: bool = False
    # this rank's writer has answered, or failed
    done: bool = False
    error: Exception | None = None
    # that it took: the copies here, and the slowest rank's writer
    seconds: float = 0.0
    # what the manifest says of this rank's files
    parts: Sequence[Mapping[str, Any]] = ()
    # a reduction of how far all ranks were, begun at the step boundary before
    asked: tuple[Tensor, dist.Work | None] | None = None


class Saver:
    """Of one rank; all ranks call every method of it alike, between two steps."""

    def __init__(
        self, train: TrainConfig, rank_info: RankInfo, lease: Lease, telemetry: Telemetry
    ) -> None:
        self._train, self._rank_info, self._lease = train, rank_info, lease
        self._telemetry = telemetry
        self._memory = Memory(rank_info.device)
        self.writer = Writer(self._memory)
        self._stream: Any = None
        # that each rank writes, the same in every checkpoint
        self._ranges: list[Sequence[Range]] | None = None
        self._save: _Save | None = None
        group = dist.new_group(backend="gloo") if rank_info.world > 1 else None
        assert not isinstance(group, int), "this rank is in the group"
        self._group = group

    def save(
        self,
        folder: Path,
        state: State,
        keep: Callable[[], Mapping[str, int | None]] | None = None,
    ) -> None:
        """Takes a snapshot that becomes the checkpoint in `folder`; waits while the one before it is being written.

        `keep` returns the arguments of `retention.prune` behind it: those of `retention.rules`, unless given.
        """
        self.wait()
        began = time.monotonic()
        if on_rank_0(lambda: self._lease.holds(folder)):
            # an earlier attempt came as far, with the same numbers
            self._telemetry.saved(state.images, time.monotonic() - began)
            return
        rules = keep or (lambda: retention.rules(self._train))
        self._save = self._snapshot(folder, state, rules)
        self._save.seconds = time.monotonic() - began
        if self._save.copied is None:
            self._write(self._save)

    def settle(self) -> None:
        """Before weights change: what the device copies of them must have been read."""
        if self._save is not None and self._save.copied is not None:
            torch.cuda.current_stream().wait_event(self._save.copied)

    def poll(self) -> None:
        """At every step boundary: goes on with what is being written, without waiting.

        Raises:
            Exception: on all ranks alike, what writing failed with on one, unless train.save_failed=go_on.
        """
        save = self._save
        if save is None:
            return
        if save.asked is not None:
            self._decide(self._answer(save))
            save = self._save
        if save is not None:
            self._look(wait=False)
            self._ask(save)

    def wait(self) -> None:
        """Returns once nothing is being written any more.

        Raises:
            Exception: as `poll`.
        """
        if self._save is None:
            return
        # it may take longer than a step
        with self._telemetry.status.within("checkpoint"):
            while (save := self._save) is not None:
                if save.asked is not None:
                    self._decide(self._answer(save))
                    continue
                self._look(wait=True)
                self._ask(save)

    def close(self, *, wait: bool) -> None:
        """Ends the writer; `wait` until it has."""
        self.writer.close(wait=wait)
        self._memory.close()

    def _snapshot(
        self, folder: Path, state: State, keep: Callable[[], Mapping[str, int | None]]
    ) -> _Save:
        """Copies what this rank writes into the shared memory."""
        engine, rank_info = state.engine, self._rank_info
        vectors, first = checkpoint.kept_vectors(state), rank_info.rank == 0
        counted = state.components.state_dict()
        replicated = checkpoint.replicated(state, counted) if first else {}
        mine = 4 * length(checkpoint.written_ranges(engine, rank_info))
        sizes = [mine] * len(vectors) + [tensor.nbytes for tensor in replicated.values()]
        self._memory.clear(sum(map(room, sizes)))

        def empty(numbers: int) -> Tensor:
            return self._memory.empty((numbers,), torch.float32)

        cuda, event = rank_info.device.type == "cuda", None
        with self._beside() if cuda else contextlib.nullcontext():
            tensors, ranges = checkpoint.share(vectors, engine, rank_info, empty, non_blocking=cuda)
            everywhere = {
                name: self._memory.empty(tensor.shape, tensor.dtype).copy_(
                    tensor, non_blocking=cuda
                )
                for name, tensor in replicated.items()
            }
            if cuda:
                event = torch.cuda.Event()
                event.record()
        requests = [self._part(folder, checkpoint.part_name(rank_info.rank), tensors)]
        if first:
            requests.append(self._part(folder, checkpoint.REPLICATED, everywhere))
        if self._ranges is None:
            self._ranges = gather(ranges)
        extra = checkpoint.about(state, self._ranges, self._lease)
        read = [*replicated.values(), *itertools.chain.from_iterable(vectors.values())]
        return _Save(folder, state.images, extra, keep, requests, event, read)

    def _part(self, folder: Path, name: str, held: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """The request to write tensors of the memory as one file."""
        fence = self._lease.fence(folder)
        return {
            "task": "write",
            "file": str(folder / name),
            "fence": [fence.place, fence.number],
            "tensors": self._memory.places(held),
        }

    def _beside(self) -> Any:
        """A stream of its own, which begins when all that was asked of the device so far is done."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _write(self, save: _Save) -> None:
        """Hands the snapshot to the writer."""
        save.copied, save.sources = None, []
        self._request(save, save.requests)

    def _request(self, save: _Save, requests: Sequence[Mapping[str, Any]]) -> None:
        save.done = False
        try:
            self.writer.ask(requests)
        except WriterDiedError as error:
            save.error = error

    def _look(self, *, wait: bool) -> None:
        """How far this rank's writer is."""
        save = self._save
        assert save is not None
        if save.copied is not None:
            if wait:
                save.copied.synchronize()
            elif not save.copied.query():
                return
            self._write(save)
        if save.done or save.error is not None:
            return
        try:
            answers = self.writer.answers(wait=wait)
        except Exception as error:  # noqa: BLE001 - raised on all ranks, once they have heard of it
            save.error = error
            return
        if answers is not None:
            save.done = True
            save.seconds += self.writer.took_s
            if not save.publishes:
                save.parts = answers

    def _ask(self, save: _Save) -> None:
        far = _FAILED if save.error is not None else _WRITTEN if save.done else _WRITING
        mine, work = torch.tensor(far, dtype=torch.int32), None
        if self._group is not None:
            work = dist.all_reduce(mine, dist.ReduceOp.MIN, group=self._group, async_op=True)
        save.asked = mine, work

    @staticmethod
    def _answer(save: _Save) -> int:
        assert save.asked is not None
        answer, work = save.asked
        if work is not None:
            work.wait()
        save.asked = None
        return int(answer)

    def _decide(self, far: int) -> None:
        """What all ranks do next, by how far the slowest of them is."""
        save = self._save
        assert save is not None
        if far == _FAILED:
            self._fail(save)
        elif far == _WRITTEN and save.publishes:
            self._save = None
            self._telemetry.saved(save.images, save.seconds)
        elif far == _WRITTEN:
            written = gather((save.seconds, save.parts))
            save.publishes, save.seconds = True, max(seconds for seconds, _ in written)
            if self._rank_info.rank == 0:
                self._request(save, [self._publication(save, [parts for _, parts in written])])

    def _publication(self, save: _Save, written: Sequence[Any]) -> Mapping[str, Any]:
        # parts of all ranks in their order, and what all load at the end
        parts = [each[0] for each in written] + [part for each in written for part in each[1:]]
        return {
            "task": "publish",
            "run": str(self._lease.run.root),
            "number": self._lease.number,
            "folder": str(save.folder),
            "extra": save.extra,
            "parts": parts,
            "keep": save.keep(),
        }

    def _fail(self, save: _Save) -> None:
        """A checkpoint that could not be written: the one before it is whole."""
        # the next request must find the writer idle
        self._look(wait=True)
        self._save = None
        error = next(each for each in gather(save.error) if each is not None)
        if self._train.save_failed == "stop" or isinstance(error, FencedError):
            raise error
        if self._rank_info.rank == 0:
            log.warning(
                f"no checkpoint at {save.images:,} images: {error}. Training goes on, since train.save_failed=go_on"
            )
        on_rank_0(lambda: retention.clear(self._lease, save.folder))
