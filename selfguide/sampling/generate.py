"""Sample sets in which image i is a function of the weights and of seed + i: its noise, its group, its steps' noise.

With a fixed-step sampler this holds up to the rounding of batched kernels; an adaptive one also looks at its batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.samplers import Callback, sample, settings
from selfguide.randomness import normal
from selfguide.sampling.condition_sampler import Prior, condition_sampler
from selfguide.sampling.groups import sampling_condition
from selfguide.sampling.weak import build_denoiser
from selfguide.snapshot import Snapshot
from selfguide.spec.config import SamplerConfig
from shards.errors import UserError


def generate(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    *,
    seed: int,
    count: int,
    batch: int,
    groups: Tensor | None = None,
    prior: Prior = "empirical",
) -> Iterator[tuple[Tensor, int]]:
    """Batches of model-space samples (B, C, H, W) with the network evaluations they took.

    `groups` (count,) fixes each image's group; by default conditions are drawn, groups by `prior`.
    """
    drawn = condition_sampler(snapshot, prior)
    for start in range(0, count, batch):
        index = torch.arange(start, min(start + batch, count))
        if groups is not None and snapshot.conditioned:
            condition = sampling_condition(snapshot.guidance, snapshot.student, groups[index])
        else:
            condition = drawn(seed + index)
        yield _batch(snapshot, sampler, condition, seed + index)


def generate_each(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    condition: Condition,
    seeds: Tensor,
    *,
    batch: int,
    callback: Callback | None = None,
) -> Iterator[tuple[Tensor, int]]:
    """An image on the CPU for each of `seeds` (N,) and of `condition` (N), in batches, and network evaluations."""
    for start in range(0, len(seeds), batch):
        span = slice(start, start + batch)
        part = condition.map(lambda tensor, span=span: tensor[span])  # type: ignore[misc]
        yield _batch(snapshot, sampler, part, seeds[span], callback)


class NotFiniteError(UserError):
    """Samples are NaN or infinite, as those of too much guidance are."""


def check_finite(samples: Tensor, first: int) -> None:
    """Returns where samples (B, C, H, W) are finite: as levels NaN would be black, and have a score like any other.

    Raises:
        NotFiniteError: one is not; they are counted from `first`.
    """
    bad = ~torch.isfinite(samples).flatten(1).all(1)
    if bad.any():
        raise NotFiniteError(
            f"sample {first + int(bad.int().argmax())} of this snapshot is NaN or infinite: it cannot be scored; look "
            "at its loss, or sample with more steps or less guidance"
        )


def draw(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    condition: Condition,
    seeds: Tensor,
    callback: Callback | None = None,
) -> tuple[Tensor, Denoiser]:
    """One batch of samples (B, C, H, W) where the student is, and the denoiser with what it ran for them."""
    seeds = seeds.to(snapshot.device)
    condition = condition.map(lambda tensor: tensor.to(snapshot.device))
    net = snapshot.student.backbone.net
    denoiser = build_denoiser(snapshot, condition, sampler, seeds)
    noise = normal(0, "sample-noise", seeds, (net.channels, net.size, net.size))
    made = sample(
        denoiser=denoiser, noise=noise, seeds=seeds, callback=callback, **settings(sampler)
    )
    return made, denoiser


def _batch(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    condition: Condition,
    seeds: Tensor,
    callback: Callback | None = None,
) -> tuple[Tensor, int]:
    made, denoiser = draw(snapshot, sampler, condition, seeds, callback)
    return made.cpu(), denoiser.evaluations
