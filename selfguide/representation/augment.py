"""Non-leaky augmentation: images are moved, the network is conditioned on how, and samples are of images as they are.

Karras et al. 2022 (EDM), appendix F.2 and its table of operations, after Karras et al. 2020 (StyleGAN2-ADA). Each
operation is done to an image with a probability, and its parameters are labels, which are 0 where it was not done. A
sample is asked for with zeros, so it shows what no operation was done to.

Mirror images are exact. Everything else is one affine map, read from an image that goes on beyond its edges as its own
mirror image, at twice the resolution: up by the wavelet sym6, bilinear there, and down by the same wavelet, which loses
nothing where nothing is moved. Each image is worked on by itself in elementwise arithmetic, so that it comes out the
same in a batch of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.guidance.component import Component, Inputs
from selfguide.networks.student import Student
from selfguide.randomness import normal, uniform

# at n = 1: doublings of a size, and the share of an edge that an image is shifted by
SCALE, SHIFT = 0.2, 0.125
# of stretches, how many are along another axis than the horizontal one
TILTED = 0.5
# least asymmetric orthogonal wavelet with six vanishing moments (Daubechies 1992, section 8.1.1)
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip

# sample m of the doubled image lies at (m - MIDDLE) / 2 of the image's own pixels. The wavelet is a little skewed: by
# the middle of its taps, 5.5, an image that is turned around would also be shifted, by 0.4 pixels
MIDDLE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)


class Augmentation(Component):
    """Moves training images and tells the network how."""

    name = "augment"

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed

    def augment(self, x0: Tensor, position: Tensor) -> Tensor:
        return move(x0, draw(self.probability, self.seed, position))

    def condition(self, batch: Batch, teacher: Student | None, inputs: Inputs) -> Inputs:
        """Adds the labels to whatever condition guidance made: an image whose condition was dropped has them too."""
        labels = draw(self.probability, self.seed, batch.position).labels
        return replace(inputs, condition=replace(inputs.condition, augment=labels))


@dataclass(frozen=True)
class Operations:
    """What is done to the images of a batch, in this order; each (B,) fp32, 0 where it is not done to an image.

    Angles are counter-clockwise as one sees an image, in radians.
    """

    mirrored: Tensor  # 0 or 1: left and right change places
    overturned: Tensor  # 0 or 1: top and bottom do
    scale: Tensor  # the image grows 2^(0.2 n) times
    angle: Tensor  # and is turned
    stretch: Tensor  # then it grows 2^(0.2 n) times along an axis, and shrinks as much across
    axis: Tensor  # the axis' angle to the horizontal one
    right: Tensor  # then it is shifted by eighths of its width
    down: Tensor  # and of its height

    @property
    def labels(self) -> Tensor:
        """(B, 9), the network's condition."""
        angle, axis = self.angle.double(), self.axis.double()
        columns = (
            *(self.mirrored, self.overturned, self.scale, angle.cos() - 1, angle.sin()),
            *(self.stretch * axis.cos(), self.stretch * axis.sin(), self.right, self.down),
        )
        return torch.stack([each.float() for each in columns], dim=1)

    @property
    def resampled(self) -> Tensor:
        """(B,) bool: whether pixels are to be interpolated."""
        return (self.labels[:, 2:] != 0).any(1)

    def __getitem__(self, rows: Tensor) -> Operations:
        return Operations(*(each[rows] for each in vars(self).values()))


def draw(probability: float, seed: int, position: Tensor) -> Operations:
    """The operations on the images at `position` (B,) of a run.

    Half of all images are mirrored, whatever the `probability` of the other operations: EDM multiplies it by 1e8 there.
    """
    u = uniform(seed, "augment", position, 10).unbind(1)
    n = normal(seed, "augment-size", position, (4,)).unbind(1)

    def gated(gate: Tensor, value: Tensor) -> Tensor:
        return torch.where(gate < probability, value, 0.0)

    return Operations(
        mirrored=(u[0] < 0.5).float(),
        overturned=gated(u[1], (u[2] < 0.5).float()),
        scale=gated(u[3], n[0]),
        angle=gated(u[4], math.pi * (2 * u[5] - 1)),
        stretch=gated(u[6], n[1]),
        axis=gated(u[6], torch.where(u[7] < TILTED, math.pi * (2 * u[8] - 1), 0.0)),
        right=gated(u[9], n[2]),
        down=gated(u[9], n[3]),
    )


