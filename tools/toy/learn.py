"""A small network and its training: presets of `configs/path`, through the objectives that train images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources

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
from shards.errors import refuse_if
from tools.toy.data import Data, points

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
    refuse_if(
        name not in known,
        f"--paths {name!r} is no preset{nearest(name, known)}; known: {', '.join(known)}",
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
