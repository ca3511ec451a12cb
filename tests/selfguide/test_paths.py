"""Paths: derivatives by finite differences, conversions by round trips, tables and noise levels by other formulas."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from selfguide.diffusion.paths import (
    DDPM,
    Path,
    Quantity,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    build_path,
)
from selfguide.spec.config import PathConfig
from shards.errors import UserError

PATHS: dict[str, Path] = {
    "rectified_flow": RectifiedFlow(),
    "sgfm": RectifiedFlow(1e-4),
    "ddpm": DDPM(),
    "ddpm_scaled": DDPM("scaled_linear"),
    "vp": VariancePreserving(),
    "ve": VarianceExploding(0.02, 100.0),
    "edm": VarianceExploding(),
}
KINDS: tuple[Quantity, ...] = ("x0", "eps", "v", "score")
every_path = pytest.mark.parametrize("name", PATHS)
shares = st.floats(0.0, 1.0)


def at(path: Path, share: float) -> Tensor:
    """A noise-time, fp64, at that share of the way; on DDPM inside an interval of its table, not on a knot."""
    low, high = max(path.last, 1e-3), min(path.first, 1 - 1e-3)
    tau = low + share * (high - low)
    if isinstance(path, DDPM):
        t = tau * path.steps
        tau = (math.floor(t) + 0.1 + 0.8 * (t - math.floor(t))) / path.steps
    return torch.tensor([tau], dtype=torch.float64)


def pair(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x0, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x0.to(dtype), eps.to(dtype)


@pytest.mark.parametrize(
    "config",
    [
        *(PathConfig(name=name) for name in get_args(get_type_hints(PathConfig)["name"])),
        PathConfig(name="vp", last=1e-4),
    ],
    ids=lambda config: f"{config.name}, {config.last:g}",
)
def test_ends_that_a_submission_knows_are_those_of_the_path(config: PathConfig) -> None:
    path = build_path(config)
    assert config.ends == (path.last, path.first)


@every_path
@given(share=shares)
def test_derivatives_are_those_of_the_coefficients(name: str, share: float) -> None:
    path, h = PATHS[name], 1e-6
    t = at(path, share)
    above, below = path.coefficients(t + h), path.coefficients(t - h)
    _, _, da, db = path.coefficients(t)
    torch.testing.assert_close((above[0] - below[0]) / (2 * h), da, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close((above[1] - below[1]) / (2 * h), db, rtol=1e-5, atol=1e-8)


@every_path
@given(share=shares, seed=st.integers(0, 1000))
def test_every_quantity_gives_back_the_others(name: str, share: float, seed: int) -> None:
    path = PATHS[name]
    t, (x0, eps) = at(path, share), pair(seed)
    x, v = path.interpolate(x0, eps, t), path.velocity(x0, eps, t)
    given_as = {"x0": x0, "eps": eps, "v": v, "score": path.score(eps, t)}
    for kind in KINDS:
        found = path.estimate(kind, given_as[kind], x, t)
        torch.testing.assert_close(found.x0, x0, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.eps, eps, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.v, v, atol=1e-6, rtol=1e-6)


@every_path
@given(share=shares, seed=st.integers(0, 1000))
def test_round_trips_in_fp32_lose_what_the_conversion_costs(
    name: str, share: float, seed: int
) -> None:
    """x0 comes from eps through 1 / a, eps from x0 through 1 / b: that many roundings and no more."""
    path = PATHS[name]
    t, (x0, eps) = at(path, share).float(), pair(seed, torch.float32)
    x, v = path.interpolate(x0, eps, t), path.velocity(x0, eps, t)
    a, b, da, db = (c.item() for c in path.coefficients(t))
    largest = max(x.abs().max().item(), x0.abs().max().item(), (b * eps).abs().max().item())
    unit = 8 * torch.finfo(torch.float32).eps * largest
    w = a * db - da * b
    speed = abs(db) * largest + b * v.abs().max().item()
    torch.testing.assert_close(path.estimate("eps", eps, x, t).x0, x0, atol=unit / a, rtol=0)
    torch.testing.assert_close(path.estimate("x0", x0, x, t).eps, eps, atol=unit / b, rtol=0)
    torch.testing.assert_close(
        path.estimate("v", v, x, t).x0, x0, atol=unit + 1e-6 * speed / w, rtol=0
    )


@every_path
@given(share=shares)
def test_the_score_is_the_gradient_of_the_log_density(name: str, share: float) -> None:
    path = PATHS[name]
    t, (x0, eps) = at(path, share), pair(0)
    a, b, _, _ = path.coefficients(t)
    x = path.interpolate(x0, eps, t).requires_grad_()
    density = torch.distributions.Normal(a * x0, b.expand_as(x0))
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(path.score(eps, t), gradient, rtol=1e-6, atol=1e-9)


@every_path
@given(share=shares)
def test_noise_time_is_the_inverse_of_sigma(name: str, share: float) -> None:
    path = PATHS[name]
    t = at(path, share)
    torch.testing.assert_close(path.noise_time(path.sigma(t)), t, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(path.noise_time(path.sigma(t.float())), t.float(), rtol=1e-5, atol=0)


@every_path
def test_both_ends_are_on_the_path(name: str) -> None:
    path, (x0, eps) = PATHS[name], pair(0)
    begin = path.interpolate(x0, eps, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(begin, x0, atol=1e-3 if name == "sgfm" else 0.0, rtol=0)
    for tau in (path.first, path.last):
        if tau not in (0.0, 1.0):
            ends = torch.tensor([tau], dtype=torch.float64)
            torch.testing.assert_close(path.noise_time(path.sigma(ends)), ends)
    if path.first == 1.0 and isinstance(path, RectifiedFlow):
        one = torch.ones(1, dtype=torch.float64)
        assert torch.equal(path.interpolate(x0, eps, one), eps)
        assert path.noise_time(path.sigma(one)).item() == 1.0


@every_path
def test_steps_go_down_from_the_first_noise_time(name: str) -> None:
    path = PATHS[name]
    for steps in (1, 2, 18, 250):
        grid = path.grid(steps)
        assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
        assert (grid.diff() < 0).all() and grid[0].item() == pytest.approx(path.first)
        assert grid[-1].item() == (path.last if name == "vp" else 0.0)
    _, ds = path.clock(grid[:-1] - 1e-7)
    slope = (path.clock(grid[:-1])[0] - path.clock(grid[:-1] - 2e-7)[0]) / 2e-7
    torch.testing.assert_close(slope, ds, rtol=1e-4, atol=1e-6)


# independent forms


@pytest.mark.parametrize("smin", [0.0, 1e-4])
@given(t=shares, seed=st.integers(0, 100))
def test_sgfm_runs_the_other_way_with_the_other_sign(smin: float, t: float, seed: int) -> None:
    """SGFM: 1 at data, x = t x0 + (1 - (1 - smin) t) eps, u = x0 - (1 - smin) eps."""
    x0, eps = pair(seed)
    ours, tau = RectifiedFlow(smin), torch.tensor([1 - t], dtype=torch.float64)
    x, u = t * x0 + (1 - (1 - smin) * t) * eps, x0 - (1 - smin) * eps
    torch.testing.assert_close(ours.interpolate(x0, eps, tau), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.velocity(x0, eps, tau), -u, atol=1e-12, rtol=0)
    if smin == 0:
        found = ours.estimate("v", -u, x, tau)
        torch.testing.assert_close(found.x0, x + (1 - t) * u, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.eps, x - t * u, atol=1e-12, rtol=0)


@given(t=st.floats(1e-4, 1.0))
def test_vp_is_the_integral_of_its_rate(t: float) -> None:
    area, _ = quad(lambda s: 0.1 + s * (20 - 0.1), 0, t)
    a, b, _, _ = PATHS["vp"].coefficients(torch.tensor([t], dtype=torch.float64))
    assert a.item() == pytest.approx(math.exp(-area / 2), rel=1e-9)
    assert b.item() == pytest.approx(math.sqrt(1 - math.exp(-area)), rel=1e-6)


@given(t=st.floats(1e-3, 1.0), seed=st.integers(0, 100))
def test_vp_in_edms_notation_is_ours(t: float, seed: int) -> None:
    """Karras et al. 2022, table 1: y = x / a, D = y - sigma F(c_in y; 999 t), c_in = 1 / sqrt(sigma^2 + 1)."""
    path, tau = PATHS["vp"], torch.tensor([t], dtype=torch.float64)
    sigma = math.sqrt(math.expm1(19.9 * t * t / 2 + 0.1 * t))
    assert path.sigma(tau).item() == pytest.approx(sigma, rel=1e-9)
    inverse = (math.sqrt(0.1**2 + 2 * 19.9 * math.log1p(sigma**2)) - 0.1) / 19.9
    assert path.noise_time(torch.tensor([sigma], dtype=torch.float64)).item() == pytest.approx(
        inverse, rel=1e-9
    )
    x0, eps = pair(seed)
    y = x0 + sigma * eps
    torch.testing.assert_close(y / math.sqrt(sigma**2 + 1), path.interpolate(x0, eps, tau))
    output = torch.randn_like(x0)
    ours = path.estimate("eps", output, path.interpolate(x0, eps, tau), tau).x0
    torch.testing.assert_close(ours, y - sigma * output, atol=1e-9, rtol=1e-9)


@given(log_sigma=st.floats(math.log(0.002), math.log(100.0)), seed=st.integers(0, 100))
def test_exploding_variance_in_edms_notation_is_ours(log_sigma: float, seed: int) -> None:
    """x = x0 + sigma eps; D = x + sigma F, whose F is minus the noise; dx/dsigma = (x - D) / sigma."""
    sigma = torch.tensor([math.exp(log_sigma)], dtype=torch.float64)
    path, (x0, eps) = PATHS["ve"], pair(seed)
    tau, output = path.noise_time(sigma), torch.randn_like(x0)
    torch.testing.assert_close(tau, sigma / (1 + sigma))
    x = path.interpolate(x0, eps, tau)
    torch.testing.assert_close(x, x0 + sigma * eps)
    found = path.estimate("eps", -output, x, tau)
    torch.testing.assert_close(found.x0, x + sigma * output, atol=1e-9, rtol=1e-9)
    _, rate = path.clock(tau)
    torch.testing.assert_close(found.v / rate, (x - found.x0) / sigma, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("betas", "last"), [("linear", 4.0358e-5), ("quad", 7.3341e-4), ("scaled_linear", 0.0046600)]
)
def test_ddpm_is_one_table_of_cumulated_products(betas: str, last: float) -> None:
    beta = [1e-4 + (t - 1) * (0.02 - 1e-4) / 999 for t in range(1, 1001)]
    if betas != "linear":
        low, high = (1e-4, 0.02) if betas == "quad" else (0.00085, 0.012)
        beta = list(np.linspace(math.sqrt(low), math.sqrt(high), 1000) ** 2)
    kept = np.cumprod([1.0, *(1 - b for b in beta)])  # abar_0 = 1
    assert kept[-1] == pytest.approx(last, rel=1e-3)
    path = DDPM(betas)
    for dtype in (torch.float64, torch.float32):
        # the noise-times of fp32 nets are a rounding away from t / T and must read the same entry
        tau = torch.arange(1001).to(dtype) / 1000
        a, b, da, _ = path.coefficients(tau)
        assert a.dtype == dtype
        tolerance = 1e-9 if dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(a.double().square(), kept, rtol=tolerance)
        np.testing.assert_allclose(b.double().square()[1:], 1 - kept[1:], rtol=tolerance)
        # at an entry the slope is its own beta's, not its neighbour's
        slope = 1000 * np.log1p(-np.array(beta)) / 2
        np.testing.assert_allclose((da / a).double()[1:], slope, rtol=100 * tolerance)


def test_ddpm_samples_whole_entries_and_no_more_than_it_has() -> None:
    for steps in (1, 7, 50, 250, 999, 1000):
        entries = PATHS["ddpm"].grid(steps) * 1000
        torch.testing.assert_close(entries, entries.round(), atol=1e-9, rtol=0)
        assert len(entries.round().unique()) == steps + 1
    with pytest.raises(UserError, match=r"sampler\.steps=1001.*1000 or fewer"):
        PATHS["ddpm"].grid(1001)


def test_edms_levels_are_its_formula() -> None:
    grid = VarianceExploding().grid(18)
    sigma = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    found = VarianceExploding().sigma(grid)
    np.testing.assert_allclose(found[:-1], sigma, rtol=1e-9)
    assert found[-1] == 0


@pytest.mark.parametrize(
    ("name", "tau", "sigma"),
    [
        ("ddpm", 0.011, 0.0469),  # DDAE++'s feature times (Xiang et al. 2025)
        ("ddpm", 0.066, 0.2249),
        ("rectified_flow", 0.06, 0.0638),
        ("rectified_flow", 0.25, 0.3333),
        ("rectified_flow", 0.2, 0.25),  # SGFM's
    ],
)
def test_published_settings_have_their_noise_level(name: str, tau: float, sigma: float) -> None:
    found = PATHS[name].sigma(torch.tensor([tau], dtype=torch.float64)).item()
    assert found == pytest.approx(sigma, abs=6e-5)


def test_a_config_names_its_path() -> None:
    def sigma(path: Path) -> float:
        return path.sigma(torch.tensor(path.first, dtype=torch.float64)).item()

    assert sigma(build_path(PathConfig(name="ve"))) == pytest.approx(100)
    assert sigma(build_path(PathConfig(name="edm"))) == pytest.approx(80)
    assert sigma(build_path(PathConfig(name="vp"))) == pytest.approx(
        math.sqrt(math.expm1(20.1 / 2)), rel=1e-6
    )
    scaled = build_path(PathConfig(name="ddpm", betas="scaled_linear"))
    assert sigma(scaled) == pytest.approx(math.sqrt(1 / 0.00466 - 1), rel=1e-3)
    half = torch.tensor(0.5, dtype=torch.float64)
    flow = build_path(PathConfig(sigma_min=1e-4))
    assert flow.sigma(half).item() == pytest.approx(1.0001)
