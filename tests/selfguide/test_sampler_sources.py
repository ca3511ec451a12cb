"""Every preset of configs/sampler against a plain loop of its source, on Gaussian data whose best denoiser is known.

Loops over a discrete table use the published codes' own indices, 0 to 999; those over continuous time the codes' own
time variable, where it runs from noise to data upwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import configs
from launcher.compose import compose
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.denoiser import Denoiser
from selfguide.diffusion.paths import build_path
from selfguide.diffusion.samplers import sample, settings
from selfguide.diffusion.samplers.schedule import noise_times
from selfguide.randomness import normal
from selfguide.spec.config import Config
from selfguide.spec.config.sampler import Spacing, table_entries
from selfguide.spec.conventions import total_weight
from tests.selfguide.exact import MEAN, SD, ExactGaussian, exact, gaussian

NOISE = 3 * gaussian(8)
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
# SGDM's betas are linear in the root, as latent diffusion's
QUAD = np.cumprod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2)


def adm(steps: int) -> list[int]:
    """guided-diffusion's `ddimN`: the first whole stride from index 0 that makes N steps."""
    for stride in range(1, 1000):
        if len(range(0, 1000, stride)) == steps:
            return list(range(0, 1000, stride))
    raise AssertionError(steps)


def respaced(steps: int) -> list[int]:
    """improved-diffusion's and DiT's N of one section: a fractional stride, from the first index to the last."""
    stride, now, found = 999 / (steps - 1), 0.0, []
    for _ in range(steps):
        found.append(round(now))
        now += stride
    return found