def move(x: Tensor, operations: Operations) -> Tensor:
    """Images (B, C, E, E) as the operations leave them; those to which none is done come out bit for bit."""
    for done, axis in ((operations.mirrored, -1), (operations.overturned, -2)):
        x = torch.where(done[:, None, None, None] > 0, x.flip(axis), x)
    which = operations.resampled
    if x.device.type != "cpu":
        # on an accelerator a look at which of them they are would wait for it
        return torch.where(which[:, None, None, None], resample(x, operations), x)
    rows = which.nonzero()[:, 0]
    return x.index_copy(0, rows, resample(x[rows], operations[rows])) if len(rows) else x


def resample(x: Tensor, operations: Operations) -> Tensor:
    """Images (B, C, E, E), E at least 2, under the affine part of the operations."""
    edge = x.shape[-1]
    for axis in (-1, -2):
        x = _upsampled(_going_on(x, axis), axis)
    period = x.shape[-1]
    shown = torch.arange(2 * edge + len(SYM6) - 2, device=x.device)
    places = (shown - MIDDLE) / 2 - (edge - 1) / 2  # from the centre, in pixels of the image
    found = inverse(operations, edge).float()[:, :, :, None, None]  # (B, 2, 3, 1, 1)
    across = (
        found[:, :, 0] * places + found[:, :, 1] * places[:, None] + found[:, :, 2]
    )  # (B, 2, N, N)
    read = 2 * (across.movedim(1, -1) + (edge - 1) / 2) + MIDDLE
    # the first sample once more, so that there is one on either side of every place
    x = F.pad(x, (0, 1, 0, 1), mode="circular")
    grid = torch.remainder(read, period) * (2 / period) - 1
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    for axis in (-1, -2):
        x = _downsampled(x, axis, edge)
    return x


def inverse(operations: Operations, edge: int) -> Tensor:
    """(B, 2, 3), fp64: where in the image lies what is shown at (x, y, 1), pixels right of its centre and below.

    In fp64, whose last bit a function may round otherwise at another place of a batch, and then rounded: so it depends
    on the image alone.
    """
    done = Operations(*(each.double() for each in vars(operations).values()))
    shift = SHIFT * edge * torch.stack((done.right, done.down), dim=-1)[:, :, None]  # (B, 2, 1)
    # each operation undone, the last one first; y points down, so counter-clockwise as seen is clockwise by the axes
    grown, twice = torch.exp2(SCALE * done.stretch), 2 * done.axis
    mean, half = (1 / grown + grown) / 2, (1 / grown - grown) / 2
    along, across = half * twice.cos(), half * twice.sin()
    unstretched = _matrix(mean + along, -across, -across, mean - along)
    unturned = _matrix(done.angle.cos(), -done.angle.sin(), done.angle.sin(), done.angle.cos())
    shrunk = torch.exp2(-SCALE * done.scale)[:, None, None]
    linear = shrunk * (unturned @ unstretched)
    return torch.cat((linear, -linear @ shift), dim=2)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(B, 2, 2) of four entries (B,), row by row."""
    return torch.stack((a, b, c, d), dim=-1).unflatten(-1, (2, 2))


def _going_on(x: Tensor, axis: int) -> Tensor:
    """One period, 2 (E - 1), of an image that is mirrored at its first and its last pixel again and again."""
    inside = x.narrow(axis, 1, x.shape[axis] - 2)
    return torch.cat((x, inside.flip(axis)), dim=axis)


def _upsampled(x: Tensor, axis: int) -> Tensor:
    """Twice the samples of one period, u[m] = sum over n of x[n] h[m - 2 n]."""
    count, taps = x.shape[axis], len(SYM6) // 2
    before = torch.arange(-(taps - 1), 0, device=x.device) % count
    x = torch.cat((x.index_select(axis, before), x), dim=axis)
    phases = []
    for phase in (0, 1):
        total = SYM6[phase] * x.narrow(axis, taps - 1, count)
        for tap in range(1, taps):
            total.add_(x.narrow(axis, taps - 1 - tap, count), alpha=SYM6[2 * tap + phase])
        phases.append(total)
    axis = axis % x.dim()
    return torch.stack(phases, dim=axis + 1).flatten(axis, axis + 1)


def _downsampled(x: Tensor, axis: int, count: int) -> Tensor:
    """`count` samples y[n] = sum over k of h[k] x[2 n + k]."""
    pairs = x.unflatten(axis, (-1, 2))  # (..., E + 5, 2, ...)
    axis = axis % x.dim()
    parts = [
        pairs.select(axis + 1, tap % 2).narrow(axis, tap // 2, count) for tap in range(len(SYM6))
    ]
    total = SYM6[0] * parts[0]
    for weight, part in zip(SYM6[1:], parts[1:], strict=True):
        total.add_(part, alpha=weight)
    return total
