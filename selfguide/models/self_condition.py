"""Self-conditioning: a network's own feature joins what its later layers read of time and condition (DDAE++).

Xiang et al. 2025 (arXiv 2505.10999), section 4.1: with z the mean over all tokens or positions of a designated layer,
layers behind it read e + s(t) * P(z) in place of the embedding e of time and condition, element by element, and
gradients flow through z. Their code is not published; P as one linear map and s as a second embedding of the time have
the published numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.models.blocks import TimeEmbedding, sinusoid
from selfguide.randomness import stream_seed
from selfguide.spec.architecture import Architecture


class SelfCondition(nn.Module):
    """s(t) * P(z), or P(z) alone with `net.self_add` direct.

    It begins as zeros, so that a fresh network predicts what it predicts without: the last map of s is zero, or with
    direct P itself. The other weights are Glorot's, from a stream of their own: whatever else is drawn of the seed
    stays as it is.

    Args:
        frequencies: width of the sinusoid that `wave` makes of the time.
        width: of the vector that the blocks read.
    """

    def __init__(
        self,
        net: Architecture,
        frequencies: int,
        width: int,
        wave: Callable[[Tensor, int], Tensor] = sinusoid,
    ) -> None:
        super().__init__()
        assert net.self_condition is not None
        # the layer that is read, counted from 1
        self.number = net.layer(net.self_condition)
        features = net.layers[self.number - 1].width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(torch.initial_seed(), "self_condition", 0))
            self.project = nn.Linear(features, width)
            self.scale = (
                TimeEmbedding(frequencies, width, wave) if net.self_add == "adaptive" else None
            )
            self._initialise()

    def _initialise(self) -> None:
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_((self.project if self.scale is None else self.scale.out).weight)

    def forward(self, embedding: Tensor, feature: Tensor, time: Tensor) -> Tensor:
        """What later blocks read, (B, width), activated.

        Args:
            embedding: (B, width), before its activation.
            feature: z, (B, features).
            time: (B,) as the network is fed it.
        """
        added = self.project(feature)
        if self.scale is not None:
            added = self.scale(time) * added
        return F.silu(embedding + added)
