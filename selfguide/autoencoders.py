"""Images <-> what the model sees: (x - shift) * scale by the shards' header, and back to the pixels stored there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normaliser:
    """The affine map of a dataset's typed header."""

    kind: str  # "image" or "latent"
    scale: float
    shift: float

    @staticmethod
    def of(header: dict[str, Any]) -> Normaliser:
        return Normaliser(header["kind"], float(header["scale"]), float(header["shift"]))

    def encode(self, stored: Tensor) -> Tensor:
        """Stored values (B, C, H, W) of any dtype -> fp32 model input."""
        return (stored.float() - self.shift) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Model output -> fp32 values in the stored units."""
        return x.float() / self.scale + self.shift

    def pixels(self, x: Tensor, top: int) -> Tensor:
        """Model output -> whole grey levels 0..top, uint8: the grid that the stored images lie on."""
        if self.kind != "image":
            raise ValueError("latents need a decoder before they are pixels")
        return self.decode(x).round().clamp(0, top).to(torch.uint8)
