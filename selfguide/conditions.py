"""What the network is told about each image, held together so that one mask drops all of it.

An image is in one of three states: told, null (its condition was dropped, for classifier-free guidance), or
unconditional (nothing is known yet, or never will be). Null and unconditional have embeddings of their own: SGFM
extracts features with the latter and trains guidance with the former.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOLD, NULL, UNCONDITIONAL = 0, 1, 2


@dataclass(frozen=True)
class Condition:
    """state (B,) of TOLD | NULL | UNCONDITIONAL; id (B,) int64; dense (B, P), a prototype or feature."""

    state: Tensor
    id: Tensor | None = None
    dense: Tensor | None = None

    @staticmethod
    def unconditional(count: int, device: torch.device | str = "cpu") -> Condition:
        return Condition(torch.full((count,), UNCONDITIONAL, device=device))

    @staticmethod
    def told(*, id: Tensor | None = None, dense: Tensor | None = None) -> Condition:
        given = id if id is not None else dense
        if given is None:
            raise ValueError("a told condition needs an id or a dense vector")
        return Condition(torch.full((len(given),), TOLD, device=given.device), id, dense)

    def drop(self, dropped: Tensor) -> Condition:
        """Told images where `dropped` (B,) bool become null; nothing else changes."""
        return replace(self, state=torch.where(dropped & (self.state == TOLD), NULL, self.state))

    def null(self) -> Condition:
        """The unguided half of classifier-free guidance: told becomes null, unconditional stays."""
        return self.drop(torch.ones_like(self.state, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.state)
