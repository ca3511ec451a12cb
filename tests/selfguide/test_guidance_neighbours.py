"""Neighbours are exact and never the image itself, whatever the chunk and however many copies there are."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from selfguide.discovery.neighbours import neighbours
from shards.errors import UserError


def drawn(count: int, width: int = 12, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 64, 299, 300, 4096])
def test_scikit_learn_finds_the_same_on_both_sides_of_the_chunk_size(chunk: int) -> None:
    x = drawn(300) * np.linspace(0.1, 9, 300, dtype=np.float32)[:, None]  # cosine sees no length
    oracle = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(x)
    expected = oracle.kneighbors(return_distance=False)  # of the fitted rows: without themselves
    np.testing.assert_array_equal(neighbours(x, 7, chunk=chunk), expected)


@settings(max_examples=40)
@given(
    count=st.integers(3, 60),
    distinct=st.integers(2, 8),
    chunk=st.integers(1, 70),
    data=st.data(),
)
def test_copies_are_neighbours_but_the_image_itself_is_not(
    count: int, distinct: int, chunk: int, data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, count - 1))
    x = drawn(distinct)[np.arange(count) % distinct]  # up to 30 copies of each
    found = neighbours(x, wanted, chunk=chunk)
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    similar = unit @ unit.T
    for image, near in enumerate(found):
        assert image not in near
        assert len(set(near.tolist())) == wanted
        others = np.sort(np.delete(similar[image], image))[::-1][:wanted]
        np.testing.assert_allclose(similar[image][near], others, atol=1e-6)


def test_features_may_be_mapped_and_narrow(tmp_path: Path) -> None:
    x = drawn(200).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(neighbours(mapped, 5, chunk=33), neighbours(x.astype("f4"), 5))


def test_a_row_of_zeros_has_neighbours_too() -> None:
    x = drawn(50)
    x[7] = 0
    found = neighbours(x, 4, chunk=16)
    assert 7 not in found[7] and ((found >= 0) & (found < 50)).all()


@pytest.mark.parametrize("count", [0, 20, 21])
def test_a_number_of_neighbours_that_there_cannot_be(count: int) -> None:
    with pytest.raises(UserError, match=f"neighbours={count} of 20 images"):
        neighbours(drawn(20), count)


def test_features_that_are_not_finite_or_all_the_same() -> None:
    broken = drawn(20)
    broken[13, 2] = np.nan
    with pytest.raises(UserError, match="sample 13"):
        neighbours(broken, 3)
    with pytest.raises(UserError, match="the same"):
        neighbours(np.ones((20, 4), dtype=np.float32), 3)
