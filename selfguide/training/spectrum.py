"""The loss by noise level and by condition: what a mean over all of them hides.

Losses stay on the device until a report, where one all-reduce of a few hundred bytes makes them those of all ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.diffusion.conditions import CONDITIONED, NULL, UNCONDITIONAL
from selfguide.spec.drift import BINS

# by their number, from 0
KINDS = ("conditioned", "null", "unconditional")
assert (CONDITIONED, NULL, UNCONDITIONAL) == (0, 1, 2)
# micro-batches that are kept before they are added up: one addition a report costs less than one a step
_KEPT = 32


class Spectrum:
    """Sums of losses in `BINS` equal intervals of noise-time, apart for each kind of condition."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: Tensor | None = None

    def add(self, losses: Tensor, tau: Tensor, state: Tensor) -> None:
        """Of a micro-batch: losses (B,), noise-times (B,), and what each image, or each patch, is conditioned on."""
        self._kept.append((losses.detach(), tau, state))
        # the states of patches are many
        if len(self._kept) >= _KEPT or state.dim() > 1:
            self._fold()

    def _fold(self) -> None:
        if not self._kept:
            return
        losses = torch.cat([each.float() for each, _, _ in self._kept])
        tau = torch.cat([each for _, each, _ in self._kept])
        kinds = torch.cat([_shares(state) for _, _, state in self._kept])
        self._kept = []
        # of a step that is skipped; it is counted by itself
        finite = losses.isfinite()
        number = torch.where(finite, tau * BINS, 0.0).long().clamp(0, BINS - 1)
        bins = number[:, None] == torch.arange(BINS, device=losses.device)
        weight = kinds * finite[:, None]  # (B, kinds)
        value = torch.where(finite, losses, 0.0)
        both = torch.stack((weight * value[:, None], weight)).double()  # (2, B, kinds)
        found = torch.einsum("bn,sbk->skn", bins.double(), both)
        self._sums = found if self._sums is None else self._sums + found

    def take(self) -> dict[str, dict[str, list[float | None]]]:
        """All ranks call: mean loss and images of each bin since the last call, by kind, and of all kinds together.

        A bin that no image fell into has no loss; a kind that did not occur is left out.
        """
        self._fold()
        sums = torch.zeros(2, len(KINDS), BINS, dtype=torch.float64)
        if self._sums is not None:
            sums = self._sums.cpu()
        self._sums = None
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, images = sums
        if not images.sum():
            return {}
        named = dict(zip(KINDS, zip(loss, images, strict=True), strict=True))
        named = {"all": (loss.sum(0), images.sum(0)), **named}
        return {
            name: {
                "loss": [v / n if n else None for v, n in zip(*_lists(v, n), strict=True)],
                "images": n.tolist(),
            }
            for name, (v, n) in named.items()
            if n.sum()
        }


def _lists(*tensors: Tensor) -> list[list[float]]:
    return [each.tolist() for each in tensors]


def _shares(state: Tensor) -> Tensor:
    """(B, kinds) how much of each image is of each kind, from states (B,), or (B, L) of its patches."""
    alike = (state[..., None] == torch.arange(len(KINDS), device=state.device)).float()
    return alike.mean(1) if alike.dim() > 2 else alike
