"""What a sample costs under a sampler: evaluations of the network, and the FLOPs of all forwards that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from selfguide.diffusion.denoiser import Ran
from selfguide.sampling.condition_sampler import condition_sampler
from selfguide.sampling.generate import draw
from selfguide.snapshot import Snapshot
from selfguide.spec.config import SamplerConfig


@dataclass(frozen=True)
class Cost:
    """Of one image; of an adaptive sampler that of the first image alone."""

    # network evaluations, guided or not
    evaluations: int
    # of products of matrices and convolutions, those of the weak model included
    flops: int


@torch.no_grad()
def cost(snapshot: Snapshot, sampler: SamplerConfig) -> Cost:
    """What one image of the snapshot costs: draws the first, and counts the forwards that it took.

    Guidance costs nothing outside of its interval, a head as much as it is, and another network a forward of it.
    """
    seeds = torch.zeros(1, dtype=torch.int64)
    condition = condition_sampler(snapshot)(seeds)
    x, denoiser = draw(snapshot, sampler, condition, seeds)
    ways: dict[Ran, Callable[[], object]] = {
        "strong": lambda: denoiser.net(x, 0.5, denoiser.condition),
        "weak": lambda: denoiser.weak.alone(denoiser, x, 0.5),
        "both": lambda: denoiser.weak.both(denoiser, x, 0.5),
    }
    flops = sum(count * _counted(ways[ran]) for ran, count in denoiser.ran.items())
    return Cost(denoiser.evaluations, flops)


def _counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