def latent(steps: int) -> list[int]:
    """Latent diffusion's and SGDM's uniform steps: a whole stride from index 0, and then one index more."""
    return [index + 1 for index in range(0, 1000, 1000 // steps)]


# spacing -> the indices of its source, and abar where the last of its steps ends
SOURCES: dict[Spacing, tuple[Callable[[int], list[int]], float]] = {
    "leading": (adm, 1.0),
    "linspace": (respaced, 1.0),
    "leading_offset": (latent, float(ABAR[0])),
}


@pytest.mark.parametrize("steps", [2, 10, 25, 50, 100, 250, 500])
@pytest.mark.parametrize("spacing", SOURCES)
def test_a_spacing_visits_the_noise_levels_of_its_source(spacing: Spacing, steps: int) -> None:
    indices, end = SOURCES[spacing]
    *visited, last = table_entries(steps, spacing)
    assert [entry - 1 for entry in visited] == indices(steps)[::-1]
    assert last == (0 if end == 1 else 1)


def published(spacing: Spacing, steps: int, clip: float | None, clipped_noise: str) -> Tensor:
    """DDIM with eta = 0 as the source loops over it, on Gaussian data whose best noise estimate is known."""
    indices, end = SOURCES[spacing]
    visited = indices(steps)
    before = [end, *(float(ABAR[i]) for i in visited[:-1])]
    # the published codes begin at noise of variance 1; ours at the variance that the first level has
    x = NOISE * math.sqrt(1 - ABAR[visited[-1]])
    for index, abar_before in zip(visited[::-1], before[::-1], strict=True):
        abar = float(ABAR[index])
        a, b = math.sqrt(abar), math.sqrt(1 - abar)
        eps = b * (x - a * MEAN) / (abar * SD**2 + 1 - abar)
        x0 = (x - b * eps) / a
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            eps = (x - a * x0) / b if clipped_noise == "reread" else eps
        x = math.sqrt(abar_before) * x0 + math.sqrt(1 - abar_before) * eps
    return x


@pytest.mark.parametrize(
    ("spacing", "clip", "clipped_noise"),
    [
        # guided-diffusion, DiT, latent diffusion, SGDM
        ("leading", 1.0, "reread"),
        ("linspace", None, "reread"),
        ("leading_offset", None, "reread"),
        ("leading_offset", 1.0, "kept"),
    ],
)
@pytest.mark.parametrize("steps", [10, 250])
def test_ddim_is_the_loop_of_each_source(
    spacing: Spacing, clip: float | None, clipped_noise: str, steps: int
) -> None:
    made = sample(
        "ddim",
        exact("ddpm", 8),
        NOISE,
        steps=steps,
        spacing=spacing,
        clip=clip,
        clipped_noise=clipped_noise,
    )
    torch.testing.assert_close(
        made, published(spacing, steps, clip, clipped_noise), rtol=1e-9, atol=1e-9
    )


def test_the_sources_of_ddim_differ_by_more_than_rounding() -> None:
    trailing = sample("ddim", exact("ddpm", 8), NOISE, steps=10)
    for spacing in SOURCES:
        made = sample("ddim", exact("ddpm", 8), NOISE, steps=10, spacing=spacing)
        assert float((made - trailing).abs().max()) > 1e-3
    kept, reread = (published("leading_offset", 10, 1.0, noise) for noise in ("kept", "reread"))
    assert float((kept - reread).abs().max()) > 1e-3


# whole presets, guided: conditioned images have another mean, and g and its channels are the source's

SHIFT = 0.2
CONDITIONED = MEAN + SHIFT
IMAGES = gaussian(4, 4, 2, 2)
SEEDS = torch.arange(4)
PRESETS = sorted(path.stem for path in (Path(configs.__file__).parent / "sampler").glob("*.yaml"))


def best(x: Tensor, a: float, b: float, mean: float = MEAN) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and E[eps | x]."""
    centred = (x - a * mean) / (a * a * SD**2 + b * b)
    return mean + a * SD**2 * centred, b * centred


def guided(f: Callable[[float], Tensor], g: float, channels: int | None = None) -> Tensor:
    """f_u + g (f_c - f_u) of a prediction f(mean), on the first so many channels, and f_c on the others."""
    conditional, null = f(CONDITIONED), f(MEAN)
    mixed = null + g * (conditional - null)
    if channels is None:
        return mixed
    return torch.cat((mixed[:, :channels], conditional[:, channels:]), 1)


def velocity(x: Tensor, tau: float, mean: float = MEAN) -> Tensor:
    """eps - x0 on rectified flow."""
    if tau == 1:
        return x - mean
    x0, eps = best(x, 1 - tau, tau, mean)
    return eps - x0


def euler_loop(times: list[float], g: float, channels: int | None, until: float) -> Tensor:
    """Over data-times from 0 to 1, guided from `until` on."""
    x = IMAGES
    for t, following in pairwise(times):
        weight = g if t >= until - 1e-9 else 1.0
        slope = functools.partial(velocity, x, 1 - t)
        x = x - (following - t) * guided(slope, weight, channels)
    return x


def lightning() -> Tensor:
    """Yao et al. 2025: 250 points of data-time, shifted by 0.3; conditional alone below 0.11; 10 on three channels."""
    points = [i / 249 for i in range(250)]
    return euler_loop([0.3 * t / (1 - 0.7 * t) for t in points], 10.0, 3, 0.11)


def ddae() -> Tensor:
    """Xiang et al. 2025: 250 steps; all channels, none above noise-time 0.89."""
    points = [i / 250 for i in range(251)]
    return euler_loop([0.3 * t / (1 - 0.7 * t) for t in points], 1.5, None, 0.11)


def plain_euler() -> Tensor:
    return euler_loop([i / 50 for i in range(51)], 1.0, None, 0.0)


def adaptive(rtol: float, atol: float, stop: bool = True) -> Tensor:
    """SGFM's and SiT's odeint in data-time, unguided, but that its last step ends where the way does."""
    end = torch.tensor([0.0, 1.0], dtype=torch.float64)
    # theirs passes the end and interpolates, which is 0.003 off at SiT's tolerance
    options = {"step_t": end[1:]} if stop else {}

    def slope(t: Tensor, x: Tensor) -> Tensor:
        return -velocity(x, 1 - float(t), CONDITIONED)

    return odeint(slope, IMAGES, end, method="dopri5", rtol=rtol, atol=atol, options=options)[-1]


def sde(g: float, channels: int | None, high: float) -> Tensor:
    """SiT's `sigma` diffusion and REPA's are one: 2 tau. 250 points from 1 to 0.04, then the mean alone."""
    times = [*np.linspace(1, 0.04, 250).tolist(), 0.0]
    x = IMAGES
    for k, (t, following) in enumerate(pairwise(times)):
        weight = g if t <= high + 1e-9 else 1.0

        def drift(mean: float, x: Tensor = x, t: float = t) -> Tensor:
            v = velocity(x, t, mean)
            # REPA's score of a velocity on the linear path
            ratio = -(1 - t)
            score = (ratio * v - x) / (t * t - ratio * t)
            return v - t * score

        x = x + (following - t) * guided(drift, weight, channels)
        if following:
            noise = normal(0, f"sampler-step-{k}", SEEDS, tuple(x.shape[1:])).double()
            x = x + math.sqrt(2 * t) * math.sqrt(t - following) * noise
    return x


def heun(
    steps: int, churn: float = 0.0, low: float = 0.0, high: float = 1e9, scale: float = 1.0
) -> Tensor:
    """NVIDIA's loop, from sigma 80 to 0.002 and to 0, unguided."""
    i = np.arange(steps)
    t = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = [*t.tolist(), 0.0]
    x = IMAGES * t[0]
    for k, (now, following) in enumerate(pairwise(t)):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= now <= high else 0.0
        hat = now * (1 + gamma)
        if gamma:
            noise = normal(0, f"sampler-step-{k}", SEEDS, tuple(x.shape[1:])).double()
            x = x + math.sqrt(hat**2 - now**2) * scale * noise
        d = (x - best(x, 1.0, hat, CONDITIONED)[0]) / hat
        ahead = x + (following - hat) * d
        if following:
            d = (d + (ahead - best(ahead, 1.0, following, CONDITIONED)[0]) / following) / 2
            ahead = x + (following - hat) * d
        x = ahead
    return x


def table_loop(
    spacing: Spacing,
    g: float,
    channels: int | None,
    clip: float | None,
    reread: bool,
    table: np.ndarray = ABAR,
) -> Tensor:
    """DDIM over a source's indices, guided on eps before anything is clipped."""
    indices, end = SOURCES[spacing]
    visited = indices(250)
    # the first beta is 1e-4 in all tables here, and so is the noise level `end`
    before = [end, *(float(table[i]) for i in visited[:-1])]
    x = IMAGES * math.sqrt(1 - table[visited[-1]])
    for index, abar_before in zip(visited[::-1], before[::-1], strict=True):
        a, b = math.sqrt(table[index]), math.sqrt(1 - table[index])
        eps = guided(lambda m, x=x, a=a, b=b: best(x, a, b, m)[1], g, channels)
        x0 = (x - b * eps) / a
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            eps = (x - a * x0) / b if reread else eps
        x = math.sqrt(abar_before) * x0 + math.sqrt(1 - abar_before) * eps
    return x


def plain_ddim() -> Tensor:
    """Song et al. 2021 on every fourth entry, the last one first."""
    kept = np.concatenate(([1.0], ABAR))
    x = IMAGES * math.sqrt(1 - kept[1000])
    for t, s in pairwise(range(1000, -1, -4)):
        x0, eps = best(x, math.sqrt(kept[t]), math.sqrt(1 - kept[t]), CONDITIONED)
        x = math.sqrt(kept[s]) * x0 + math.sqrt(1 - kept[s]) * eps
    return x


def vp_rate(t: float) -> tuple[float, float, float]:
    """a, b and lambda of the VP-SDE."""
    log_a = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    b = math.sqrt(-math.expm1(2 * log_a))
    return math.exp(log_a), b, log_a - math.log(b)


def vp_time(lam: float) -> float:
    return (math.sqrt(0.01 + 2 * 19.9 * math.log1p(math.exp(-2 * lam))) - 0.1) / 19.9


def dpm_fast() -> Tensor:
    """U-ViT's 50 evaluations (Lu et al. 2022): 17 intervals even in lambda from t = 1 to 1e-4, 16 of order 3."""
    first, last = vp_rate(1.0)[2], vp_rate(1e-4)[2]
    lams = [first + i / 17 * (last - first) for i in range(18)]
    x = IMAGES * vp_rate(1.0)[1]

    def eps_at(x: Tensor, lam: float) -> Tensor:
        a, b, _ = vp_rate(vp_time(lam))
        return guided(lambda m: best(x, a, b, m)[1], 1.4)

    for order, (s, t) in zip([3] * 16 + [2], pairwise(lams), strict=True):
        h, (a_s, _, _), (a_t, b_t, _) = t - s, vp_rate(vp_time(s)), vp_rate(vp_time(t))
        noise = eps_at(x, s)
        if order == 2:
            a_1, b_1, _ = vp_rate(vp_time(s + h / 2))
            middle = eps_at(a_1 / a_s * x - b_1 * math.expm1(h / 2) * noise, s + h / 2)
            x = a_t / a_s * x - b_t * math.expm1(h) * noise - b_t * math.expm1(h) * (middle - noise)
            continue
        r1, r2 = 1 / 3, 2 / 3
        (a_1, b_1, _), (a_2, b_2, _) = (vp_rate(vp_time(s + r * h)) for r in (r1, r2))
        one = eps_at(a_1 / a_s * x - b_1 * math.expm1(r1 * h) * noise, s + r1 * h)
        bent = b_2 * (math.expm1(r2 * h) / (r2 * h) - 1)
        two = a_2 / a_s * x - b_2 * math.expm1(r2 * h) * noise - r2 / r1 * bent * (one - noise)
        noise_two = eps_at(two, s + r2 * h)
        last_bent = b_t * (math.expm1(h) / h - 1)
        x = a_t / a_s * x - b_t * math.expm1(h) * noise - 1 / r2 * last_bent * (noise_two - noise)
    return x


def dpm(order: int, steps: int) -> Tensor:
    """DPM-Solver-2, or DPM-Solver++(2M), in even steps of t from 1 to 1e-4, unguided."""
    times = np.linspace(1, 1e-4, steps + 1).tolist()
    x, data, h_before = IMAGES * vp_rate(1.0)[1], None, 0.0
    for i, (s, t) in enumerate(pairwise(times)):
        (a_s, b_s, lam_s), (a_t, b_t, lam_t) = vp_rate(s), vp_rate(t)
        h = lam_t - lam_s
        x0, eps = best(x, a_s, b_s, CONDITIONED)
        if order == 2:
            m = vp_time(lam_s + h / 2)
            a_m, b_m, _ = vp_rate(m)
            eps = best(a_m / a_s * x - b_m * math.expm1(h / 2) * eps, a_m, b_m, CONDITIONED)[1]
            x = a_t / a_s * x - b_t * math.expm1(h) * eps
            continue
        r = h_before / h
        extrapolate = data is not None and i < steps - 1
        d = (1 + 1 / (2 * r)) * x0 - data / (2 * r) if extrapolate else x0
        x = b_t / b_s * x - a_t * (math.exp(-h) - 1) * d
        data, h_before = x0, h
    return x


# preset -> its path, and what its source makes of IMAGES
LOOPS: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "euler": ("rectified_flow", plain_euler),
    "lightning": ("lightning", lightning),
    "ddae": ("rectified_flow_logit_normal", ddae),
    "dopri5": ("sgfm", lambda: adaptive(1e-5, 1e-5)),
    "dopri5_sit": ("rectified_flow", lambda: adaptive(1e-3, 1e-6)),
    "euler_maruyama_sit": ("rectified_flow", lambda: sde(1.5, 3, 1.0)),
    "euler_maruyama_repa": ("rectified_flow", lambda: sde(1.8, None, 0.7)),
    "heun_edm": ("edm", lambda: heun(18)),
    "heun_edm_64": ("edm", lambda: heun(40)),
    "heun_edm_churn": ("edm", lambda: heun(256, 40, 0.05, 50, 1.003)),
    "ddim": ("ddpm", plain_ddim),
    "ddim_adm": ("ddpm", lambda: table_loop("leading", 1.0, None, 1.0, True)),
    "ddim_dit": ("ddpm", lambda: table_loop("linspace", 1.5, 3, None, True)),
    "ddim_sgdm": ("ddpm_quad", lambda: table_loop("leading_offset", 2.0, None, 1.0, False, QUAD)),
    "dpm_uvit": ("vp", dpm_fast),
    "dpm2": ("vp", lambda: dpm(2, 25)),
    "dpmpp": ("vp", lambda: dpm(1, 20)),
}


def composed(preset: str, path: str, *more: str) -> Config:
    choices = ["experiment=in1k_dit", "cluster=slurm", f"path={path}", f"sampler={preset}", *more]
    return compose(choices)


def drawn(config: Config) -> tuple[Tensor, int]:
    """IMAGES as that path and sampler carry them to data, guided as the sampler says; and the evaluations."""
    path = build_path(config.path)
    denoiser = Denoiser(
        ExactGaussian(path, config.path.prediction, SHIFT),
        path,
        Condition.of(id=torch.zeros(len(IMAGES), dtype=torch.int64)),
        config.sampler.g,
        config.sampler.interval,
        prediction=config.path.prediction,
        sigma_data=config.path.sigma_data,
        guided_channels=config.sampler.guided_channels,
    )
    made = sample(denoiser=denoiser, noise=IMAGES, seeds=SEEDS, **settings(config.sampler))
    return made, denoiser.evaluations


def test_every_preset_of_a_sampler_has_a_loop_here() -> None:
    assert sorted(LOOPS) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_draws_what_its_source_draws(
    preset: str, agree: Callable[[Tensor, Tensor, float], None]
) -> None:
    """To what times in fp32, in which networks are given them, may move."""
    path, loop = LOOPS[preset]
    made, _ = drawn(composed(preset, path))
    agree(made, loop(), 1e-7)


@pytest.mark.parametrize(("rtol", "atol"), [(1e-5, 1e-5), (1e-3, 1e-6)])
def test_an_adaptive_solver_that_passes_the_end_is_off_by_its_tolerance(
    rtol: float, atol: float
) -> None:
    """The published calls let their last step pass data-time 1 and interpolate back."""
    off = (adaptive(rtol, atol) - adaptive(rtol, atol, stop=False)).abs().max()
    assert 0 < float(off) < 20 * rtol


def test_cedm_guides_on_edms_path_as_its_code() -> None:
    """Adaloglou et al. 2025: D = (1 + w) D_c - w D_u of the denoised images; its paper's samples have w = 0."""
    w, x = 0.5, IMAGES * 3
    sampler = composed("heun_edm", "edm", f"sampler.g={total_weight('cedm', w)}").sampler
    denoiser = exact("edm", len(x), shift=SHIFT, g=sampler.g)
    made = denoiser.estimate(x, 3 / 4).x0
    conditional, null = best(x, 1.0, 3.0, CONDITIONED)[0], best(x, 1.0, 3.0)[0]
    torch.testing.assert_close(made, (1 + w) * conditional - w * null, rtol=1e-6, atol=1e-6)
    assert total_weight("cedm", None) == total_weight("cedm", 0.0) == 1


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_log_snr_on_ve_has_its_geometric_levels(steps: int) -> None:
    """Song et al. 2021 as EDM's table 1 has it: sigma^2 = 100^2 (0.02^2 / 100^2)^(i / (N - 1)), and then 0."""
    denoiser = exact("ve", 4)
    times = noise_times(denoiser.preconditioning, steps, spacing="log_snr")
    sigma = denoiser.path.sigma(times)
    wanted = [100 * (0.02 / 100) ** (i / max(steps - 1, 1)) for i in range(steps)]
    np.testing.assert_allclose(sigma[:-1], wanted, rtol=1e-9)
    assert sigma[-1] == 0
