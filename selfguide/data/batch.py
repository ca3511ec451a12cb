"""One micro-batch on its way through a training step."""

from __future__ import annotations

from dataclasses import dataclass

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
