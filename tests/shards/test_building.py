"""What a shard's bytes are checked for while they are built."""

from __future__ import annotations

import numpy as np
import pytest

from shards.format.moments import Moments
from shards.write.building import _finite


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", "g"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(dtype: str, value: float) -> None:
    x = np.random.default_rng(0).standard_normal((8, 3, 4, 5)).astype(dtype)
    largest = np.finfo(x.dtype).max
    for whole in (
        x,
        x[:, ::2],
        np.zeros_like(x),
        np.full_like(x, largest),
        np.full_like(x, -largest),
    ):
        assert _finite(whole)
    for at in ((0, 0, 0, 0), (7, 2, 3, 4), (3, 1, 2, 2)):
        spoilt = x.copy()
        spoilt[at] = value
        assert not _finite(spoilt)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "u1"])
@pytest.mark.parametrize("shape", [(300, 3, 32, 32), (7, 2, 1, 1), (2, 3, 200, 300)])
def test_moments_in_pieces_are_those_of_the_whole(dtype: str, shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(1).standard_normal(shape) * 20 + 100).astype(dtype)
    found, wide = Moments.of(x), x.astype(np.float64)
    assert found.count == wide.size // shape[1]
    np.testing.assert_allclose(found.mean, wide.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.std, wide.std(axis=(0, 2, 3)), rtol=1e-12)
    assert (found.minimum, found.maximum) == (wide.min(), wide.max())
