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
from selfguide.training.engine.layout import Layout, Owned
from selfguide.training.engine.protocol import Engine, Moments, Step, keep_buffers_fp32


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
        trained = dict(self.module.named_parameters())
        self._weights = layout.flatten({n: trained[n].detach() for n in layout.names})
        self._gradient = torch.zeros_like(self._weights)
        weights, gradients = layout.split(self._weights), layout.split(self._gradient)
        for name in layout.names:
            trained[name].data, trained[name].grad = weights[name], gradients[name]
        self._flat = self._weights.float()  # the weights themselves in fp32
        owned = [Owned(g.start, g.stop, self._flat[g.start : g.stop]) for g in layout.groups]
        super().__init__(layout, owned, replicated=True)
        self._stepped = [torch.nn.Parameter(master) for master in self.masters]
        self._optimiser = torch.optim.AdamW(
            [
                {"params": [stepped], "weight_decay": group.weight_decay}
                for stepped, group in zip(self._stepped, layout.groups, strict=True)
            ],
            lr=train.learning_rate,
            betas=train.betas,
            fused=True,
        )
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
        # in fp64: torch's fp32 sum over one long vector loses the fourth digit on CPU
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        applied = torch.isfinite(gradient.sum())
        if self._clip:
            gradient *= (self._clip / (norm + 1e-6)).clamp(max=1.0)
        for stepped, mine in zip(self._stepped, self.cut(gradient), strict=True):
            stepped.grad = mine
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        # how torch's GradScaler tells a fused optimiser on the device to leave everything as it is
        self._optimiser.found_inf = (~applied).float()  # type: ignore[attr-defined]
        self._optimiser.step()
        self.refresh()
        self._gradient.zero_()
        return Step(applied, norm)

    def refresh(self) -> None:
        if self._flat.data_ptr() != self._weights.data_ptr():
            self._weights.copy_(self._flat)

    def moments(self) -> Moments:
        states = [self._optimiser.state.get(stepped) for stepped in self._stepped]
        held = [state for state in states if state]
        if not held:
            zeros = [tuple(torch.zeros_like(m) for m in self.masters) for _ in range(2)]
            return Moments(zeros[0], zeros[1], 0)
        first, second = (tuple(s[name] for s in held) for name in ("exp_avg", "exp_avg_sq"))
        return Moments(first, second, int(held[0]["step"]))

    def load_moments(self, moments: Moments) -> None:
        loaded = zip(self._stepped, moments.first, moments.second, strict=True)
        for stepped, first, second in loaded:
            step = torch.tensor(float(moments.count), device=stepped.device)
            self._optimiser.state[stepped] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
