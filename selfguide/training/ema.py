"""Averages of the fp32 masters, kept where the masters are: one lerp on what this rank owns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from selfguide.spec.averages import AverageSpec, Count, Rise
from selfguide.training.engine.layout import ParameterSpace, Shard


class Averages:
    """One average per spec. Horizons are counted in images, so they survive a change of batch."""

    def __init__(
        self,
        space: ParameterSpace,
        specs: Sequence[AverageSpec],
        ramp: float,
        rise: Rise = "share",
        count: Count = "after",
    ) -> None:
        """Keeps copies of the masters; `ramp`, `rise` and `count` are those of `AverageSpec.decay`."""
        self._space, self.specs, self._ramp = space, tuple(specs), (ramp, rise, count)
        self.shards: list[Shard] = [tuple(m.clone() for m in space.masters) for _ in specs]
        self.since = 0  # images at the last reset

    def update(self, batch: int, images: int, applied: Tensor) -> None:
        """After a step of `batch` images that brought the run to `images`; one that was not applied moves nothing.

        `applied` is the step's scalar on the device, and is not read on the host.
        """
        for spec, shard in zip(self.specs, self.shards, strict=True):
            weight = applied * (1 - spec.decay(batch, images - self.since, *self._ramp))
            for average, master in zip(shard, self._space.masters, strict=True):
                average.lerp_(master, weight)

    def reset(self, images: int) -> None:
        """Every average becomes the live weights: a stage switch starts a new history."""
        for shard in self.shards:
            for average, master in zip(shard, self._space.masters, strict=True):
                average.copy_(master)
        self.since = images

    def weights(self, index: int = 0) -> dict[str, Tensor]:
        """Full fp32 weights of one average by name, on every rank; all ranks call."""
        return self._space.layout.split(self._space.gather(self.shards[index]))
