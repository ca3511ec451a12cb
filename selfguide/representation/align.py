"""Self-representation alignment (SRA, Jiang et al. 2025, arXiv 2505.02831, section 3).

The student's early layer, through a projector, is drawn to a later layer of the teacher, the averaged network, which
sees the same image in the same noise at a lower noise-time: tau less a uniform share of `noise_gap`, and never below
the path's end, which is 0 for their flow.
The distance is the smooth L1 of their code (beta 0.05), the mean over tokens and channels. The teacher reads the step's
condition, and no gradient reaches it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.guidance.component import Component, Inputs, Stepped, Weights
from selfguide.networks.branch import Branch
from selfguide.networks.projector import NAME
from selfguide.networks.student import Outputs, Student
from selfguide.randomness import uniform
from selfguide.spec.config import Config
from selfguide.spec.schedules import due

# where the square of the distance becomes its absolute value, as in their code
BETA = 0.05


class Align(Component):
    """The distance of one micro-batch; where online guidance keeps no teacher, it refreshes it as well."""

    name, wants_teacher = NAME, True

    def __init__(self, config: Config) -> None:
        assert config.align.weight is not None
        self.weight, self.settings, self.seed = config.align.weight, config.align, config.seed
        self.preconditioning = build_preconditioning(config.path)
        self.keeps_teacher = not config.guidance.learns_online
        # of the micro-batches of a step: what each is conditioned on
        self._conditions: list[tuple[Batch, Condition]] = []

    def condition(self, batch: Batch, teacher: Student | None, inputs: Inputs) -> Inputs:
        if self._conditions and self._conditions[0][0].images != batch.images:
            self._conditions = []
        self._conditions.append((batch, inputs.condition))
        return inputs

    def own_loss(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> Tensor:
        assert teacher is not None and outputs.branches is not None
        condition = next(each for of, each in self._conditions if of is batch)
        wanted = self.target(batch, condition, teacher).float()
        found = outputs.branches[NAME].float()
        return self.weight * F.smooth_l1_loss(found, wanted, beta=BETA)

    def lower(self, batch: Batch) -> Tensor:
        """The teacher's noise-times (B,), fp32, a pure function of the images' positions."""
        u = uniform(self.seed, "align-noise-gap", batch.position, 1)[:, 0]
        tau = batch.tau.float()
        lower = tau - self.settings.noise_gap * u.to(tau.device)
        # below where its path ends a network was never trained: of EDM, ln(sigma) would go to minus infinity
        return torch.maximum(lower, tau.clamp(max=self.preconditioning.path.last))

    @torch.no_grad()
    def target(self, batch: Batch, condition: Condition, teacher: Student) -> Tensor:
        """Tokens (B, T, D) of the teacher's layer in less noise."""
        tau = self.lower(batch)
        dtype = next(teacher.parameters()).dtype
        x = self.preconditioning.noised(batch.x0, batch.eps, tau).to(dtype)
        branch = cast(Branch, teacher.branches[NAME])
        found = branch.target(teacher.backbone, x, tau, condition)
        assert found is not None
        return found

    def after_average(self, weights: Weights, step: Stepped) -> None:
        if self.keeps_teacher and due(self.settings.teacher_refresh, step.images, step.batch):
            weights.refresh_teacher(buffers=True)
