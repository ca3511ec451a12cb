"""Papers' numbers as ours: each paper's formula beside our canonical one, at arbitrary predictions."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfguide.spec.conventions import (
    guidance_interval,
    noise_shift,
    noise_time,
    total_weight,
)
from shards.errors import UserError

numbers = st.floats(-10, 10)

# source -> its formula as written, of (f_c, f_u, its weight)
FORMULAS: dict[str, Callable[[float, float, float], float]] = {
    "ho_salimans": lambda c, u, w: (1 + w) * c - w * u,
    "sgdm": lambda c, u, w: (1 - w) * u + w * c,
    "sgfm": lambda c, u, s: c + s * (c - u),
    "uvit": lambda c, u, s: c + s * (c - u),
    "dit": lambda c, u, s: u + s * (c - u),
    "sit": lambda c, u, s: u + s * (c - u),
    "repa": lambda c, u, s: u + s * (c - u),
    "lightningdit": lambda c, u, s: u + s * (c - u),
    "ddae++": lambda c, u, s: u + s * (c - u),
    "edm2": lambda c, u, s: u + s * (c - u),
    "cedm": lambda c, u, w: (1 + w) * c - w * u,
}


@pytest.mark.parametrize("source", FORMULAS)
@given(c=numbers, u=numbers, w=numbers)
def test_a_papers_weight_guides_as_its_formula(source: str, c: float, u: float, w: float) -> None:
    g = total_weight(source, w)
    assert u + g * (c - u) == pytest.approx(FORMULAS[source](c, u, w), abs=1e-9)


@pytest.mark.parametrize(
    ("source", "weight", "g"),
    [
        ("sgdm", 2.0, 2.0), ("sgfm", 0.4, 1.4), ("uvit", 0.7, 1.7), ("dit", 1.5, 1.5), ("repa", 1.8, 1.8),
        ("lightningdit", 6.7, 6.7), ("ddae++", 1.5, 1.5), ("cedm", None, 1.0), ("cedm", 0.5, 1.5),
        ("ho_salimans", 0.0, 1.0),
    ],
)  # fmt: skip
def test_published_weights(source: str, weight: float | None, g: float) -> None:
    assert total_weight(source, weight) == pytest.approx(g)


@given(tau=st.floats(0, 1))
def test_a_papers_time_is_our_noise_time(tau: float) -> None:
    for source in ("sgfm", "sit", "lightningdit"):  # 1 at data
        assert noise_time(source, 1 - tau) == pytest.approx(tau)
    for source in ("repa", "ddae++", "uvit"):
        assert noise_time(source, tau) == tau
    assert noise_time("ddpm", 1000 * tau) == pytest.approx(tau)
    if tau < 1:
        for source in ("edm", "cedm", "ve"):
            assert noise_time(source, tau / (1 - tau)) == pytest.approx(tau)


def test_an_index_into_the_table_begins_at_its_first_entry() -> None:
    assert noise_time("dit", 0) == noise_time("ddpm", 1) == 0.001
    assert noise_time("dit", 999) == 1.0


@given(t=st.floats(0, 1), s=st.floats(0.05, 20))
def test_a_shift_of_data_time_is_the_inverse_shift_of_noise_time(t: float, s: float) -> None:
    """LightningDiT maps data-time t to s t / (1 + (s - 1) t)."""
    shifted, k, tau = s * t / (1 + (s - 1) * t), noise_shift("lightningdit", s), 1 - t
    assert k * tau / (1 + (k - 1) * tau) == pytest.approx(1 - shifted, abs=1e-9)


def test_lightningdits_published_shift_is_ddaes() -> None:
    assert noise_shift("lightningdit", 0.3) == pytest.approx(noise_shift("ddae++", 10 / 3))
    assert noise_shift("sd3", 3.0) == 3.0


@given(t=st.floats(0, 1), start=st.floats(0, 1))
def test_lightningdit_guides_from_its_data_time_on(t: float, start: float) -> None:
    low, high = guidance_interval("lightningdit", start)
    assert (low <= 1 - t <= high) == (1 - t <= 1 - start)


def test_published_intervals() -> None:
    assert guidance_interval("lightningdit", 0.11) == pytest.approx((0.0, 0.89))
    assert guidance_interval("lightningdit", 0.125) == pytest.approx((0.0, 0.875))
    assert guidance_interval("repa", 0.7) == (0.0, 0.7)
    assert guidance_interval("ddae++", 0.89) == (0.0, 0.89)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: total_weight("sgfn", 1.0), "'sgfn' is known; did you mean 'sgfm'"),
        (lambda: total_weight("cedn", 1.0), "did you mean 'cedm'"),
        (lambda: total_weight("cedm", math.inf), "inf of cedm"),
        (lambda: total_weight("dit", None), "None of dit"),
        (lambda: total_weight("dit", math.nan), "nan of dit"),
        (lambda: noise_time("sitt", 0.5), "did you mean 'sit'"),
        (lambda: noise_time("sit", 1.2), "1.2 is not one of sit's: take 0 to 1"),
        (lambda: noise_time("ddpm", 1001), "take 0 to 1000"),
        (lambda: noise_time("dit", 1000), "take 0 to 999"),
        (lambda: noise_time("edm", math.inf), "inf is not one of edm's"),
        (lambda: noise_time("edm", math.nan), "nan is not one of edm's"),
        (lambda: noise_shift("lightningdt", 0.3), "did you mean 'lightningdit'"),
        (lambda: noise_shift("lightningdit", 0.0), "0 of lightningdit must be a positive"),
        (lambda: guidance_interval("repo", 0.5), "did you mean 'repa'"),
        (lambda: guidance_interval("repa", 1.5), "1.5 of repa"),
    ],
)
def test_what_no_paper_says_is_refused(call: Callable[[], float], names: str) -> None:
    with pytest.raises(UserError) as raised:
        call()
    assert names in str(raised.value)


def test_converting_needs_no_torch() -> None:
    script = "import sys, selfguide.spec.conventions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
