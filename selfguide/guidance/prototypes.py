"""What a student with an online head knows of images: features, their nearest prototypes, conditions of those."""

from __future__ import annotations

import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.preconditioning import Preconditioning
from selfguide.networks.student import Student


@torch.no_grad()
def extract(
    student: Student,
    preconditioning: Preconditioning,
    noise_time: float,
    x0: Tensor,
    eps: Tensor,
) -> Tensor:
    """(rows, F) unconditional features of images noised to `noise_time`."""
    tau = x0.new_full((len(x0),), noise_time, dtype=torch.float32)
    x = preconditioning.noised(x0, eps, tau).to(next(student.parameters()).dtype)
    return unconditional_features(student, x, tau)


@torch.no_grad()
def unconditional_features(student: Student, x: Tensor, tau: Tensor) -> Tensor:
    """(rows, F) features of images that are noised already."""
    return student.features(x, tau, Condition.unconditional(len(x), x.device))


@torch.no_grad()
def assign(student: Student, features: Tensor) -> Tensor:
    """(rows,) nearest prototypes under a student in eval mode."""
    assert student.head is not None
    return student.head(features).argmax(1)


@torch.no_grad()
def condition_on(student: Student, ids: Tensor, images: int) -> Condition:
    """The prototypes `ids` (rows,) of so many images: one each, or one for each of their patches."""
    assert student.head is not None
    rows = student.head.condition_rows()[ids]  # (rows, P)
    if student.pooling == "patch":
        return Condition.of(patch=rows.view(images, len(ids) // images, -1))
    return Condition.of(dense=rows)
