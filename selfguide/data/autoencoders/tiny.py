"""A small KL autoencoder of handwritten digits, trained in the open: images 1 x 8 x 8, latents 2 x 4 x 4.

`python -m tools.vae` fits it on a fixed half of scikit-learn's digits and writes the weights that lie beside this
file. It stands where no weights of a real one can be fetched, so that everything about latents can be tried.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = "tiny.safetensors"
CHANNELS, FACTOR = 2, 2


class TinyVAE(nn.Module):
    """Convolutions around one downsampling by 2; also carries the statistics of its latents over the digits."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        near = width // 2
        self.look = nn.Conv2d(1, near, 3, padding=1)
        self.down = nn.Conv2d(near, width, 3, stride=2, padding=1)
        self.code = nn.Conv2d(width, width, 3, padding=1)
        self.moments = nn.Conv2d(width, 2 * CHANNELS, 1)
        self.uncode = nn.Conv2d(CHANNELS, width, 3, padding=1)
        self.shape = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Conv2d(width, 4 * near, 3, padding=1)
        self.paint = nn.Conv2d(near, 1, 3, padding=1)
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))

    def encode(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> (B, 4, 4, 4), means before log-variances."""
        h = F.silu(self.down(F.silu(self.look(x))))  # (B, width, 4, 4)
        return self.moments(h + F.silu(self.code(h)))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 2, 4, 4) -> (B, 1, 8, 8), about [-1, 1]."""
        h = F.silu(self.uncode(latents))
        h = h + F.silu(self.shape(h))
        h = F.pixel_shuffle(F.silu(self.up(h)), 2)  # (B, near, 8, 8)
        return self.paint(h)
