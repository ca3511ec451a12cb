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
    steep = lines(60, lambda report, b: 0.8**b * (1.5 if report > 40 else 1.0))
    assert drifts(steep) is None, "nor where losses differ by noise level"


def test_a_bin_whose_loss_is_low_beside_the_others_drifts_by_a_share_of_its_own() -> None:
    def loss(report: int, b: int) -> float:
        return 0.01 * (1.3 if report >= 40 else 1.0) if b == 2 else 1.0

    found = drifts(lines(60, loss))
    assert found is not None and found.rise == pytest.approx(0.3, rel=0.2)


def signed(report: int, b: int) -> float:
    """Losses from -1.5 to 1.5, whose mean is 0."""
    return 0.2 * (b - (BINS - 1) / 2)


@pytest.mark.parametrize(("before", "after"), [(0.02, 0.06), (0.0, 0.04), (-0.02, 0.02)])
def test_a_bin_that_passes_0_by_less_than_a_tenth_of_the_others_is_no_drift(
    before: float, after: float
) -> None:
    def loss(report: int, b: int) -> float:
        return signed(report, b) if b != 7 else after if report >= 40 else before

    assert drifts(lines(60, loss)) is None


@pytest.mark.parametrize("mean", [-0.002, 0.0, 0.002, 0.02])
@pytest.mark.parametrize("bin_", [0, 7, 15])
def test_a_bin_that_rises_under_a_mean_near_0_is_named_by_its_share_of_what_losses_are(
    bin_: int, mean: float
) -> None:
    """The mean moves by 0.25 / 16, several times what it was."""

    def loss(report: int, b: int) -> float:
        return signed(report, b) + mean + (0.25 if b == bin_ and report >= 40 else 0.0)

    found = drifts(lines(60, loss))
    assert found is not None and found.what.startswith(f"at noise-times {bin_ / BINS:.2f} to")
    # losses are 0.8 without their signs, and those at the ends 1.5
    size = max(0.8, abs(signed(0, bin_) + mean))
    # of windows of ten reports with noise
    assert found.rise == pytest.approx(0.25 / size, rel=0.2)
    assert found.mean == pytest.approx(0.25 / BINS / 0.8, rel=0.3)


def test_a_mean_that_rises_from_near_0_with_all_its_parts_is_no_drift_of_a_part() -> None:
    def loss(report: int, b: int) -> float:
        return signed(report, b) + (0.2 if report >= 40 else 0.002)

    assert drifts(lines(60, loss)) is None


def test_bins_without_images_and_lines_without_a_spectrum_are_passed_over() -> None:
    history = lines(60, lambda report, b: 1.3 if b == 3 and report > 40 else 1.0)
    for line in history:
        line["spectrum"]["all"]["loss"][0], line["spectrum"]["all"]["images"][0] = None, 0.0
    old = [{"images": 0, "loss": 1.0}] * 5
    found = drifts(old + history)
    assert found is not None and "0.19 to 0.25" in found.what
