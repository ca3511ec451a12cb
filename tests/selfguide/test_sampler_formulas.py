"""Samplers against the formulas of their papers, written plainly, on Gaussian data whose best denoiser is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from selfguide.diffusion.paths import DDPM
from selfguide.diffusion.samplers import sample
from selfguide.randomness import normal
from tests.selfguide.exact import MEAN, PATHS, SD, exact, gaussian

NOISE = gaussian(8)
SEEDS = torch.arange(8)


def vp(t: float) -> tuple[float, float, float]:
    """a, b and lambda of the VP-SDE (Song et al. 2021)."""
    log_a = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    a = math.exp(log_a)
    b = math.sqrt(1 - a * a)
    return a, b, log_a - math.log(b)


def vp_time(lam: float) -> float:
    return (math.sqrt(0.01 + 2 * 19.9 * math.log1p(math.exp(-2 * lam))) - 0.1) / 19.9


def best(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and E[eps | x]."""
    x0 = MEAN + a * SD**2 * (x - a * MEAN) / (a * a * SD**2 + b * b)
    return x0, (x - a * x0) / b


@pytest.mark.parametrize("sampler", ["dpm1", "dpm2", "dpmpp"])
def test_dpm_solvers_are_their_papers_formulas(sampler: str) -> None:
    """Lu et al. 2022: in lambda and exponentials, as published."""
    times = [1 - (1 - 1e-3) * i / 12 for i in range(13)]
    x, data, h_before = NOISE * vp(1.0)[1], None, 0.0
    for i, (s, t) in enumerate(pairwise(times)):
        (a_s, b_s, lam_s), (a_t, b_t, lam_t) = vp(s), vp(t)
        h = lam_t - lam_s
        x0, eps = best(x, a_s, b_s)
        if sampler == "dpmpp":
            extrapolate = data is not None and i < 11
            r = h_before / h
            d = (1 + 1 / (2 * r)) * x0 - data / (2 * r) if extrapolate else x0
            x = b_t / b_s * x - a_t * (math.exp(-h) - 1) * d
            data, h_before = x0, h
            continue
        if sampler == "dpm2":
            m = vp_time(lam_s + h / 2)
            a_m, b_m, _ = vp(m)
            u = a_m / a_s * x - b_m * math.expm1(h / 2) * eps
            eps = best(u, a_m, b_m)[1]
        x = a_t / a_s * x - b_t * math.expm1(h) * eps
    torch.testing.assert_close(
        sample(sampler, exact("vp", 8), NOISE, steps=12), x, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_its_papers_formula_on_the_discrete_table(eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cat((torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0))).tolist()
    x = NOISE * math.sqrt(1 - abar[1000])
    for k, (t, s) in enumerate(pairwise(range(1000, -1, -100))):
        x0, eps = best(x, math.sqrt(abar[t]), math.sqrt(1 - abar[t]))
        up = (
            eta
            * math.sqrt((1 - abar[s]) / (1 - abar[t]))
            * math.sqrt(max(0, 1 - abar[t] / abar[s]))
        )
        z = normal(0, f"sampler-step-{k}", SEEDS, (1, 2, 2)).double()
        x = math.sqrt(abar[s]) * x0 + math.sqrt(max(0, 1 - abar[s] - up**2)) * eps + up * z
    made = sample("ddim", exact("ddpm", 8), NOISE, steps=10, eta=eta, seeds=SEEDS)
    torch.testing.assert_close(made, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("churn", [0.0, 10.0, 80.0])
def test_heun_is_edms_algorithm_2(churn: float) -> None:
    """Karras et al. 2022, algorithm 2 and eq. 5, with churn in a span of noise levels; 80 meets its ceiling."""
    steps, low, high, noise_scale = 18, 0.05, 50.0, 1.003
    ends = (80 ** (1 / 7), 0.002 ** (1 / 7))
    t = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7 for i in range(steps)] + [0.0]
    x = t[0] * NOISE
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        t_hat = t[i] * (1 + gamma)
        z = normal(0, f"sampler-step-{i}", SEEDS, (1, 2, 2)).double()
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * noise_scale * z
        d = (x_hat - best(x_hat, 1.0, t_hat)[0]) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0:
            d_next = (x - best(x, 1.0, t[i + 1])[0]) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_next) / 2
    options = {"churn": churn, "churn_sigma": (low, high), "churn_noise": noise_scale}
    made = sample("heun", exact("edm", 8), NOISE, steps=steps, seeds=SEEDS, **options)
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("diffusion", ["repa", "sit", "sbdm"])
def test_euler_maruyama_is_repas_loop(diffusion: str) -> None:
    """Yu et al. 2025: N - 1 noisy steps from 1 to 0.04 and one of the mean; on rectified flow REPA's w is SiT's.

    SBDM's w, infinite at 1, is held to a tenth of the noise a step.
    """
    times = [*torch.linspace(1, 0.04, 20, dtype=torch.float64).tolist(), 0.0]
    x = NOISE
    for k, (t, following) in enumerate(pairwise(times)):
        x0, eps = best(x, 1 - t, t)
        bound = 0.1 * 2 * t * t / (t - following)
        w = min(2 * t / max(1 - t, 1e-300), bound) if diffusion == "sbdm" else 2 * t
        drift = (eps - x0) - w * (-eps / t) / 2
        x = x + drift * (following - t)
        if following:
            z = normal(0, f"sampler-step-{k}", SEEDS, (1, 2, 2)).double()
            x = x + math.sqrt(w * (t - following)) * z
    made = sample(
        "euler_maruyama", exact("rf", 8), NOISE, steps=20, seeds=SEEDS, diffusion=diffusion
    )
    torch.testing.assert_close(made, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["rf", "vp"])
