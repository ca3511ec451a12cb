"""Exponential averages of the fp32 masters, kept where the masters are: one lerp on this rank's slice."""

from __future__ import annotations

import torch
from torch import Tensor

from selfguide.training.engine.protocol import Engine


class Averages:
    """One average per horizon. A horizon is a half-life in images, so it survives a change of batch."""

    def __init__(self, engine: Engine, halflives: tuple[int, ...], ramp: float) -> None:
        self._engine, self.halflives, self._ramp = engine, halflives, ramp
        self.shards: list[Tensor] = [engine.master.detach().clone() for _ in halflives]
        self.since = 0  # images at the last reset

    def update(self, batch: int, images: int) -> None:
        """After an applied step of `batch` images that brought the run to `images`.

        decay = 0.5 ** (batch / halflife), the half-life never above `ramp` of what was seen (EDM, Karras 2022).
        """
        for shard, halflife in zip(self.shards, self.halflives, strict=True):
            horizon = min(halflife, self._ramp * (images - self.since)) if self._ramp else halflife
            decay = 0.5 ** (batch / max(horizon, 1e-8))
            torch.lerp(shard, self._engine.master.detach(), 1 - decay, out=shard)

    def reset(self, images: int) -> None:
        """Every average becomes the live weights: a stage switch starts a new history."""
        for shard in self.shards:
            shard.copy_(self._engine.master)
        self.since = images

    def weights(self, index: int = 0) -> dict[str, Tensor]:
        """Full fp32 weights of one average by name, on every rank; all ranks call."""
        return self._engine.layout.split(self._engine.gather(self.shards[index]))
