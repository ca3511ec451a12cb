"""Internal guidance's loss: a head at a middle layer learns what the whole network learns.

Zhou et al. 2025, arXiv 2512.24176: L = L_final + weight L_middle, both the denoising loss of the same images in the
same noise. Sampling leads away from the head, at the cost of the head alone (`selfguide.diffusion.denoiser.Head`).
"""

from __future__ import annotations

from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.objectives import build_objective
from selfguide.guidance.component import Component
from selfguide.networks.auxiliary import NAME
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import Config


class Auxiliary(Component):
    """The denoising loss of the head, of each micro-batch by itself."""

    name = NAME

    def __init__(self, config: Config) -> None:
        assert config.auxiliary.weight is not None
        self.weight, self.objective = config.auxiliary.weight, build_objective(config.path)

    def own_loss(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> Tensor:
        assert outputs.branches is not None
        # how hard a noise level is, is learned from the network's own error alone
        u = None if outputs.log_variance is None else outputs.log_variance.detach()
        made = outputs.branches[NAME]
        return self.weight * self.objective.losses(made, batch.x0, batch.eps, batch.tau, u).mean()
