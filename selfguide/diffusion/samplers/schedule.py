"""What samplers share: schedules of noise-times on a path, estimates of any denoiser, the noise of each step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import (
    DDPM,
    Estimate,
    Path,
    VarianceExploding,
    VariancePreserving,
)
from selfguide.diffusion.preconditioning import Preconditioning
from selfguide.randomness import normal
from selfguide.spec.config.sampler import Spacing, most_steps
from shards.errors import UserError

# x (B, C, H, W) on the path and noise-times (B,) in fp32 -> the estimate of x0 (B, C, H, W); any guidance is inside
DataEstimate = Callable[[Tensor, Tensor], Tensor]
# x (B, C, H, W) and one noise-time -> x0, eps and v
Estimator = Callable[[Tensor, float], Estimate]
# of (step, noise-time that it reached, state there)
Callback = Callable[[int, float, Tensor], None]


class Point(NamedTuple):
    """A noise-time and the path's coefficients a and b there."""

    tau: float
    a: float
    b: float


class Step(NamedTuple):
    """From one point of a schedule to the next."""

    number: int
    now: Point
    then: Point
    last: bool


@dataclass(frozen=True)
class Schedule:
    """Noise-times (N + 1,) on a path, fp64, falling: N steps.

    `last` is where an adaptive solver ends, which may not read v where the path has none; by default the last time.

    Raises:
        UserError: the times do not fall from one to the next within [0, 1].
    """

    path: Path
    times: Tensor
    last: float | None = None

    def __post_init__(self) -> None:
        times = self.times
        falling = times.ndim == 1 and len(times) > 1 and bool((times[:-1] > times[1:]).all())
        if not falling or not (float(times[-1]) >= 0 and float(times[0]) <= 1):
            raise UserError(
                f"times={times.tolist()} must fall from noise-time 1 or less to 0 or more"
            )

    @staticmethod
    def of_sigmas(sigmas: Tensor) -> Schedule:
        """From falling noise levels (N + 1,), the last of which may be 0, as k-diffusion's schedules give them.

        A model that reads sigma is called as `lambda x, times: model(x, times / (1 - times))`.
        """
        sigmas = sigmas.double().cpu()
        path = VarianceExploding(float(sigmas[sigmas > 0].min()), float(sigmas[0]))
        return Schedule(path, path.noise_time(sigmas), path.last)

    def start(self, noise: Tensor) -> Tensor:
        """The state at the first noise-time of standard normal `noise` (B, C, H, W)."""
        return noise * point(self.path, float(self.times[0])).b

    def steps(self) -> Iterator[Step]:
        points = [point(self.path, tau) for tau in self.times.tolist()]
        for number, (now, then) in enumerate(pairwise(points)):
            yield Step(number, now, then, number == len(points) - 2)


def estimator(denoiser: Denoiser | DataEstimate, path: Path) -> Estimator:
    """x (B, C, H, W) and one noise-time -> the denoiser's x0, eps and v."""
    if isinstance(denoiser, Denoiser):
        return denoiser.estimate

    def estimate(x: Tensor, tau: float) -> Estimate:
        times = torch.full((len(x),), tau, device=x.device, dtype=torch.float32)
        x0 = denoiser(x, times).to(x.dtype)
        return path.estimate("x0", x0, x, torch.tensor(tau, dtype=torch.float64))

    return estimate


class StepNoise:
    """Standard normal noise of each step: of image i a pure function of (seeds[i], step).

    Raises:
        UserError: `seeds` are missing, or are not int64 of (B,); `what` asks for them.
    """

    def __init__(self, what: str, seeds: Tensor | None, x: Tensor) -> None:
        count = len(x)
        if seeds is None:
            raise UserError(
                f"{what} draws noise at every step: give seeds, int64 of shape ({count},)"
            )
        if tuple(seeds.shape) != (count,) or seeds.dtype != torch.int64:
            raise UserError(
                f"seeds are {seeds.dtype} of shape {tuple(seeds.shape)}; {what} takes int64 of ({count},)"
            )
        self._seeds, self._shape, self._dtype = seeds.to(x.device), tuple(x.shape[1:]), x.dtype

    def __call__(self, step: int) -> Tensor:
        return normal(0, f"sampler-step-{step}", self._seeds, self._shape).to(self._dtype)


def ignore(step: int, tau: float, x: Tensor) -> None:
    """The callback of those who want none."""


def fixed_steps(walk: Callable[..., Iterator[Tensor]]) -> Callable[..., Tensor]:
    """A sampler from `walk(estimate, x, schedule, seeds, **options)`, which yields the state after each step."""

    @functools.wraps(walk)
    @torch.no_grad()
    def sampler(
        denoiser: Denoiser | DataEstimate,
        x: Tensor,
        schedule: Schedule,
        *,
        seeds: Tensor | None = None,
        callback: Callback = ignore,
        **options: Any,
    ) -> Tensor:
        states = walk(estimator(denoiser, schedule.path), x, schedule, seeds, **options)
        for step, x in zip(schedule.steps(), states, strict=True):
            callback(step.number, step.then.tau, x)
        return x

    return sampler


def noise_times(
    preconditioning: Preconditioning,
    steps: int,
    shift: float = 1.0,
    spacing: Spacing = "trailing",
) -> Tensor:
    """(steps + 1,) falling noise-times, fp64: the path's grid, shifted, from where the prediction can be read.

    A discrete table has its shifted noise-times at whole entries, and refuses as many steps as would meet at one;
    `spacing` chooses its entries, see `selfguide.spec.config.sampler.table_entries`. On VP, VE and EDM it may be
    `log_snr`, see `log_snr_times`.
    """
    path = preconditioning.path
    if steps < 1:
        raise UserError(f"steps={steps} is too small; take 1 or more")
    if shift != 1 and isinstance(path, VarianceExploding):
        raise UserError(
            f"shift={shift} moves noise-times, and this path has a grid of noise levels; drop it"
        )
    fits = (VarianceExploding, VariancePreserving) if spacing == "log_snr" else (DDPM,)
    if spacing != "trailing" and (shift != 1 or not isinstance(path, fits)):
        raise UserError(
            f"spacing={spacing} is an unshifted grid of {' or '.join(each.__name__ for each in fits)}, and this one is "
            f"of {type(path).__name__} with shift={shift}; drop it"
        )
    if spacing == "log_snr":
        return log_snr_times(path, steps)
    grid = path.grid(steps, spacing) if isinstance(path, DDPM) else path.grid(steps)
    times = within(grid, shift)
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


def log_snr_times(path: Path, steps: int) -> Tensor:
    """(steps + 1,) noise-times between the path's ends whose noise levels have even logarithms.

    So DPM-Solver steps on VP (Lu et al. 2022, appendix D). On VE and EDM N levels fall so, and the last step goes to
    data: VE's own schedule (Song et al. 2021).
    """
    exploding = isinstance(path, VarianceExploding)
    ends = torch.tensor([path.first, path.last], dtype=torch.float64)
    first, last = path.sigma(ends).log().tolist()
    sigma = torch.linspace(first, last, steps + (not exploding), dtype=torch.float64).exp()
    times = path.noise_time(sigma)
    times[0] = path.first
    if exploding:
        return torch.cat((times, times.new_zeros(1)))
    times[-1] = path.last
    return times


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
