"""What a guidance source is, and the two that need no features: none and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.networks.student import Batch, Outputs, Student
from selfguide.randomness import uniform
from selfguide.spec.config import LabelGuidance


class Source(Protocol):
    """Meets the loop through three methods; every rank calls each of them equally often."""

    def condition(self, batch: Batch, teacher: Student | None) -> Condition:
        """What the network is told about each image of the batch."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """The source's own objective of this step, a scalar, or None."""

    def state(self) -> dict[str, Any]:
        """JSON for the snapshot: how to draw conditions (`p`), and whether anything saw labels."""


@runtime_checkable
class Resumable(Protocol):
    """A source with state of its own that a resumed run must find again."""

    def held(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, whole on rank 0; all ranks call."""

    def restore(self, held: Mapping[str, Tensor], rank: int) -> None:
        """From what was held, this rank's part of it, whatever the world size then and now."""


class NoSource:
    """Unconditional."""

    def condition(self, batch: Batch, teacher: Student | None) -> Condition:
        return Condition.unconditional(len(batch.x0), batch.x0.device)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        return None

    def state(self) -> dict[str, Any]:
        return {"source": "none", "told": False, "p": None, "label_free": True}


class LabelSource:
    """Human labels; the frequency of labels in the shards is what sampling draws from."""

    def __init__(self, config: LabelGuidance, histogram: list[float], seed: int) -> None:
        self.config, self.seed = config, seed
        self.histogram = histogram

    def condition(self, batch: Batch, teacher: Student | None) -> Condition:
        assert batch.label is not None  # submit checked that the shards carry labels
        return Condition.told(id=batch.label).drop(
            dropped(self.seed, batch.position, self.config.drop)
        )

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        return None

    def state(self) -> dict[str, Any]:
        return {
            "source": "labels",
            "told": True,
            "p": frequencies(self.histogram),
            "label_free": False,
        }


def dropped(seed: int, positions: Tensor, rate: float) -> Tensor:
    """(B,) bool: the one place where conditions are dropped for classifier-free guidance (Ho & Salimans 2022)."""
    return dropped_patches(seed, positions, rate, 1)[:, 0]


def dropped_patches(seed: int, positions: Tensor, rate: float, patches: int) -> Tensor:
    """(B, L) bool: each of an image's patches by itself, as SGFM drops them."""
    return uniform(seed, "condition-drop", positions, patches) < rate


def frequencies(counts: list[float]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts]


def sum_counts(counts: Tensor) -> Tensor:
    """Integer counts added over ranks."""
    total = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def draw_groups(p: list[float], seed: int, positions: Tensor) -> Tensor:
    """(B,) ids drawn from p(k) by inverse transform: a pure function of (seed, position)."""
    edges = torch.tensor(p, dtype=torch.float64, device=positions.device).cumsum(0)
    u = uniform(seed, "condition", positions, 1)[:, 0].double() * edges[-1]
    return torch.searchsorted(edges, u, right=True).clamp_max(len(p) - 1)


def sampling_condition(state: dict[str, Any], student: Student, ids: Tensor) -> Condition:
    """The condition that tells a published student to draw from groups `ids` (B,)."""
    if state["source"] in ("labels", "sidecar"):
        return Condition.told(id=ids)
    assert student.head is not None
    return Condition.told(dense=student.head.told_rows()[ids])
