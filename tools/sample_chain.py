"""`python -m tools.sample --chain`: the way of each image from noise, as its states or as the data estimated there.

SGFM's figures 19 and 20 (Hu et al. 2023, arXiv 2312.08825) show estimates of data, SGDM's figure 16 states.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.sampling.weak import build_denoiser
from selfguide.snapshot import Snapshot
from selfguide.spec.config import SamplerConfig


class Chain:
    """The states after some of a sampler's steps, the last among them: about `columns`, evenly spread."""

    def __init__(self, steps: int, columns: int) -> None:
        self.wanted = set(np.linspace(steps - 1, 0, min(columns, steps)).round().astype(int))
        self._batches: dict[int, list[Tensor]] = defaultdict(list)  # by step
        self._times: dict[int, float] = {}

    def see(self, step: int, tau: float, state: Tensor) -> None:
        if step in self.wanted:
            self._batches[step].append(state.float())
            self._times[step] = tau

    def states(self) -> Tensor:
        """(N, columns, C, H, W), the noisiest first."""
        return torch.stack(
            [torch.cat(self._batches[s]).cpu() for s in sorted(self._batches)], dim=1
        )

    @torch.no_grad()
    def estimates(
        self,
        snapshot: Snapshot,
        sampler: SamplerConfig,
        condition: Condition,
        seeds: Tensor,
        batch: int,
    ) -> Tensor:
        """(N, columns, C, H, W): the x0 that the guided network reads off each state; of the last the image itself.

        `condition` and `seeds` (N,) are those of the samples, in their order.
        """
        states, device = self.states(), snapshot.device
        times = [self._times[step] for step in sorted(self._times)]
        parts = []
        for rows in torch.arange(len(states)).split(batch):
            part = condition.map(lambda tensor, rows=rows: tensor[rows].to(device))  # type: ignore[misc]
            denoiser = build_denoiser(snapshot, part, sampler, seeds[rows].to(device))
            found = [
                denoiser.estimate(states[rows, column].to(device), tau).x0.cpu()
                for column, tau in enumerate(times[:-1])
            ]
            parts.append(torch.stack([*found, states[rows, -1]], dim=1))
        return torch.cat(parts)
