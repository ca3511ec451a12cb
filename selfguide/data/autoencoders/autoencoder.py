"""An autoencoder is images of 256 levels -> latents or their moments, and latents -> images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shards.errors import UserError
from shards.format.header import Header

TOP = 255


@dataclass(frozen=True, kw_only=True, eq=False)
class Autoencoder(ABC):
    """What all have in common. Latents are in the autoencoder's own units: a header says how a model sees them."""

    name: str
    sha256: str | None  # of the file of weights; None where there are none
    channels: int  # of a latent
    factor: int  # image pixels to a latent pixel, along one side
    image_channels: int = 3
    moments: bool = True  # `encode` gives mean and log-variance, 2C channels
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @abstractmethod
    def header(self) -> Header:
        """What shards of its latents say.

        Raises:
            UserError: it does not know its latents' statistics.
        """

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> moments or latents."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """fp32 latents -> uint8 (B, C, H, W)."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of levels 0..255 -> moments (B, 2c, h, w), or latents (B, c, h, w).

        Raises:
            UserError: images of another type, number of channels or indivisible size.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(
                f"images are {tuple(images.shape)} {images.dtype}: give uint8 (B, C, H, W)"
            )
        self.check(*images.shape[1:])
        return self._encode(images.to(self.device))

    def check(self, channels: int, height: int, width: int) -> None:
        """Returns when it can encode images of this shape.

        Raises:
            UserError: another number of channels than it takes, or an indivisible size.
        """
        if channels != self.image_channels:
            raise UserError(
                f"images have {channels} channels; {self.name} encodes {self.image_channels}"
            )
        if height % self.factor or width % self.factor:
            raise UserError(
                f"images are {height} x {width}; {self.name} makes a latent pixel of {self.factor} x {self.factor}: "
                "crop or resize them to a multiple"
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) in the autoencoder's units -> uint8 images (B, C, H, W) of levels 0..255.

        Raises:
            UserError: another number of channels; twice as many are moments, to be sampled first.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise UserError(
                f"latents are {tuple(latents.shape)}; {self.name} decodes (B, {self.channels}, h, w)"
            )
        return self._decode(latents.to(self.device).float())


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity(Autoencoder):
    """Images as they are."""

    name: str = "identity"
    sha256: str | None = None
    channels: int = 3
    factor: int = 1
    moments: bool = False

    def header(self) -> Header:
        return Header(kind="image", shift=TOP / 2, scale=2 / TOP)

    def _encode(self, images: Tensor) -> Tensor:
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        return levels(latents)


@dataclass(frozen=True, kw_only=True, eq=False)
class KLAutoencoder(Autoencoder):
    """A variational autoencoder (Kingma & Welling 2014) whose networks take and make images in [-1, 1]."""

    to_moments: Callable[
        [Tensor], Tensor
    ]  # (B, C, H, W) -> (B, 2c, h, w), means before log-variances
    to_images: Callable[[Tensor], Tensor]
    shift: float | tuple[float, ...] | None = None  # of its latents; None where only the data know
    scale: float | tuple[float, ...] | None = None

    def header(self) -> Header:
        if self.shift is None or self.scale is None:
            raise UserError(
                f"{self.name} was loaded without the mean and std of its latents: give the file of statistics that "
                "was published with its weights"
            )
        return Header(
            kind="latent",
            shift=self.shift,
            scale=self.scale,
            encoder=self.name,
            encoder_sha256=self.sha256,
            content="moments",
        )

    def _encode(self, images: Tensor) -> Tensor:
        return self.to_moments(images.float() * (2 / TOP) - 1)

    def _decode(self, latents: Tensor) -> Tensor:
        return levels((self.to_images(latents) + 1) * (TOP / 2))


def levels(values: Tensor) -> Tensor:
    """To the nearest of 0..255, uint8."""
    return values.round().clamp(0, TOP).to(torch.uint8)
