"""Frechet distance: closed forms, independent oracles, and laws of the streamed moments."""

import numpy as np
import pytest
from cleanfid.fid import frechet_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from selfguide.evaluation.metrics.copies import copy_rate
from selfguide.evaluation.metrics.frechet import Reference, between, distance, frechet
from selfguide.evaluation.metrics.moments import Moments


def features(seed: int, count: int = 500, width: int = 6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) @ generator.normal(
        size=(width, width)
    ) + generator.normal(size=width)


def test_closed_forms() -> None:
    eye, zero = np.eye(3), np.zeros(3)
    assert distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-10)
    assert distance(zero, eye, np.array([3.0, 4, 0]), eye) == pytest.approx(25)
    a, b = np.diag([1.0, 4, 9]), np.diag([4.0, 1, 16])
    assert distance(zero, a, zero, b) == pytest.approx(1 + 1 + 1)  # sum of (sqrt a - sqrt b)^2
    assert distance(zero, eye, zero, np.zeros((3, 3))) == pytest.approx(3)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_equals_clean_fid_and_is_symmetric_and_rotation_invariant(seed: int) -> None:
    a, b = features(seed), features(seed + 1)
    ours = between(Moments.of(a), Moments.of(b))
    oracle = frechet_distance(
        a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    )
    assert ours == pytest.approx(oracle, rel=1e-8)
    assert between(Moments.of(b), Moments.of(a)) == pytest.approx(ours, rel=1e-9)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))
    assert between(Moments.of(a @ turn), Moments.of(b @ turn)) == pytest.approx(ours, rel=1e-9)


@given(st.integers(1, 499), st.sampled_from([0.0, 1e4, -1e6]))
@settings(deadline=None)
def test_moments_of_parts_add_up_wherever_the_features_lie(cut: int, offset: float) -> None:
    whole = features(0) + offset
    shift = whole[:7].mean(0)
    summed = Moments.of(whole[:cut], shift)
    summed.merge(Moments.of(whole[cut:], shift))
    assert summed.count == 500
    np.testing.assert_allclose(summed.covariance, np.cov(whole, rowvar=False), rtol=1e-9, atol=1e-9)


def test_the_jackknife_error_is_the_spread_over_fresh_sets() -> None:
    generator = np.random.default_rng(0)
    reference = Reference.of(Moments.of(generator.normal(size=(4000, 8))))
    sets = [generator.normal(size=(1000, 8)) * 1.1 for _ in range(60)]
    found = [frechet(reference, Moments.of(each, reference.mean, 10)) for each in sets]
    spread = np.std([score.value for score in found])
    assert np.mean([score.se for score in found]) == pytest.approx(spread, rel=0.3)


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Moments.of(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="shape"):
        Moments.of(np.zeros(5))


def test_copies_are_found_and_fresh_images_are_not() -> None:
    generator = np.random.default_rng(0)
    real, fresh = generator.normal(size=(500, 64)), generator.normal(size=(500, 64))
    mixed = np.concatenate((real[:100] + 1e-3, fresh[:300]))
    rate, own = copy_rate(real, mixed)
    assert rate == pytest.approx(0.25, abs=0.03) and own == pytest.approx(0.01, abs=0.005)
