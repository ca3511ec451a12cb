"""What a training step changes, in one place, and what components may do to it.

ZeRO's masters overwrite what is written to live weights, so rows are written where their masters are, in each rank's
ranges of the parameter space: exactly, and alike in every engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.networks.student import Student
from selfguide.training.components import Components
from selfguide.training.ema import Averages
from selfguide.training.engine.protocol import Engine
from selfguide.training.stability import Stability
from selfguide.training.teacher import Teacher


@dataclass
class State:
    """Everything that a step changes. To components it is their `Weights`."""

    engine: Engine
    averages: Averages
    components: Components
    teacher: Teacher | None
    origin: Mapping[str, Any]  # of the weights, as `selfguide.training.initialise` records it
    stability: Stability
    images: int = 0
    # positions of the data that were passed over by going back, see `training.roll_back`
    passed: int = 0
    # audits of the epochs under way at the last checkpoint, see `training.epochs`; None where that kept none
    audits: tuple[Mapping[str, int], ...] | None = ()

    @property
    def teaching(self) -> Student | None:
        """The teacher's network, if a component asked for a teacher."""
        return None if self.teacher is None else self.teacher.module

    def restart_averages(self, images: int) -> None:
        self.averages.reset(images)

    def refresh_teacher(self, *, buffers: bool) -> None:
        assert self.teacher is not None
        self.teacher.refresh(self.averages.weights(), self.engine.module, buffers=buffers)

    @contextlib.contextmanager
    def averaged(self, index: int = 0) -> Iterator[Student]:
        """The live network with the weights of an average in their place, in eval mode, to sample from between steps.

        All ranks enter and leave together. Averages and masters change places where they are, so no second network is
        needed, and on leaving every bit is what it was.
        """
        module, training = self.engine.module, self.engine.module.training
        self._exchange(index)
        try:
            with self.engine.whole():
                yield module.eval()
        finally:
            module.train(training)
            self._exchange(index)

    @torch.no_grad()
    def _exchange(self, index: int) -> None:
        pairs = zip(self.engine.masters, self.averages.shards[index], strict=True)
        for master, average in pairs:
            live = master.clone()
            master.copy_(average)
            average.copy_(live)
        self.engine.refresh()

    @torch.no_grad()
    def normalise_rows(self, name: str, applied: Tensor) -> None:
        """As in SGFM's published code, but in fp64: a row that two ranks share has one length in every engine."""
        engine = self.engine
        count, width = engine.layout.shapes[engine.layout.names.index(name)]
        squares = torch.zeros(count, dtype=torch.float64, device=applied.device)
        parts = [
            (
                engine.masters[index][inside],
                torch.arange(at.start, at.stop, device=applied.device) // width,
            )
            for index, inside, at in engine.parts_of(name)
        ]
        for mine, rows in parts:
            squares.index_add_(0, rows, mine.double().square())
        if not engine.replicated:
            dist.all_reduce(squares)
        length = torch.where(applied, squares.sqrt().clamp_min(1e-12), 1.0)
        for mine, rows in parts:
            mine.copy_((mine.double() / length[rows]).float())
        engine.refresh()

    @torch.no_grad()
    def replace_rows(self, name: str, rows: Tensor, values: Tensor) -> None:
        engine = self.engine
        count, width = engine.layout.shapes[engine.layout.names.index(name)]
        fresh = torch.zeros(count, width, device=values.device)
        fresh[rows] = values
        moments = engine.moments()
        for index, inside, at in engine.parts_of(name):
            numbers = torch.arange(at.start, at.stop, device=values.device)
            new = torch.isin(numbers // width, rows)
            for shard in (engine.masters, *self.averages.shards):
                shard[index][inside][new] = fresh.flatten()[numbers[new]]
            for moment in (moments.first, moments.second):  # mere zeros before the first step
                moment[index][inside][new] = 0.0
        engine.refresh()
        if self.teacher is not None:
            taught = self.teacher.module.get_parameter(name)
            taught[rows] = values.to(taught.dtype)
