"""What the network reads and predicts: EDM's table, and every prediction's way to and from the data."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selfguide.diffusion.objectives import Objective
from selfguide.diffusion.paths import VarianceExploding, build_path
from selfguide.diffusion.preconditioning import Preconditioning, build_preconditioning
from selfguide.spec.config import PathConfig

NAMES = ("rectified_flow", "ddpm", "vp", "ve", "edm")
FORMS = [(name, prediction) for name in NAMES for prediction in ("v", "eps", "x0")]
FORMS += [("ve", "edm"), ("edm", "edm")]
every_form = pytest.mark.parametrize(("name", "prediction"), FORMS)
sigmas = st.floats(0.002, 80.0)
deviations = st.floats(0.1, 2.0)


def edm(sd: float = 0.5) -> Preconditioning:
    return Preconditioning(VarianceExploding(), "edm", sd)


def made(name: str, prediction: str, **settings: Any) -> PathConfig:
    return PathConfig(name=name, prediction=prediction, **settings)  # type: ignore[arg-type]


def images(count: int, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, count, channels, 4, 4, dtype=torch.float64, generator=generator)
    return x0, eps


def inner(name: str, share: Tensor) -> Tensor:
    """Noise-times of that path, off its ends."""
    path = build_path(made(name, "eps"))
    low, high = max(path.last, 0.01), min(path.first, 0.99)
    return low + share * (high - low)


@given(sigma=sigmas, sd=deviations)
def test_edms_network_reads_and_predicts_unit_variance(sigma: float, sd: float) -> None:
    tau = build_path(made("edm", "edm")).noise_time(torch.tensor([sigma], dtype=torch.float64))
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1).double()
    for form in (edm(sd).target, edm(sd).noised):
        of_data, of_noise = form(one, zero, tau), form(zero, one, tau)  # linear in both
        variance = (of_data * sd) ** 2 + of_noise**2
        torch.testing.assert_close(variance, one, rtol=1e-9, atol=0)


@given(sigma=sigmas, sd=deviations, seed=st.integers(0, 100))
def test_edms_forms_are_its_table(sigma: float, sd: float, seed: int) -> None:
    """Karras et al. 2022, table 1."""
    skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2)
    x0, eps = images(1, seed=seed)
    tau = VarianceExploding().noise_time(torch.tensor([sigma], dtype=torch.float64))
    x, output = x0 + sigma * eps, torch.randn_like(x0)
    torch.testing.assert_close(edm(sd).net_input(x, tau), x / math.sqrt(sigma**2 + sd**2))
    found = edm(sd).estimate(output, x, tau).x0
    torch.testing.assert_close(found, skip * x + out * output, atol=1e-9, rtol=1e-9)
    target = (x0 - skip * x) / out
    torch.testing.assert_close(edm(sd).target(x0, eps, tau), target, atol=1e-6, rtol=1e-6)


@given(sigma=sigmas, sd=deviations)
def test_edms_own_output_counts_exactly_once(sigma: float, sd: float) -> None:
    tau = VarianceExploding().noise_time(torch.tensor([sigma]))
    assert Objective(edm(sd), "edm").factor(tau).item() == 1.0


@every_form
@given(share=st.floats(0, 1), seed=st.integers(0, 100))
def test_the_target_is_the_output_that_gives_back_the_data(
    name: str, prediction: str, share: float, seed: int
) -> None:
    form, (x0, eps) = build_preconditioning(made(name, prediction)), images(1, seed=seed)
    tau = inner(name, torch.tensor([share], dtype=torch.float64))
    x = form.path.interpolate(x0, eps, tau)
    found = form.estimate(form.target(x0, eps, tau), x, tau)
    torch.testing.assert_close(found.x0, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.eps, eps, atol=1e-6, rtol=0)


@every_form
@given(share=st.floats(0, 1), sd=deviations)
def test_the_best_linear_output_is_the_posterior_mean(
    name: str, prediction: str, share: float, sd: float
) -> None:
    """Least squares on the target, for N(0, sd^2) data, gives E[x0 | x] by Bayes, whatever is predicted."""
    form = build_preconditioning(made(name, prediction, sigma_data=sd))
    tau = inner(name, torch.tensor([share], dtype=torch.float64))
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1).double()
    a, b = form.path.interpolate(one, zero, tau), form.path.interpolate(zero, one, tau)
    in_data, in_noise = form.target(one, zero, tau), form.target(zero, one, tau)
    total = (a * sd) ** 2 + b**2
    slope = (in_data * a * sd**2 + in_noise * b) / total
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    found = form.estimate(slope * x, x, tau).x0
    torch.testing.assert_close(found, a * sd**2 / total * x, atol=1e-7, rtol=1e-6)


@every_form
@given(share=st.floats(0, 1))
def test_data_error_is_the_slope_of_x0(name: str, prediction: str, share: float) -> None:
    form, (x, output) = build_preconditioning(made(name, prediction)), images(1, channels=1)
    tau = inner(name, torch.tensor([share], dtype=torch.float64))
    output.requires_grad_()
    (slope,) = torch.autograd.grad(form.estimate(output, x, tau).x0.sum(), output)
    torch.testing.assert_close(slope.abs().mean()[None], form.data_error(tau), rtol=1e-6, atol=1e-9)


def test_sampling_stays_where_a_prediction_can_be_read() -> None:
    flow = build_path(PathConfig())
    for prediction, first, last in (("v", 1.0, 0.0), ("eps", 0.999, 0.0), ("x0", 1.0, 1e-3)):
        form = Preconditioning(flow, prediction)  # type: ignore[arg-type]
        assert (form.first, form.last) == (first, last)
        x, output = images(1)
        for end in (first, last):
            found = form.estimate(output, x, torch.tensor(end, dtype=torch.float64))
            assert all(torch.isfinite(each).all() for each in found)
    for name in ("ddpm", "vp", "ve", "edm"):
        form = build_preconditioning(made(name, "eps"))
        assert (form.first, form.last) == (form.path.first, form.path.last)
        found = form.estimate(output, x, torch.tensor(form.last, dtype=torch.float64))
        assert all(torch.isfinite(each).all() for each in found)
