"""A part of the loss that rises while the mean does not: it is named, and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from selfguide.spec.advice import advise
from selfguide.spec.drift import BINS, MEMORY, drifts


def lines(
    count: int,
    loss: Callable[[int, int], float],
    noise: float = 0.02,
    **kinds: Callable[[int], float],
) -> list[dict[str, Any]]:
    """Reports whose bin b has the loss `loss(report, b)`, with noise; `kinds` are the losses of kinds of conditions."""
    draw = random.Random(0)
    found = []
    for report in range(count):
        row = [loss(report, b) * (1 + noise * draw.gauss(0, 1)) for b in range(BINS)]
        spectrum = {"all": {"loss": row, "images": [64.0] * BINS}}
        for kind, of in kinds.items():
            value = of(report) * (1 + noise * draw.gauss(0, 1))
            spectrum[kind] = {"loss": [value] * BINS, "images": [8.0] * BINS}
        found.append({"images": 100 * (report + 1), "spectrum": spectrum})
    return found


@pytest.mark.parametrize("count", [19, 20, 60, MEMORY + 50])
def test_a_spectrum_that_only_has_noise_does_not_drift(count: int) -> None:
    assert drifts(lines(count, lambda report, b: 1.0 + 0.1 * b)) is None
    falling = lines(count, lambda report, b: (1.0 + 0.1 * b) * (0.5 + 0.5 ** (1 + report / 10)))
    assert drifts(falling) is None, "a loss that falls everywhere is learning"


@pytest.mark.parametrize("bin_", [0, 7, 15])
@pytest.mark.parametrize("begins, slope", [(30, 1.0), (10, 0.005)])
def test_one_bin_that_rises_at_once_or_slowly_is_named(
    bin_: int, begins: int, slope: float
) -> None:
    """A fifth more, under a mean that goes on falling."""

    def loss(report: int, b: int) -> float:
        rise = min(0.2, slope * max(0, report - begins)) if b == bin_ else 0.0
        return (1.0 - 0.0002 * report) * (1 + rise)

    history = lines(60, loss)
    found = drifts(history)
    assert found is not None and found.what.startswith(f"at noise-times {bin_ / BINS:.2f} to")
    assert 0.1 <= found.rise < 0.3 and found.mean < 0.03
    (said,) = advise(history)
    assert said.name == "drift" and said.images == history[-1]["images"]


def test_a_kind_of_condition_that_rises_is_named() -> None:
    kinds = {"conditioned": lambda r: 1.0, "null": lambda r: 1.3 if r >= 40 else 1.0}
    found = drifts(lines(60, lambda report, b: 1.0, **kinds))
    assert found is not None and found.what == "of null images"


def test_a_loss_that_rises_everywhere_is_no_drift_of_a_part() -> None:
    """The mean shows that by itself."""
    assert drifts(lines(60, lambda report, b: 1.5 if report > 40 else 1.0)) is None


def test_bins_without_images_and_lines_without_a_spectrum_are_passed_over() -> None:
    history = lines(60, lambda report, b: 1.3 if b == 3 and report > 40 else 1.0)
    for line in history:
        line["spectrum"]["all"]["loss"][0], line["spectrum"]["all"]["images"][0] = None, 0.0
    old = [{"images": 0, "loss": 1.0}] * 5
    found = drifts(old + history)
    assert found is not None and "0.19 to 0.25" in found.what
