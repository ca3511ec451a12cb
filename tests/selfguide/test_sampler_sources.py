"""Samplers against plain loops with the published codes' own indices into the 1,000 noise levels, 0 to 999."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from selfguide.diffusion.samplers import sample
from selfguide.spec.config.sampler import Spacing, table_entries
from tests.selfguide.exact import MEAN, SD, exact, gaussian

NOISE = 3 * gaussian(8)
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


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
