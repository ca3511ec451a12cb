"""What is trained beside the backbone and reads one of its layers, in the student's own forward."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.backbone import Backbone


class Branch(nn.Module, ABC):
    """A module on the tokens of the backbone's layer `layer`, counted from 1.

    Gradients reach the backbone up to that layer, unless the branch cuts them. Every parameter enters every forward.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @abstractmethod
    def forward(self, tokens: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """What the component of the same name reads in `Outputs.branches`, of tokens (B, T, D), extras first, at
        noise-times `tau` (B,).
        """

    def target(
        self, backbone: Backbone, x: Tensor, tau: Tensor, condition: Condition
    ) -> Tensor | None:
        """What the teacher's copy of it makes of every image, with the teacher's `backbone`; None where none asks."""
        return None
