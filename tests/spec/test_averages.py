"""Averages: one key in files and records, and decays that are the published ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.compose import compose
from selfguide.spec.averages import WIDEST, AverageSpec, averages_of, gamma, relative_width
from selfguide.spec.config import TrainConfig
from selfguide.spec.validate import validate
from shards.errors import UserError


@given(st.one_of(
    st.builds(AverageSpec, halflife=st.integers(1, 10**12)),
    st.builds(AverageSpec, width=st.floats(1e-3, WIDEST)),
    st.builds(AverageSpec, rate=st.floats(1e-9, 1.0)),
))  # fmt: skip
def test_an_average_is_found_by_its_key_in_either_form(average: AverageSpec) -> None:
    assert AverageSpec.of(average.key) == AverageSpec.of(average.plain) == average
    assert average.file == f"ema-{average.key}.safetensors" and "/" not in average.file


def test_keys_of_half_lives_are_those_of_files_and_records_of_before() -> None:
    config = compose(["experiment=digits_dit", "cluster=local"])
    train = TrainConfig(images=64, batch=64, ema_halflife=(2000, 7_100_000), ema_width=(0.05,))
    config = replace(config, train=train)
    assert [a.file for a in averages_of(config)] == [
        "ema-2000.safetensors",
        "ema-7100000.safetensors",
        "ema-power-0.05.safetensors",
    ]
    assert [a.plain for a in averages_of(config)] == [2000, 7_100_000, "power-0.05"]
    assert len(averages_of(replace(config, train=replace(train, ema_width=())))) == 2


def test_a_guidance_with_an_average_of_its_own_has_it_first() -> None:
    settings = ["experiment=digits_dit", "cluster=local", "guidance.teacher_rate=1e-4"]
    assert [a.plain for a in averages_of(compose(settings))] == ["rate-0.0001", 20_000]
    alone = compose([*settings, "train.ema_halflife=[]"])
    validate(alone)
    assert [a.file for a in averages_of(alone)] == ["ema-rate-0.0001.safetensors"]


@pytest.mark.parametrize(("batch", "halflife"), [(1024, 7_097_432), (512, 3_548_716), (1, 6931.1)])
def test_a_share_a_step_is_a_half_life_in_images_by_batch(batch: int, halflife: float) -> None:
    """B ln 2 / -ln(1 - rate), and no ramp: as much of itself is kept at the first step as at the last."""
    average = AverageSpec(rate=1e-4)
    kept = {average.decay(batch, seen, 0.05) for seen in (batch, 100 * batch, 10**9)}
    assert kept == {0.9999}
    assert 0.5 ** (batch / halflife) == pytest.approx(0.9999, abs=1e-9)


@pytest.mark.parametrize("key", ["", "half", "power-", "power-x", "rate-", "1.5"])
def test_a_key_of_no_average_is_refused(key: str) -> None:
    with pytest.raises(UserError):
        AverageSpec.of(key)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, WIDEST])
def test_gamma_of_a_width_is_the_root_of_edm2s_polynomial(width: float) -> None:
    """Karras et al. 2024, algorithm 2 of its appendix C."""
    t = width**-2
    assert gamma(width) == pytest.approx(np.roots([1, 7, 16 - t, 12 - t]).real.max(), abs=1e-9)
    assert relative_width(gamma(width)) == pytest.approx(width, rel=1e-12)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, float("nan")])
def test_a_width_that_no_power_function_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError):
        gamma(width)


def weights(average: AverageSpec, batch: int, steps: int, ramp: float) -> np.ndarray:
    """(1 + steps,) what the average holds of the weights at the start and after each step."""
    held = np.zeros(steps + 1)
    held[0] = 1.0
    for step in range(1, steps + 1):
        decay = average.decay(batch, batch * step, ramp)
        held *= decay
        held[step] += 1 - decay
    return held


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_function_weighs_each_step_by_its_closed_form(width: float) -> None:
    """t^gamma over [0, 1], integrated over each step; its standard deviation is the width that was asked for."""
    steps, exponent = 4000, gamma(width) + 1
    held = weights(AverageSpec(width=width), 64, steps, 0.05)
    times = np.arange(steps + 1) / steps
    np.testing.assert_allclose(held[1:], np.diff(times**exponent), rtol=1e-9, atol=1e-18)
    assert held[0] == 0
    mean = (held * times).sum()
    assert np.sqrt((held * (times - mean) ** 2).sum()) == pytest.approx(width, rel=2e-3)


@pytest.mark.parametrize("ramp", [0.0, 0.05])
def test_a_half_life_halves_what_it_held_and_ramps_up_as_edm(ramp: float) -> None:
    average = AverageSpec(halflife=6400)
    far = 10**9
    assert average.decay(64, far, ramp) ** 100 == pytest.approx(0.5, rel=1e-12)
    early = min(6400, ramp * 640) if ramp else 6400
    assert average.decay(64, 640, ramp) == 0.5 ** (64 / early)
