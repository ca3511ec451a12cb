"""Judges whether a run still learns: by the steps that were skipped, and by the loss.

A step whose gradients are not finite changes nothing and is skipped. One now and then is harmless, while a run that
skips most of them trains nothing and must not end as finished. Steps are counted on the device and read at reports.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selfguide.spec.config import TrainConfig

# steps over which `train.skipped_share` is taken
WINDOW = 100
# reports whose median loss is what `train.loss_spike` compares with
REPORTS = 10
_COUNTS = ("steps", "skipped", "longest", "row")


@dataclass
class Stability:
    """Counts the skipped steps of a run over its attempts; each rank has one, and all come to the same verdict."""

    limits: TrainConfig
    # since the last report: steps, and on the device those skipped, the longest row of them, and the row of now
    steps: int = 0
    skipped: Tensor | int = 0
    longest: Tensor | int = 0
    row: Tensor | int = 0
    # (steps, skipped) of the newest reports that make up the window, and the newest losses
    recent: list[tuple[int, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    # images at the newest report that found nothing, behind a step that was not skipped
    good: int = 0

    def stepped(self, applied: Tensor) -> None:
        """Counts a step; `applied` is a bool scalar on the device, which is not read."""
        self.row = torch.where(applied, 0, self.row + 1)
        self.longest = self.row.clamp(min=self.longest)
        self.skipped = self.skipped + ~applied
        self.steps += 1

    def judge(self, loss: float | None, *, last: bool) -> str | None:
        """Returns why training is broken, or None; `loss` is a report's mean over ranks, `last` says training ends."""
        longest = int(self.longest)
        self.recent.append((self.steps, int(self.skipped)))
        while sum(steps for steps, _ in self.recent[1:]) >= WINDOW:
            del self.recent[0]
        self.steps, self.skipped, self.longest = 0, 0, self.row
        limits = self.limits
        if limits.skips is not None and longest >= limits.skips:
            return (
                f"{longest:,} steps in a row were skipped, since their gradients were not finite "
                f"(train.skips={limits.skips})"
            )
        steps, skipped = (sum(column) for column in zip(*self.recent, strict=True))
        share = limits.skipped_share
        if share is not None and (last or steps >= WINDOW) and skipped > share * steps:
            return (
                f"{skipped:,} of the last {steps:,} steps were skipped, since their gradients were not finite "
                f"(train.skipped_share={share:g})"
            )
        return self._spike(loss)

    def _spike(self, loss: float | None) -> str | None:
        if loss is None or not math.isfinite(loss):
            return None  # of skipped steps alone, which are counted above
        before = self.losses[-REPORTS:]
        self.losses = [*before, loss][-REPORTS:]
        if self.limits.loss_spike is None or len(before) < REPORTS:
            return None
        usual = statistics.median(before)
        # of losses above 0 this is `train.loss_spike` times the usual one; one with learned uncertainty falls below 0,
        # and where it passes 0 the usual one is no measure of how much it moves
        size = statistics.median(map(abs, before))
        if loss <= usual + (self.limits.loss_spike - 1) * size:
            return None
        return (
            f"the loss rose to {loss:.4g} from {usual:.4g}, the median of the {REPORTS} reports before "
            f"(train.loss_spike={self.limits.loss_spike:g})"
        )

    def plain(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        counts = {name: int(getattr(self, name)) for name in _COUNTS}
        return {**counts, "recent": self.recent, "losses": self.losses, "good": self.good}

    def load(self, plain: Mapping[str, Any] | None, images: int) -> None:
        """From the manifest of a checkpoint at so many images; earlier ones hold none, or no `good`."""
        self.good = images if plain is None else int(plain.get("good", images))
        if plain is not None:
            self.steps, self.skipped, self.longest, self.row = (
                int(plain[name]) for name in _COUNTS
            )
            self.recent = [(int(steps), int(skipped)) for steps, skipped in plain["recent"]]
            self.losses = list(plain["losses"])
