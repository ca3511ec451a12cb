"""Token routing: in training a share of the patch tokens skips the middle blocks (Krause et al. 2025, "TREAD").

The first and the last blocks see every token; between them a random subset goes on, another one for each image and
step, and the others wait unchanged. Weights and their names are those of the dense network, which sampling and feature
extraction run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfguide.spec.architecture import ROUTED_FROM, PatchTransformer

Turn = tuple[Tensor, Tensor]  # cosines and sines of rotary positions


class Route:
    """One forward's way through the middle blocks."""

    def __init__(self, net: PatchTransformer, tokens: Tensor, drawn: Tensor | None = None) -> None:
        """`tokens` (B, extras + T, D) at the first block; extras are never left out.

        Patches whose numbers in `drawn` (B, T) are the smallest go on; None draws them from torch's generator of the
        tokens' device, as dropout is.
        """
        batch, count, _ = tokens.shape
        extras = count - net.tokens
        if drawn is None:
            drawn = torch.rand(batch, net.tokens, device=tokens.device)
        patches = drawn.argsort(1)[:, : net.routed_tokens].sort(1).values + extras
        always = torch.arange(extras, device=tokens.device).expand(batch, extras)
        self.kept = torch.cat((always, patches), dim=1)  # (B, extras + k), ascending
        self.first, self.last = ROUTED_FROM, len(net.layers) + 1 - ROUTED_FROM
        self._waiting: Tensor | None = (
            None  # all tokens as they entered the first of the middle blocks
        )

    def enter(self, number: int, tokens: Tensor) -> Tensor:
        """What block `number`, counted from 1, is to read."""
        if number != self.first:
            return tokens
        self._waiting = tokens
        return tokens.gather(1, self._index(tokens))

    def leave(self, number: int, tokens: Tensor) -> Tensor:
        """What follows block `number`."""
        if number == self.last:
            tokens, self._waiting = self.whole(tokens), None
        return tokens

    def whole(self, tokens: Tensor) -> Tensor:
        """(B, extras + T, D): among the middle blocks with those that wait, elsewhere as they are."""
        if self._waiting is None:
            return tokens
        return self._waiting.scatter(1, self._index(tokens), tokens)

    def turned(self, turn: Turn | None) -> Turn | None:
        """Rotations (extras + T, d / 2) of the tokens at hand; (B, 1, extras + k, d / 2) among the middle blocks."""
        if turn is None or self._waiting is None:
            return turn
        cos, sin = (each[self.kept][:, None] for each in turn)
        return cos, sin

    def _index(self, tokens: Tensor) -> Tensor:
        return self.kept[:, :, None].expand(-1, -1, tokens.shape[2])
