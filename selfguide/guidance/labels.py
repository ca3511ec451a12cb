"""Human labels from the shards, and what guidance sources have in common: dropping conditions, counting groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.conditions import Condition
from selfguide.guidance.component import Component, Inputs
from selfguide.networks.student import Student
from selfguide.randomness import uniform
from selfguide.spec.config import LabelGuidance


class LabelSource(Component):
    """Conditions on labels; sampling draws them as often as they occur in the shards."""

    name = "guidance"

    def __init__(self, config: LabelGuidance, histogram: list[float], seed: int) -> None:
        self.config, self.seed = config, seed
        self.histogram = histogram

    def condition(self, batch: Batch, teacher: Student | None, inputs: Inputs) -> Inputs:
        assert batch.label is not None  # submit checked that the shards carry labels
        labels = Condition.of(id=batch.label)
        dropped = drop_images(self.seed, batch.position, self.config.drop)
        return replace(inputs, condition=labels.drop(dropped))

    def metadata(self) -> dict[str, Any]:
        return {
            "source": "labels",
            "told": True,
            "p": frequencies(self.histogram),
            "label_free": False,
        }


def drop_images(seed: int, positions: Tensor, rate: float) -> Tensor:
    """(B,) bool: the one place where conditions are dropped for classifier-free guidance (Ho & Salimans 2022)."""
    return drop_patches(seed, positions, rate, 1)[:, 0]


def drop_patches(seed: int, positions: Tensor, rate: float, patches: int) -> Tensor:
    """(B, L) bool: each of an image's patches by itself, as SGFM drops them."""
    return uniform(seed, "condition-drop", positions, patches) < rate


def frequencies(counts: list[float]) -> list[float]:
    """Counts as shares of their sum."""
    total = sum(counts)
    return [count / total for count in counts]
