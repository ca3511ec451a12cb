"""The spread that DDIM leaves of narrow data, against its closed form; and the picture."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfguide.spec.config import SamplerConfig
from selfguide.spec.config.sampler import Spacing, table_entries
from tools.spacing import LOOKS, SD, STEPS, measured, plot, spread


@pytest.mark.parametrize("spacing", ["leading", "linspace", "leading_offset"])
def test_the_spread_of_centred_data_is_the_product_of_its_steps(spacing: Spacing) -> None:
    """On N(0, SD^2) a step multiplies x by (a' a SD^2 + b' b) / (a^2 SD^2 + b^2)."""
    abar = np.concatenate(([1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))))
    a, b = np.sqrt(abar), np.sqrt(1 - abar)
    entries = table_entries(50, spacing)
    wanted = b[entries[0]]
    for t, s in pairwise(entries):
        wanted *= (a[s] * a[t] * SD**2 + b[s] * b[t]) / (a[t] ** 2 * SD**2 + b[t] ** 2)
    made = spread(SamplerConfig(name="ddim", steps=50, spacing=spacing), 0.0)
    assert made == pytest.approx(wanted, rel=1e-3)  # of the quantiles


def test_a_clip_narrows_data_beside_it_and_no_other() -> None:
    plain = SamplerConfig(name="ddim", steps=50, spacing="leading")
    clipped = SamplerConfig(name="ddim", steps=50, spacing="leading", clip=1.0)
    assert spread(clipped, 0.0) == pytest.approx(spread(plain, 0.0), rel=1e-6)
    assert spread(clipped, 0.95) < 0.97 * spread(plain, 0.95)


def test_every_source_comes_nearer_with_its_steps_and_is_drawn(tmp_path: Path) -> None:
    found = {0.0: measured(0.0)}
    assert found[0.0].keys() == LOOKS.keys()
    for values in found[0.0].values():
        assert len(values) == len(STEPS) and values == sorted(values)
        assert 0.9 * SD < values[-1] < SD * math.sqrt(1 + 0.01**2 / SD**2)
    plot(found, tmp_path / "spacing.png")
    with Image.open(tmp_path / "spacing.png") as picture:
        assert picture.size[0] > 500
