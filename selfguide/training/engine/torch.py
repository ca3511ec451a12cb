"""The reference engine: bare torch, or data-parallel by one all-reduce of the flat gradient.

Parameters are views into one flat tensor, so AdamW steps one tensor a group and the state needs no gathering. It is
what ZeRO is compared with, bit for bit and in time. A step reads nothing on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.distributed import world_size
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import TrainConfig
from selfguide.training.engine.layout import Layout
from selfguide.training.engine.optimiser import FlatOptimiser
from selfguide.training.engine.protocol import Engine, Moments, Step, keep_buffers_fp32

# so many numbers are copied for the sake of their norm; of more, each row has a norm of its own in fp32
_COPIED, _ROW = 1 << 20, 4096


class TorchEngine(Engine):
    """fp32, or bf16 weights with fp32 masters."""

    def __init__(
        self,
        student: Student,
        layout: Layout,
        train: TrainConfig,
        *,
        dtype: torch.dtype,
        accumulation: int,
    ) -> None:
        self.name = "torch"
        self.module = student.to(dtype)
        keep_buffers_fp32(self.module)
        self._weights = layout.flatten_module(self.module)
        self._gradient = torch.zeros_like(self._weights)
        gradients = layout.split(self._gradient)
        for name, parameter in self.module.named_parameters():
            parameter.grad = gradients.get(name)
        self._flat = self._weights.float()  # the weights themselves in fp32
        self._optimiser = FlatOptimiser(layout, self._flat, train)
        super().__init__(layout, self._optimiser.owned, replicated=True)
        self._clip, self._accumulation, self._micro = train.clip, accumulation, 0

    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        condition: Condition,
        features: Tensor | None,
        before: Sequence[Tensor] = (),
        last: bool = True,
    ) -> Outputs:
        return self.module(x, tau, condition, features, before, last)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self, learning_rate: float) -> Step | None:
        self._micro += 1
        if self._micro < self._accumulation:
            return None
        self._micro = 0
        if world_size() > 1:
            dist.all_reduce(self._gradient)
            self._gradient /= world_size()
        gradient = self._gradient.float()
        done = judged(gradient, self._clip)
        self._optimiser.step(gradient, done.applied, learning_rate)
        self.refresh()
        self._gradient.zero_()
        return done

    def refresh(self) -> None:
        if self._flat.data_ptr() != self._weights.data_ptr():
            self._weights.copy_(self._flat)

    def moments(self) -> Moments:
        return self._optimiser.moments()

    def load_moments(self, moments: Moments) -> None:
        self._optimiser.load_moments(moments)


def judged(gradient: Tensor, clip: float | None) -> Step:
    """Clips the whole gradient (N,) fp32 in place; says what its norm was, and whether it is finite."""
    norm = norm_of(gradient)
    applied = torch.isfinite(gradient.sum()) & torch.isfinite(norm)
    if clip:
        gradient *= (clip / (norm + 1e-6)).clamp(max=1.0)
    return Step(applied, norm)


def norm_of(gradient: Tensor) -> Tensor:
    """The norm of a vector (N,) fp32, an fp64 scalar that is right to 1e-6; infinite where squares of it are in fp32.

    torch's own fp32 sum over one long vector loses the fourth digit on CPU, and for one in fp64 it copies the vector.
    """
    if len(gradient) > _COPIED:
        whole = len(gradient) // _ROW * _ROW
        rows = gradient[:whole].view(-1, _ROW)
        gradient = torch.cat((torch.linalg.vector_norm(rows, dim=1), gradient[whole:]))
    return torch.linalg.vector_norm(gradient, dtype=torch.float64)
