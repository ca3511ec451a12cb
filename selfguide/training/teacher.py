"""The teacher: a compute-dtype copy of the averaged student that online guidance reads at every step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from selfguide.networks.student import Student


class Teacher:
    """Weights from the average, buffers from the student (averaged statistics would lag the head they serve)."""

    def __init__(self, student: Student) -> None:
        self.module = copy.deepcopy(student).eval().requires_grad_(False)

    @torch.no_grad()
    def refresh(
        self, weights: dict[str, Tensor], student: Student, *, buffers: bool = True
    ) -> None:
        """Takes averaged `weights` (fp32, by name) and, with `buffers`, those of `student`."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(weights[name])
        if buffers:
            for mine, theirs in zip(self.module.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)
