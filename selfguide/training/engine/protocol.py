"""What the loop asks of an engine: the parameter space it trains, and one optimiser over it."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.networks.student import Outputs, Student
from selfguide.training.engine.layout import ParameterSpace, Shard


@dataclass(frozen=True)
class Step:
    """What became of an optimiser step. Both are scalars on the device: to read one is to wait for the step."""

    applied: Tensor  # bool; false where gradients were not finite, and then nothing changed
    grad_norm: Tensor  # global, before clipping


@dataclass(frozen=True)
class Moments:
    """AdamW's state of what this rank owns."""

    first: Shard
    second: Shard
    count: int  # steps applied


class Engine(ParameterSpace):
    """One optimiser over one student."""

    name: str  # as the live engine reports itself
    module: Student  # live weights in the compute dtype

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        condition: Condition,
        features: Tensor | None,
        before: Sequence[Tensor] = (),
        last: bool = True,
    ) -> Outputs:
        """`Student.forward`."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch; the engine divides by the accumulation."""

    @abstractmethod
    def step(self, learning_rate: float) -> Step | None:
        """To be called after every backward; a Step on the accumulation boundary, None before it."""

    @abstractmethod
    def refresh(self) -> None:
        """Casts the masters back into the live weights of every rank."""

    def whole(self) -> AbstractContextManager[None]:
        """All weights are whole on every rank, to be read without `forward`; all ranks enter and leave together."""
        return contextlib.nullcontext()

    @abstractmethod
    def moments(self) -> Moments:
        """The optimiser's state itself, to be read or written; new zeros before the first step."""

    @abstractmethod
    def load_moments(self, moments: Moments) -> None: ...


def keep_buffers_fp32(module: nn.Module) -> None:
    """Running statistics stay fp32 in a bf16 module: an update there is often below one ulp."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
