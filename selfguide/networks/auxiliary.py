"""The output layer that internal guidance puts behind a middle block (Zhou et al. 2025, arXiv 2512.24176).

A norm, shift and scale by an embedding of the time, and a linear map to patches: DiT's final layer, zero at the start.
Theirs reads the network's own embedding of time and class. Ours embeds the time by itself, and what the network is
conditioned on reaches it through the tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.blocks import TimeEmbedding, time_input, unpatchify
from selfguide.networks.branch import Branch
from selfguide.spec.architecture import PatchTransformer
from selfguide.spec.dit import TIME_FREQUENCIES

# of the component that trains it, and of its branch
NAME = "auxiliary"


class AuxiliaryHead(Branch):
    """Tokens (B, T, D) -> what the whole network predicts, (B, C, H, W) without a learned sigma."""

    def __init__(self, net: PatchTransformer, layer: int) -> None:
        super().__init__(layer)
        self.net = net
        self.time = TimeEmbedding(TIME_FREQUENCIES, net.width)
        self.modulation = nn.Linear(net.width, 2 * net.width)
        self.out = nn.Linear(net.width, net.patch**2 * net.channels)
        for linear in (self.time.hidden, self.time.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for linear in (self.modulation, self.out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        net = self.net
        time = F.silu(self.time(time_input(net.time, tau, whole=net.whole_index)))
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)
        patches = tokens[:, -net.tokens :]
        normed = F.layer_norm(patches, patches.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return unpatchify(self.out(normed), net.edge, net.patch, net.channels)
