"""Averages of the fp32 masters, kept where the masters are: one lerp of all horizons on what this rank owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        runs = _runs(space.masters)
        # masters that lie end to end (n,), and all averages of them (averages, n)
        self._pairs = [(whole, whole.repeat(len(self.specs), 1)) for whole, _ in runs]
        parts = [
            averages.split(sizes, dim=1)
            for (_, averages), (_, sizes) in zip(self._pairs, runs, strict=True)
        ]
        self.shards: list[Shard] = [
            tuple(part[index] for split in parts for part in split)
            for index in range(len(self.specs))
        ]
        self.since = 0  # images at the last reset

    def update(self, batch: int, images: int, applied: Tensor) -> None:
        """After a step of `batch` images that brought the run to `images`; one that was not applied moves nothing.

        `applied` is the step's scalar on the device, and is not read on the host.
        """
        shares = torch.stack(
            [
                applied * (1 - spec.decay(batch, images - self.since, *self._ramp))
                for spec in self.specs
            ]
        )
        for masters, averages in self._pairs:
            averages.lerp_(masters, shares[:, None])

    def reset(self, images: int) -> None:
        """Every average becomes the live weights: a stage switch starts a new history."""
        for masters, averages in self._pairs:
            averages.copy_(masters)
        self.since = images

    def weights(self, index: int = 0) -> dict[str, Tensor]:
        """Full fp32 weights of one average by name, on every rank; all ranks call."""
        return self._space.layout.split(self._space.gather(self.shards[index]))


def _runs(shard: Shard) -> list[tuple[Tensor, list[int]]]:
    """Tensors that lie end to end in memory as one, and their sizes: a kernel works on all of them at once."""
    found: list[tuple[Tensor, list[int]]] = []
    for tensor in shard:
        if found and _follows(tensor, found[-1][0]):
            whole, sizes = found.pop()
            found.append(
                (whole.as_strided((len(whole) + len(tensor),), (1,)), [*sizes, len(tensor)])
            )
        else:
            found.append((tensor, [len(tensor)]))
    return found


def _follows(tensor: Tensor, whole: Tensor) -> bool:
    if tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return False
    return int(tensor.storage_offset()) == int(whole.storage_offset()) + len(whole)
