"""The reference engine: bare torch, or data-parallel by one all-reduce of the flat gradient.

Parameters are views into one flat tensor, so AdamW steps a single tensor and the state needs no gathering. It is
what ZeRO is compared with, bit for bit and in time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.distributed import world_size
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import TrainConfig
from selfguide.training.engine.protocol import Layout, Step, keep_buffers_wide


class TorchEngine:
    """fp32, or bf16 weights with fp32 masters."""

    def __init__(
        self, student: Student, train: TrainConfig, *, dtype: torch.dtype, accumulation: int
    ) -> None:
        self.name = "torch"
        self.layout = Layout.of(student)
        self.start, self.stop = 0, self.layout.total
        parameters = [p for p in student.parameters() if p.requires_grad]
        self.module = student.to(dtype)
        keep_buffers_wide(self.module)
        self._weights = torch.cat([p.detach().flatten() for p in parameters])
        self._gradient = torch.zeros_like(self._weights)
        weights, gradients = self.layout.split(self._weights), self.layout.split(self._gradient)
        for name, parameter in self.module.named_parameters():
            parameter.data, parameter.grad = weights[name], gradients[name]
        self.master: Tensor = torch.nn.Parameter(
            self._weights.float() if dtype != torch.float32 else self._weights
        )
        self._optimiser = torch.optim.AdamW(
            [self.master],
            lr=train.learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self._clip, self._accumulation, self._micro = train.clip, accumulation, 0
        self.master.requires_grad_(False)

    def forward(
        self, x: Tensor, tau: Tensor, condition: Condition, features: Tensor | None
    ) -> Outputs:
        return self.module(x, tau, condition, features)

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
        # in fp64: torch's fp32 sum over one long vector loses the fourth digit on CPU
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
        applied = bool(torch.isfinite(gradient.sum()).item())
        if applied:
            if self._clip and norm + 1e-6 > self._clip:
                gradient = gradient * (self._clip / (norm + 1e-6))
            self._optimiser.param_groups[0]["lr"] = learning_rate
            self.master.grad = gradient
            self._optimiser.step()
            self.refresh()
        self._gradient.zero_()
        return Step(applied, norm)

    def refresh(self) -> None:
        if self.master.data_ptr() != self._weights.data_ptr():
            self._weights.copy_(self.master)

    def gather(self, shard: Tensor) -> Tensor:
        return shard

    def moments(self) -> tuple[Tensor, Tensor, int]:
        state = self._optimiser.state.get(self.master)
        if not state:
            return torch.zeros_like(self.master), torch.zeros_like(self.master), 0
        return state["exp_avg"], state["exp_avg_sq"], int(state["step"])

    def load_moments(self, first: Tensor, second: Tensor, count: int) -> None:
        step = torch.tensor(float(count), device=self.master.device)
        self._optimiser.state[self.master] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
