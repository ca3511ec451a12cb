"""Samplers take any function that estimates data, and any schedule of noise-times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfguide.diffusion.paths import Path, RectifiedFlow
from selfguide.diffusion.samplers import SAMPLERS, sample
from selfguide.diffusion.samplers.walk import noise_times
from shards.errors import UserError
from tests.selfguide.exact import MEAN, PATHS, SD, exact, gaussian

SEEDS = torch.arange(4)


def data_estimate(path: Path):  # type: ignore[no-untyped-def]
    """E[x0 | x] of Gaussian data, as a plain function."""

    def estimate(x: Tensor, tau: Tensor) -> Tensor:
        a, b, _, _ = path.coefficients(tau.double().view(-1, 1, 1, 1))
        return MEAN + a * SD**2 * (x - a * MEAN) / (a**2 * SD**2 + b**2)

    return estimate


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_function_that_estimates_data_gives_the_samples_of_a_denoiser(name: str) -> None:
    path = "ve" if name == "heun" else "rf_x0"
    known = exact(path)
    call = {"name": name, "noise": gaussian(4).double(), "steps": 8, "seeds": SEEDS}
    wanted = sample(denoiser=known, **call)
    made = sample(denoiser=data_estimate(PATHS[path][0]), path=PATHS[path][0], **call)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


def test_a_schedule_given_as_times_is_the_one_that_is_walked() -> None:
    noise, path = gaussian(4).double(), RectifiedFlow()
    wanted = sample("euler", exact("rf"), noise, steps=7, shift=3.0)
    times = noise_times(exact("rf").preconditioning, 7, 3.0)
    assert torch.equal(sample("euler", exact("rf"), noise, times=times), wanted)
    reached: list[float] = []
    given = [1.0, 0.7, 0.2, 0.0]
    sample(
        "euler", data_estimate(path), noise, path=path, times=given,
        callback=lambda _, tau, __: reached.append(tau),
    )  # fmt: skip
    assert reached == given[1:]


@pytest.mark.parametrize("times", [[0.5], [0.0, 1.0], [1.0, 1.0, 0.0], [1.2, 0.0], [1.0, -0.1]])
def test_a_schedule_that_does_not_fall_within_noise_times_is_refused(times: list[float]) -> None:
    with pytest.raises(UserError):
        sample("euler", exact("rf"), gaussian(4), times=times)


def test_a_function_without_a_path_and_a_denoiser_with_two_are_refused() -> None:
    with pytest.raises(UserError):
        sample("euler", data_estimate(RectifiedFlow()), gaussian(4))
    with pytest.raises(UserError):
        sample("euler", exact("rf"), gaussian(4), path=RectifiedFlow())
