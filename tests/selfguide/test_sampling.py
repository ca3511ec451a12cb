"""Guidance and samplers against closed forms: on Gaussian data the exact velocity is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from selfguide.conditions import NULL, TOLD, UNCONDITIONAL, Condition
from selfguide.denoiser import Denoiser
from selfguide.guidance.source import draw_groups, dropped
from selfguide.paths import RectifiedFlow
from selfguide.samplers import sample
from shards.errors import UserError

SD = 0.5  # of the Gaussian data, mean zero


class ExactVelocity(nn.Module):
    """E[v | x] for N(0, SD^2) data under rectified flow; a shift per condition id makes guidance visible."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        t = tau.double().view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * SD**2 + t**2
        told = (condition.state == TOLD).double().view(-1, 1, 1, 1)
        return x * (t - (1 - t) * SD**2) / variance + told


def gaussian(
    g: float = 0.0, count: int = 4, interval: tuple[float, float] = (0.0, 1.0)
) -> Denoiser:
    condition = Condition.told(id=torch.zeros(count, dtype=torch.int64))
    return Denoiser(ExactVelocity(), RectifiedFlow(), condition, g, interval)


def error(name: str, steps: int) -> float:
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (
        (sample(name, gaussian(), noise, steps=steps, rtol=1e-8, atol=1e-8) - SD * noise)
        .abs()
        .max()
        .item()
    )


def test_euler_converges_at_first_order_to_the_analytic_map() -> None:
    orders = [math.log2(error("euler", n) / error("euler", 2 * n)) for n in (32, 64, 128)]
    assert all(0.9 < order < 1.15 for order in orders), orders


def test_dopri5_reaches_the_analytic_map() -> None:
    assert error("dopri5", 0) < 1e-5  # noise-times reach the net in fp32


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_euler_takes_exactly_its_steps(steps: int) -> None:
    denoiser = gaussian()
    seen: list[float] = []
    sample(
        "euler",
        denoiser,
        torch.randn(4, 1, 2, 2),
        steps=steps,
        callback=lambda i, tau, x: seen.append(tau),
    )
    assert denoiser.evaluations == steps and len(seen) == steps and seen[-1] == 0


@given(st.floats(-1, 4), st.floats(0, 1))
def test_g_is_the_total_weight(g: float, tau: float) -> None:
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    told, null = gaussian(1.0).velocity(x, tau), gaussian(0.0).velocity(x, tau)
    torch.testing.assert_close(gaussian(g).velocity(x, tau), null + g * (told - null))


def test_outside_the_interval_nothing_is_guided_and_the_other_half_is_not_run() -> None:
    denoiser, runs = gaussian(3.0, interval=(0.2, 0.6)), []
    denoiser.model.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    outside = denoiser.velocity(x, 0.9)
    assert len(runs) == 1
    torch.testing.assert_close(outside, gaussian(1.0).velocity(x, 0.9))
    denoiser.velocity(x, 0.4)
    assert len(runs) == 3


def test_an_unknown_sampler_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'euler'"):
        sample("eulr", gaussian(), torch.zeros(4, 1, 2, 2))


@given(st.floats(0.02, 0.5), st.integers(0, 5))
def test_conditions_are_dropped_at_their_rate(rate: float, seed: int) -> None:
    n = 20_000
    share = dropped(seed, torch.arange(n), rate).double().mean().item()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / n)


def test_dropping_touches_told_images_only() -> None:
    condition = Condition(torch.tensor([TOLD, NULL, UNCONDITIONAL, TOLD]))
    assert condition.drop(torch.tensor([True, True, True, False])).state.tolist() == [
        NULL,
        NULL,
        UNCONDITIONAL,
        TOLD,
    ]
    assert condition.null().state.tolist() == [NULL, NULL, UNCONDITIONAL, NULL]


def test_groups_are_drawn_at_their_frequency() -> None:
    p = [0.0, 0.5, 0.2, 0.0, 0.3]
    counts = torch.bincount(draw_groups(p, 0, torch.arange(50_000)), minlength=5) / 50_000
    torch.testing.assert_close(
        counts.double(), torch.tensor(p, dtype=torch.float64), atol=0.01, rtol=0
    )
