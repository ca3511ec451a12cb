"""Path x prediction -> loss. Velocity prediction, mean over elements (Liu et al. 2023; SiT)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfguide.paths import Path
from selfguide.randomness import normal, uniform
from selfguide.spec.config import PathConfig


def flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared error of the velocity per image, in fp32 whatever the network's dtype."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def draw_times(config: PathConfig, path: Path, seed: int, positions: Tensor) -> Tensor:
    """(B,) training noise-times of these images: uniform, or sigmoid of a normal (SD3, LightningDiT)."""
    if config.time_density == "uniform":
        return path.training_time(uniform(seed, "noise-time", positions, 1)[:, 0])
    n = normal(seed, "noise-time", positions, (1,))[:, 0]
    return torch.sigmoid(config.time_mean + config.time_std * n)
