"""Two distributions of points in the plane, each with a standard deviation of 0.5 as images in [-1, 1] have about.

A point is an image of one pixel and two channels, (B, 2, 1, 1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Data = Literal["checkerboard", "moons"]
DATA: tuple[Data, ...] = ("checkerboard", "moons")

STD = 0.5  # root mean square of a coordinate, so that EDM's settings hold as published
EDGE = STD * math.sqrt(
    12
)  # of the whole board: uniform coordinates of that width have this deviation
THICKNESS = 0.05  # standard deviation across a moon of radius 1
MOON = STD / math.sqrt((21 / 16 - 1 / math.pi) / 2 + THICKNESS**2)  # the radius, see `moons`


def points(data: Data, u: Tensor) -> Tensor:
    """(B, 2, 1, 1) points of `data` from uniform numbers (B, 5) in (0, 1)."""
    return (checkerboard(u) if data == "checkerboard" else moons(u))[:, :, None, None]


def checkerboard(u: Tensor) -> Tensor:
    """(B, 2) points on the eight filled squares of a board of 4 x 4."""
    square = (u[:, 0] * 8).long().clamp(max=7)
    row = square // 2
    column = 2 * (square % 2) + row % 2
    return (torch.stack((column, row), 1) + u[:, 1:3] - 2) * EDGE / 4


def moons(u: Tensor) -> Tensor:
    """(B, 2) points on two interleaved half circles.

    About the centre (1/2, 1/4), the upper arc (cos t, sin t) has second moments 3/4 and 9/16 - 1/pi, and the lower arc
    is its mirror image, whence MOON.
    """
    t = math.pi * u[:, 0]
    upper = torch.stack((t.cos() - 0.5, t.sin() - 0.25), 1)
    side = torch.where(u[:, 1:2] < 0.5, 1.0, -1.0)
    across = torch.special.ndtri(u[:, 3:5].double()).to(u.dtype)  # standard normal
    return MOON * (side * upper + THICKNESS * across)


def off(data: Data, x: Tensor) -> Tensor:
    """(B,) bool: where no data is. Not on a filled square, or over three deviations away from both arcs."""
    x = x.flatten(1)
    if data == "checkerboard":
        cell = (x / (EDGE / 4) + 2).floor()
        return (x.abs() > EDGE / 2).any(1) | ((cell[:, 0] + cell[:, 1]) % 2 != 0)
    nearest = torch.minimum(_from_arc(x / MOON), _from_arc(-x / MOON))
    return nearest > 3 * THICKNESS


def _from_arc(x: Tensor) -> Tensor:
    """Distance of points (B, 2) from the upper arc of radius 1."""
    x = x + x.new_tensor((0.5, 0.25))
    ring = (x.norm(dim=1) - 1).abs()
    end = torch.stack((x[:, 0].abs() - 1, x[:, 1]), 1).norm(dim=1)
    return torch.where(x[:, 1] >= 0, ring, end)
