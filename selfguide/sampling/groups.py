"""Groups of a published student: which it sees in an image, which are drawn, and the condition that stands for one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.guidance.prototypes import assign, condition_on, extract
from selfguide.networks.student import Student
from selfguide.randomness import normal, uniform
from selfguide.snapshot import Snapshot
from selfguide.spec.config.guidance import HeadSettings
from shards.errors import UserError


def head_of(snapshot: Snapshot) -> HeadSettings:
    """The settings of the student's online head.

    Raises:
        UserError: it has none.
    """
    guidance = snapshot.config.guidance
    head = guidance.head(snapshot.student.backbone.net)
    if head is None:
        raise UserError(
            f"guidance.source={guidance.source} has no prototypes to compare an image with; name a group instead"
        )
    return head


def features_of(snapshot: Snapshot, x0: Tensor, positions: Tensor | None = None) -> Tensor:
    """(rows, F) what the head reads of images in model space (B, C, H, W), on the snapshot's device.

    Each image meets the noise of its position (B,). By default all meet the same, so that an answer does not depend on
    what else is asked.
    """
    single = torch.zeros(1) if positions is None else positions
    eps = normal(0, "extraction-noise", single, tuple(x0.shape[1:])).expand_as(x0)
    preconditioning = build_preconditioning(snapshot.config.path)
    x0, eps = x0.to(snapshot.device), eps.to(snapshot.device)
    return extract(snapshot.student, preconditioning, head_of(snapshot).noise_time, x0, eps)


def nearest_prototypes(snapshot: Snapshot, x0: Tensor, positions: Tensor | None = None) -> Tensor:
    """(rows,) ids of the prototypes nearest to images; see `features_of`."""
    return assign(snapshot.student, features_of(snapshot, x0, positions))


def queried_prototypes(snapshot: Snapshot, x0: Tensor, numbers: Tensor) -> Tensor:
    """(rows,) ids of the prototypes nearest to query images, in noise as `OnlineGuidance.query_noise` says.

    Images with one of their own are known by `numbers` (B,): equal ones meet equal noise, whatever else is asked.
    """
    own = head_of(snapshot).query_noise == "own"
    return nearest_prototypes(snapshot, x0, numbers if own else None)


def patch_layout(snapshot: Snapshot, x0: Tensor, numbers: Tensor | None = None) -> Condition:
    """The prototype of each patch of images in model space (B, C, H, W): SGFM's patch-layout query.

    `numbers` (B,) as in `queried_prototypes`; by default the images are numbered from 0.
    """
    numbers = torch.arange(len(x0)) if numbers is None else numbers
    return condition_on(snapshot.student, queried_prototypes(snapshot, x0, numbers), len(x0))


def sample_group_ids(p: list[float], seed: int, positions: Tensor) -> Tensor:
    """(B,) ids drawn from p(k) by inverse transform: a pure function of (seed, position)."""
    edges = torch.tensor(p, dtype=torch.float64, device=positions.device).cumsum(0)
    u = uniform(seed, "condition", positions, 1)[:, 0].double() * edges[-1]
    return torch.searchsorted(edges, u, right=True).clamp_max(len(p) - 1)


def sampling_condition(metadata: dict[str, Any], student: Student, ids: Tensor) -> Condition:
    """The condition under which a published student samples from groups `ids` (B,)."""
    if metadata["source"] in ("labels", "sidecar"):
        return Condition.of(id=ids)
    return condition_on(student, ids, len(ids))