@pytest.mark.parametrize("diffusion", ["sit", "repa", "sbdm"])
def test_euler_maruyama_has_the_variance_of_its_scheme(diffusion: str, path: str) -> None:
    """On Gaussian data every step is affine, so mean and variance of the scheme are a recursion of two numbers."""
    count, steps = 8000, 40
    times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    mean, variance = 0.0, float(PATHS[path][0].coefficients(torch.tensor(1.0).double())[1]) ** 2
    for t, following in pairwise(times):
        a, b, da, db = (1 - t, t, -1.0, 1.0) if path == "rf" else (*vp(t)[:2], 0.0, 0.0)
        if path == "vp":
            da = -a * (0.1 + 19.9 * t) / 2  # a' = -beta a / 2
            db = -a * da / b
        w = {"sit": 2 * b, "repa": 2 * t}.get(diffusion)
        bound = 0.1 * 2 * b * b / (t - following)  # SBDM's w is held to a tenth of the noise a step
        w = min(2 * (b * db - b * b * da / max(a, 1e-300)), bound) if w is None else w
        total = a * a * SD**2 + b * b
        # v - w score / 2 = slope (x - a MEAN) + a' MEAN
        slope = (da * a * SD**2 + db * b) / total + w / 2 / total
        width = t - following
        mean = mean - width * (slope * (mean - a * MEAN) + da * MEAN)
        variance = (1 - width * slope) ** 2 * variance + (w * width if following else 0)
    x = sample(
        "euler_maruyama",
        exact(path, count),
        gaussian(count, 1, 1, 2),
        steps=steps,
        seeds=torch.arange(count),
        diffusion=diffusion,
    )
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / x.numel())
    assert abs(x.var() / variance - 1) < 4 * math.sqrt(2 / x.numel())


def test_ddim_clips_the_data_and_reads_the_noise_off_it_again() -> None:
    x = sample("ddim", exact("ddpm", 8), NOISE * 3, steps=10, clip=0.4)
    assert x.abs().max() == 0.4
    plain, loose = (
        sample("ddim", exact("ddpm", 8), NOISE, steps=10, clip=clip) for clip in (None, 1e6)
    )
    torch.testing.assert_close(plain, loose)
    # one step by hand, from the table's end to its middle
    seen: list[Tensor] = []
    sample(
        "ddim", exact("ddpm", 8), NOISE, steps=2, clip=0.1, callback=lambda i, t, x: seen.append(x)
    )
    (a1, b1), (a0, b0) = (
        [float(c) for c in DDPM().coefficients(torch.tensor(t, dtype=torch.float64))[:2]]
        for t in (1.0, 0.5)
    )
    x0 = best(NOISE * b1, a1, b1)[0].clamp(-0.1, 0.1)
    torch.testing.assert_close(seen[0], a0 * x0 + b0 * (NOISE * b1 - a1 * x0) / b1)
