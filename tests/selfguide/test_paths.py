"""Paths: derivatives by finite differences, conversions by round trips."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from selfguide.objectives import draw_times
from selfguide.paths import RectifiedFlow
from selfguide.spec.config import PathConfig

times = st.floats(0.01, 0.99)


@given(times)
def test_derivatives_are_those_of_the_coefficients(tau: float) -> None:
    path, h = RectifiedFlow(), 1e-6
    t = torch.tensor([tau], dtype=torch.float64)
    a1, b1, _, _ = path.coefficients(t + h)
    a0, b0, _, _ = path.coefficients(t - h)
    _, _, da, db = path.coefficients(t)
    torch.testing.assert_close((a1 - a0) / (2 * h), da)
    torch.testing.assert_close((b1 - b0) / (2 * h), db)


@given(times, st.integers(0, 1000))
def test_velocity_gives_back_data_and_noise(tau: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=generator)
    path, t = RectifiedFlow(), torch.full((3,), tau, dtype=torch.float64)
    x, v = path.interpolate(x0, eps, t), path.velocity(x0, eps, t)
    torch.testing.assert_close(path.estimate("v", v, x, t).x0, x0)
    torch.testing.assert_close(path.estimate("v", v, x, t).eps, eps)


def test_noise_time_zero_is_data_and_one_is_noise() -> None:
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    path = RectifiedFlow()
    assert torch.equal(path.interpolate(x0, eps, torch.zeros(3)), x0)
    assert torch.equal(path.interpolate(x0, eps, torch.ones(3)), eps)


def test_logit_normal_times_are_the_sigmoid_of_a_normal() -> None:
    config = PathConfig(time_density="logit_normal", time_mean=0.5, time_std=0.8)
    logits = torch.logit(draw_times(config, RectifiedFlow(), 0, torch.arange(20_000)).double())
    assert abs(logits.mean() - 0.5) < 0.02 and abs(logits.std() - 0.8) < 0.02
