"""A walk from noise to data: its noise-times, the points of the path there, and the noise of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from selfguide.diffusion.denoiser import Denoiser, FunctionDenoiser
from selfguide.diffusion.paths import DDPM, Path, VarianceExploding
from selfguide.diffusion.preconditioning import Preconditioning
from selfguide.randomness import normal
from selfguide.spec.config.sampler import most_steps
from shards.errors import UserError

Callback = Callable[[int, float, Tensor], None]  # step, the noise-time it reached, the state there


class Point(NamedTuple):
    """A place on the path: noise-time and the coefficients a and b there."""

    tau: float
    a: float
    b: float


class Step(NamedTuple):
    number: int
    now: Point
    then: Point
    last: bool


@dataclass(frozen=True)
class Walk:
    """What every sampler is given: where from, along which noise-times, with whose noise, watched by whom."""

    denoiser: Denoiser | FunctionDenoiser
    noise: Tensor  # (B, C, H, W), standard normal, fp32 or fp64
    times: Tensor  # (N + 1,) falling, fp64
    shift: float  # already in `times`; for a sampler that has a grid of its own
    seeds: Tensor | None  # (B,) int64
    callback: Callback | None

    def start(self) -> Tensor:
        """The state at the first noise-time."""
        return self.noise * point(self.denoiser.path, float(self.times[0])).b

    def steps(self) -> Iterator[Step]:
        points = [point(self.denoiser.path, tau) for tau in self.times.tolist()]
        for number, (now, then) in enumerate(pairwise(points)):
            yield Step(number, now, then, number == len(points) - 2)

    def stochastic(self, what: str) -> None:
        """Called before the first step by a sampler that will ask for `fresh` noise."""
        count = len(self.noise)
        if self.seeds is None:
            raise UserError(
                f"{what} draws noise at every step: give seeds, int64 of shape ({count},)"
            )
        if tuple(self.seeds.shape) != (count,) or self.seeds.dtype != torch.int64:
            raise UserError(
                f"seeds are {self.seeds.dtype} of shape {tuple(self.seeds.shape)}; {what} takes int64 of ({count},)"
            )

    def fresh(self, number: int) -> Tensor:
        """Standard normal noise of a step: of image i a pure function of (seeds[i], number)."""
        assert self.seeds is not None
        seeds = self.seeds.to(self.noise.device)
        z = normal(0, f"sampler-step-{number}", seeds, tuple(self.noise.shape[1:]))
        return z.to(self.noise.dtype)

    def reached(self, number: int, tau: float, x: Tensor) -> None:
        if self.callback:
            self.callback(number, tau, x)


def noise_times(preconditioning: Preconditioning, steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) falling noise-times, fp64: the path's grid, shifted, from where the prediction can be read.

    A discrete table has its shifted noise-times at whole entries, and refuses as many steps as would meet at one.
    """
    path = preconditioning.path
    if steps < 1:
        raise UserError(f"steps={steps} is too small; take 1 or more")
    if shift != 1 and isinstance(path, VarianceExploding):
        raise UserError(
            f"shift={shift} moves noise-times, and this path has a grid of noise levels; drop it"
        )
    times = within(path.grid(steps), shift)
    if shift != 1 and isinstance(path, DDPM):
        if steps > most_steps(shift):
            raise UserError(
                f"steps={steps} with shift={shift} would stand still on this path's {path.steps} noise levels; "
                f"take {most_steps(shift)} steps or fewer, or a shift nearer 1"
            )
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # not rounded twice
        times = (shifted(even, shift) * path.steps).round() / path.steps
    # squeezed, not clipped, since two equal times are a step of no length
    return times * min(1.0, preconditioning.first / float(times[0]))


def within(times: Tensor, k: float) -> Tensor:
    """Falling noise-times, shifted between their ends, which stay."""
    if k == 1 or len(times) == 1:
        return times
    first, last = times[0], times[-1]
    share = shifted((times - last) / (first - last), k)[1:-1]
    return torch.cat((times[:1], last + (first - last) * share, times[-1:]))


def shifted(times: Tensor, k: float) -> Tensor:
    """k tau / (1 + (k - 1) tau) (Esser et al. 2024, eq. 23): k > 1 spends more steps at high noise.

    A shift s of data-time, as LightningDiT's 0.3, is k = 1 / s.
    """
    if not (math.isfinite(k) and k > 0):
        raise UserError(f"shift={k} must be a positive number")
    return k * times / (1 + (k - 1) * times)


def point(path: Path, tau: float) -> Point:
    """The path's point at that noise-time."""
    a, b, _, _ = path.coefficients(torch.tensor(tau, dtype=torch.float64))
    return Point(tau, float(a), float(b))


def at_level(path: Path, sigma: float) -> Point:
    """The path's point of noise level b / a = `sigma`."""
    return point(path, float(path.noise_time(torch.tensor(sigma, dtype=torch.float64))))
