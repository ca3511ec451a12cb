"""One micro-batch on its way through a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfguide.data.crop_flip import CropFlip


@dataclass
class Batch:
    """Tensors are on the rank's device; B is the micro-batch of this rank.

    `x0` (B, C, H, W) are normalised images, `eps` their noise, and `tau` (B,) their noise-times.
    `x` is what the network reads: preconditioned, in its dtype.
    `position` (B,) are the images' places in the run, of which every random number is a function.
    `ordinal` (B,) is each image's row in the shards, and so in sidecars, which are read on the CPU: it stays there.
    `images` is the number of images that the run has seen before this step.
    `crop_flip` says how x0 was cut from the stored image, and so from its layouts.
    `unaugmented` is x0 before components augmented it; None where they did not.
    """

    x0: Tensor
    eps: Tensor
    tau: Tensor
    x: Tensor
    position: Tensor
    ordinal: Tensor
    label: Tensor | None
    images: int
    crop_flip: CropFlip | None = None
    unaugmented: Tensor | None = None

    @property
    def original(self) -> Tensor:
        """Images as they were before they were augmented, (B, C, H, W)."""
        return self.x0 if self.unaugmented is None else self.unaugmented


def joined(parts: Sequence[Batch]) -> Batch:
    """Micro-batches of one step as one batch, in their order. Of more than one it leaves out `crop_flip`."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def together(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Batch(
        x0=together("x0"),
        eps=together("eps"),
        tau=together("tau"),
        x=together("x"),
        position=together("position"),
        ordinal=together("ordinal"),
        label=None if first.label is None else together("label"),
        images=first.images,
        unaugmented=None if first.unaugmented is None else together("unaugmented"),
    )
