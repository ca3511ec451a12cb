"""How near samples come to the data, and what that costs: the energy distance against network evaluations.

Energy distance (Szekely & Rizzo 2013): D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|, exactly, over all pairs of two sets of
points. Noise and data are scrambled Sobol sequences, spread evenly: two random draws of the same distribution are so
far apart (0.017 for 4,096 points) that they would hide most of what there is to see, two even ones are not (0.002).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import build_path
from selfguide.diffusion.samplers import sample
from shards import cli
from tools.toy.learn import Data, Learned, off, points

SAMPLES = 4096
EVALUATIONS = (5, 10, 20, 50)
SHOWN = (5, 10, 50)  # those whose samples are drawn
TOLERANCES = (1e-2, 1e-3, 1e-4)
TRAJECTORIES = 64
SOLVERS = ("euler", "heun", "ddim", "dpmpp", "dopri5")


class Reference:
    """An even draw of the data that every set of samples is held against."""

    def __init__(self, data: Data, seed: int, count: int = SAMPLES) -> None:
        self.data, self.seed, self.count = data, seed, count
        self.points = points(data, spread(count, 5, seed))
        self.within = _mean_distance(self.points, self.points)

    def distance(self, x: Tensor) -> float:
        """D of samples (B, 2, 1, 1)."""
        across, within = _mean_distance(x, self.points), _mean_distance(x, x)
        return math.sqrt(max(0.0, 2 * across - within - self.within))

    def floor(self) -> float:
        """D of another even draw of the data: a distance below it cannot be distinguished from the data."""
        return self.distance(points(self.data, spread(self.count, 5, self.seed + 1)))

    def noise(self) -> Tensor:
        """(count, 2, 1, 1) standard normal, the same for every solver and path."""
        u = spread(self.count, 2, self.seed + 2).double()
        return torch.special.ndtri(u).float()[:, :, None, None]


def spread(count: int, dimensions: int, seed: int) -> Tensor:
    """(count, dimensions) numbers in the open interval (0, 1), evenly spread; best for a power of two."""
    u = SobolEngine(dimensions, scramble=True, seed=seed).draw(count)
    return u.clamp(2.0**-24, 1 - 2.0**-24)


def _mean_distance(x: Tensor, y: Tensor) -> float:
    pairs = torch.cdist(x.flatten(1), y.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return pairs.mean(dtype=torch.float64).item()


@dataclass(frozen=True)
class Score:
    """One solver at one cost."""

    solver: str
    evaluations: int  # counted, not planned
    distance: float  # D
    off: float  # share of the samples where no data is


@dataclass(frozen=True)
class Measured:
    """All that is drawn of one path."""

    path: str  # its name, not the preset's
    scores: list[Score]
    samples: dict[int, Tensor]  # Euler's by its evaluations, (B, 2, 1, 1)
    trajectories: Tensor  # (steps + 1, B, 2), noise first
    noise_times: Tensor  # (steps + 1,), of the trajectories


def measure(learned: Learned, reference: Reference, doing: str) -> Measured:
    """Every solver at every cost, from the same noise; `doing` names the progress bar."""
    noise = reference.noise()
    plan, scores, shown = _plan(), [], {}
    for solver, options in cli.track(plan, len(plan), doing):
        denoiser = denoiser_of(learned, len(noise))
        x = sample(solver, denoiser, noise, **options)
        share = off(reference.data, x).double().mean().item()
        scores.append(Score(solver, denoiser.evaluations, reference.distance(x), share))
        if solver == "euler" and denoiser.evaluations in SHOWN:
            shown[denoiser.evaluations] = x
    return Measured(
        learned.config.name, scores, shown, *trajectories(learned, noise[:TRAJECTORIES])
    )


def _plan() -> list[tuple[str, dict[str, Any]]]:
    """Solvers with their options; Heun's N steps are 2N - 1 evaluations."""
    fixed: list[tuple[str, dict[str, Any]]] = [
        (solver, {"steps": (nfe + 1) // 2 if solver == "heun" else nfe})
        for solver in SOLVERS
        if solver != "dopri5"
        for nfe in EVALUATIONS
    ]
    return fixed + [("dopri5", {"rtol": t, "atol": t}) for t in TOLERANCES]


def trajectories(learned: Learned, noise: Tensor, steps: int = 80) -> tuple[Tensor, Tensor]:
    """States (steps + 1, B, 2) from `noise` to data by fine Heun steps, and their noise-times (steps + 1,)."""
    denoiser = denoiser_of(learned, len(noise))
    first = denoiser.preconditioning.first
    _, b, _, _ = denoiser.path.coefficients(torch.tensor(first, dtype=torch.float64))
    states, times = [noise * b.float()], [first]

    def keep(_: int, tau: float, x: Tensor) -> None:
        states.append(x)
        times.append(tau)

    sample("heun", denoiser, noise, steps=steps, callback=keep)
    return torch.stack(states).flatten(2), torch.tensor(times)


def denoiser_of(learned: Learned, count: int) -> Denoiser:
    """The trained network as samplers see it, for `count` points, unguided."""
    config = learned.config
    return Denoiser(
        learned.net,
        build_path(config),
        Condition.unconditional(count),
        prediction=config.prediction,
        sigma_data=config.sigma_data,
    )
