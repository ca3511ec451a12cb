"""A small network, the points it learns, and its training: presets of `configs/path`, through the objectives of images.

Both distributions of points in the plane have a standard deviation of 0.5, about as images in [-1, 1] have. A point is
an image of one pixel and two channels, (B, 2, 1, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import Uncertainty, build_objective, sample_times
from selfguide.diffusion.paths import build_path
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.models.blocks import sinusoid, time_input
from selfguide.randomness import normal, uniform
from selfguide.spec.architecture import TimeInput
from selfguide.spec.config import PathConfig, build
from selfguide.spec.suggest import nearest
from shards import cli
from shards.errors import UserError

Data = Literal["checkerboard", "moons"]
DATA: tuple[Data, ...] = ("checkerboard", "moons")

STD = 0.5  # root mean square of a coordinate, so that EDM's settings hold as published
EDGE = STD * math.sqrt(
    12
)  # of the whole board: uniform coordinates of that width have this deviation
THICKNESS = 0.05  # standard deviation across a moon of radius 1
MOON = STD / math.sqrt((21 / 16 - 1 / math.pi) / 2 + THICKNESS**2)  # the radius, see `moons`

BATCH = 1024
LEARNING_RATE = 2e-3  # falls along a cosine to 0, which makes an average of the weights needless
WARMUP = 0.05  # share of training
TIMES: dict[str, TimeInput] = {  # as the paper of each path feeds it
    "rectified_flow": "noise_1000",
    "ddpm": "index",
    "vp": "noise_999",
    "ve": "log_half_sigma",
    "edm": "log_sigma",
}


def presets() -> dict[str, PathConfig]:
    """Every preset of `configs/path` by its file's name."""
    found = {}
    for file in sorted((resources.files("configs") / "path").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            values = OmegaConf.to_container(OmegaConf.create(file.read_text()))
            found[file.name.removesuffix(".yaml")] = build(PathConfig, values, "path")
    return found


def preset(name: str) -> PathConfig:
    """That preset.

    Raises:
        UserError: none has this name; the nearest one is suggested.
    """
    known = presets()
    if name not in known:
        raise UserError(
            f"--paths {name!r} is no preset{nearest(name, known)}; known: {', '.join(known)}"
        )
    return known[name]


class PointNet(nn.Module):
    """An MLP that is called as a backbone is: points (B, 2, 1, 1), noise-times (B,), condition -> (B, 2, 1, 1).

    It is unconditional, so the condition is not read. Waves of the coordinates let it draw sharp edges; the time
    scales and shifts what enters each layer.
    """

    waves: Tensor

    def __init__(self, time: TimeInput, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.time, self.width = time, width
        self.register_buffer("waves", math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]))
        self.embed = nn.Linear(width, width)
        self.enter = nn.Linear(2 + 2 * 2 * len(self.waves), width)
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        modulation_input = F.silu(
            self.embed(sinusoid(time_input(self.time, tau), self.width))
        )  # (B, D)
        x = x.flatten(1)
        angles = (x[:, :, None] * self.waves).flatten(1)  # (B, 2 W)
        h = self.enter(torch.cat((x, angles.sin(), angles.cos()), dim=1))
        for modulation, layer in zip(self.modulations, self.layers, strict=True):
            scale, shift = modulation(modulation_input).chunk(2, dim=1)
            h = layer(F.silu(h * (1 + scale) + shift))
        return self.leave(F.silu(h))[:, :, None, None]


@dataclass(frozen=True)
class Learned:
    """A trained network and the path it is for."""

    net: PointNet
    config: PathConfig
    loss: float  # of the last tenth of training, its mean


def learn(config: PathConfig, data: Data, *, images: int, seed: int, doing: str) -> Learned:
    """Trains for `images` points, a pure function of its arguments; `doing` names the progress bar."""
    torch.manual_seed(seed)
    path, preconditioning = build_path(config), build_preconditioning(config)
    objective = build_objective(config)
    net = PointNet(TIMES[config.name])
    uncertainty = Uncertainty(path) if config.weighting == "uncertainty" else None
    trained = nn.ModuleList([net] if uncertainty is None else [net, uncertainty])
    optimiser = torch.optim.Adam(trained.parameters(), LEARNING_RATE, fused=True)
    steps, losses = images // BATCH, []
    for step in cli.track(range(steps), steps, doing):
        position = torch.arange(step * BATCH, (step + 1) * BATCH)
        x0 = points(data, uniform(seed, "toy-points", position, 5))
        eps = normal(seed, "noise", position, (2, 1, 1))
        tau = sample_times(config, path, seed, position, step / steps)
        raw = net(preconditioning.noised(x0, eps, tau), tau, Condition.unconditional(BATCH))
        hardness = None if uncertainty is None else uncertainty(tau)
        loss = objective.losses(raw, x0, eps, tau, hardness).mean()
        warm, cosine = min(1.0, (step + 1) / (WARMUP * steps)), 1 + math.cos(math.pi * step / steps)
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (warm * cosine / 2)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    late = losses[-max(1, steps // 10) :]
    return Learned(net.eval(), config, sum(late) / len(late) if late else math.nan)


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
