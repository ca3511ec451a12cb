"""The small projector between two layers' features (SRA, Jiang et al. 2025, arXiv 2505.02831): Linear, SiLU, Linear."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.backbone import Backbone
from selfguide.networks.branch import Branch

# of the component that trains it, and of its branch
NAME = "align"


class Projector(Branch):
    """Tokens (B, T, D) of one layer -> (B, T, D_out), to be compared with those of another; hidden width D + D_out.

    Args:
        teacher_layer: that other one, of the teacher, counted from 1.
    """

    def __init__(self, layer: int, teacher_layer: int, width: int, out: int) -> None:
        super().__init__(layer)
        self.teacher_layer = teacher_layer
        self.hidden, self.out = nn.Linear(width, width + out), nn.Linear(width + out, out)
        for linear in (self.hidden, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        return self.out(F.silu(self.hidden(tokens)))

    def target(self, backbone: Backbone, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """The teacher's tokens (B, T, D_out)."""
        return backbone.features(x, tau, condition, self.teacher_layer)
