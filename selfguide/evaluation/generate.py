"""Sample sets in which noise and group of image i are pure functions of (seed, i).

With a fixed-step sampler the image is too, up to rounding; an adaptive one also depends on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from selfguide.conditions import Condition
from selfguide.denoiser import Denoiser
from selfguide.guidance.source import draw_groups, sampling_condition
from selfguide.paths import build_path
from selfguide.randomness import normal
from selfguide.samplers import sample
from selfguide.spec.config import SamplerConfig
from selfguide.student import Sampled
from selfguide.training.snapshot import Snapshot


def generate(
    snapshot: Snapshot,
    sampler: SamplerConfig,
    *,
    seed: int,
    count: int,
    batch: int,
    groups: Tensor | None = None,
) -> Iterator[tuple[Tensor, int]]:
    """Batches of model-space samples (B, C, H, W) with the network evaluations they took.

    `groups` (count,) fixes each image's group; by default they are drawn from the snapshot's p(k).
    """
    net = snapshot.student.backbone.net
    for start in range(0, count, batch):
        index = torch.arange(start, min(start + batch, count))
        noise = normal(seed, "sample-noise", index, (net.channels, net.size, net.size))
        condition = _condition(snapshot, seed, index, groups)
        denoiser = Denoiser(
            Sampled(snapshot.student),
            build_path(snapshot.config.path),
            condition,
            sampler.g,
            sampler.interval,
        )
        options: dict[str, Any] = (
            {"rtol": sampler.rtol, "atol": sampler.atol} if sampler.name == "dopri5" else {}
        )
        yield (
            sample(sampler.name, denoiser, noise, steps=sampler.steps, **options),
            denoiser.evaluations,
        )


def _condition(snapshot: Snapshot, seed: int, index: Tensor, groups: Tensor | None) -> Condition:
    state = snapshot.guidance
    if not state["told"]:
        return Condition.unconditional(len(index))
    ids = groups[index] if groups is not None else draw_groups(state["p"], seed, index)
    return sampling_condition(state, snapshot.student, ids)
