"""Path x prediction -> loss. Velocity prediction, mean over elements (Liu et al. 2023; SiT)."""

from __future__ import annotations

from torch import Tensor


def flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) mean squared error of the velocity per image, in fp32 whatever the network's dtype."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
