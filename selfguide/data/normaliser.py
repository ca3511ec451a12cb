"""What a model sees of stored values, (x - shift) * scale by the shards' header, and the way back.

Of a stored pair of mirror images one is picked, and of stored moments a latent is sampled, z = mean + std * noise
(Rombach et al. 2022 sample so at every step too). Both are pure functions of (seed, purpose, position).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from selfguide.data.crop_flip import mirrored
from selfguide.randomness import normal
from shards.errors import UserError
from shards.format.header import Header

LOG_VARIANCE = (-30.0, 20.0)  # beyond it a standard deviation leaves fp32 (Rombach et al. 2022)


@dataclass(frozen=True)
class Normaliser:
    """The map that a data set's header states."""

    header: Header

    @staticmethod
    def of(header: Header | Mapping[str, Any]) -> Normaliser:
        """By a header, or by what a manifest or snapshot holds of one."""
        return Normaliser(Header.of(header))

    def encode(self, stored: Tensor, seed: int = 0, position: Tensor | None = None) -> Tensor:
        """Stored values of any dtype -> fp32 model input (B, C, H, W).

        `stored` is (B, C, H, W), (B, 2C, H, W) of moments, or (B, 2, ...) of both mirror images. `position` (B,) are
        the images' places in the run; without it the image as it is and the mean of its moments are taken.
        """
        moments = self.header.content == "moments"
        if position is None:
            stored = stored[:, 0] if self.header.flips else stored
            return self.normalise(posterior_mean(stored) if moments else stored)
        if self.header.flips:
            picked = mirrored(seed, position).long()
            stored = stored[torch.arange(len(stored), device=stored.device), picked]
        return self.normalise(sample_posterior(stored, seed, position) if moments else stored)

    def normalise(self, values: Tensor) -> Tensor:
        """(x - shift) * scale, fp32."""
        wide = values.float()
        return (wide - _along(self.header.shift, wide)) * _along(self.header.scale, wide)

    def decode(self, x: Tensor) -> Tensor:
        """Model output (B, C, H, W) -> fp32 values in the stored units."""
        wide = x.float()
        return wide / _along(self.header.scale, wide) + _along(self.header.shift, wide)

    @property
    def top(self) -> int:
        """The brightest level of stored images, which are whole numbers from 0 that a model sees in [-1, 1].

        Raises:
            UserError: these are latents, or a model sees their levels in another range.
        """
        header = self.header
        if header.kind != "image":
            raise UserError("latents have no levels of brightness: decode them to images first")
        shift, scale = header.shift, header.scale
        if not isinstance(shift, tuple) and not isinstance(scale, tuple):
            top = round(2 * shift)
            if 1 <= top <= 255 and top == 2 * shift and abs(shift * scale - 1) < 1e-6:
                return top
        raise UserError(
            f"header shift={shift}, scale={scale}: no levels 0..top become [-1, 1] so; write the shards with "
            "shift = top / 2 and scale = 2 / top, where top is at most 255"
        )

    def pixels(self, x: Tensor) -> Tensor:
        """Model output -> whole levels 0..top, uint8: the grid that the stored images lie on."""
        return self.decode(x).round().clamp(0, self.top).to(torch.uint8)


def posterior_mean(moments: Tensor) -> Tensor:
    """(B, 2C, H, W) means and log-variances -> (B, C, H, W)."""
    return moments.chunk(2, dim=1)[0]


def sample_posterior(moments: Tensor, seed: int, position: Tensor) -> Tensor:
    """A latent for each image (B, C, H, W), fp32, from its moments (B, 2C, H, W)."""
    centre, log_variance = moments.float().chunk(2, dim=1)
    noise = normal(seed, "latent-sample", position, tuple(centre.shape[1:]))
    return centre + (log_variance.clamp(*LOG_VARIANCE) / 2).exp() * noise


def _along(values: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    return _column(values, like.device) if isinstance(values, tuple) else values


@lru_cache(maxsize=64)
def _column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), copied to the device once rather than at every step."""
    return torch.tensor(values, device=device)[:, None, None]
