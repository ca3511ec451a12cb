"""What the loop asks of an engine, and the flat space in which both engines keep their fp32 masters.

All trainable parameters, in module order, lie end to end in one space of N scalars. An engine owns the slice
[start, stop) of it on this rank: ZeRO a share, bare torch everything. Averages and checkpoints live on that slice,
so neither knows which engine it serves, and a checkpoint written by one loads into the other at any world size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.networks.student import Outputs, Student


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the trainable parameters in the flat space."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    total: int

    @staticmethod
    def of(module: nn.Module) -> Layout:
        named = [
            (n, tuple(p.shape), p.numel()) for n, p in module.named_parameters() if p.requires_grad
        ]
        offsets, total = [], 0
        for _, _, count in named:
            offsets.append(total)
            total += count
        return Layout(
            tuple(n for n, _, _ in named), tuple(s for _, s, _ in named), tuple(offsets), total
        )

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a full flat vector (N,) by name."""
        ends = (*self.offsets[1:], self.total)
        return {
            name: flat[start:stop].view(shape)
            for name, shape, start, stop in zip(
                self.names, self.shapes, self.offsets, ends, strict=True
            )
        }


@dataclass(frozen=True)
class Step:
    """What became of an optimiser step; the norm is global and before clipping."""

    applied: bool
    grad_norm: float


class Engine(Protocol):
    """One optimiser over one student."""

    name: str  # as the live engine reports itself
    module: Student  # live weights in the compute dtype
    layout: Layout
    start: int
    stop: int
    master: (
        Tensor  # fp32 (stop - start,), a view: writing it and calling `refresh` changes the weights
    )

    def forward(
        self, x: Tensor, tau: Tensor, condition: Condition, features: Tensor | None
    ) -> Outputs: ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch; the engine divides by the accumulation."""

    def step(self, learning_rate: float) -> Step | None:
        """To be called after every backward; a Step on the accumulation boundary, None before it."""

    def refresh(self) -> None:
        """Casts the masters back into the live weights of every rank."""

    def gather(self, shard: Tensor) -> Tensor:
        """The full flat vector (N,) fp32 from every rank's slice, on every rank."""

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """AdamW's first and second moments of the slice, and its step count."""

    def load_moments(self, first: Tensor, second: Tensor, count: int) -> None: ...


def keep_buffers_wide(module: nn.Module) -> None:
    """Running statistics stay fp32 in a bf16 module: an update there is often below one ulp."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
