"""Moments of features: streamed, merged, resumed or reduced over ranks, they are those of the whole set."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfguide.distributed import RankInfo
from selfguide.evaluation.metrics.moments import Moments


def features(seed: int, count: int = 500, width: int = 6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) @ generator.normal(
        size=(width, width)
    ) + generator.normal(size=width)


def streamed(whole: np.ndarray, *cuts: int, blocks: int = 10, first: int = 0) -> Moments:
    """Of the images `first` and on, in batches that end at `cuts`."""
    made = Moments(whole[:7].mean(0), blocks)
    for low, high in zip((0, *cuts), (*cuts, len(whole)), strict=True):
        made.update(whole[low:high], first + low)
    return made


def same(a: Moments, b: Moments) -> None:
    assert a.counts.tolist() == b.counts.tolist()
    np.testing.assert_allclose(a.sums, b.sums, rtol=1e-12, atol=1e-12 * np.abs(b.sums).max())


@given(
    st.lists(st.integers(0, 4200), max_size=5),
    st.permutations(range(3)),
    st.sampled_from([0.0, 1e4, -1e6]),
)
@settings(deadline=None, max_examples=12)
def test_moments_of_any_batches_ranks_and_order_are_those_of_the_whole(
    cuts: list[int], order: list[int], offset: float
) -> None:
    whole = features(0, 4200) + offset  # more than are added at once
    wanted = streamed(whole)
    same(streamed(whole, *sorted(cuts)), wanted)
    # rank r takes every third batch of 64; 4200 is no multiple of 3 * 64, and one rank of four has nothing
    ranks = [Moments(wanted.shift) for _ in range(4)]
    for number, low in enumerate(range(0, 4200, 64)):
        ranks[order[number % 3]].update(whole[low : low + 64], low)
    summed = ranks[3]
    for rank in ranks[:3]:
        summed.merge(rank)
    same(summed, wanted)
    np.testing.assert_allclose(
        summed.covariance, np.cov(whole - offset, rowvar=False), rtol=1e-8, atol=1e-8
    )
    np.testing.assert_allclose(summed.mean, whole.mean(0), rtol=1e-12)


@given(st.integers(1, 299))
@settings(deadline=None, max_examples=10)
def test_moments_resumed_from_a_file_are_those_of_one_run(cut: int) -> None:
    whole = features(1, 300)
    begun = Moments(whole[:7].mean(0))
    begun.update(whole[:cut], 0)
    file = io.BytesIO()
    np.savez(file, **begun.state_dict())
    file.seek(0)
    resumed = Moments.from_state(dict(np.load(file)))
    for moments in (begun, resumed):
        moments.update(whole[cut:], cut)
    assert np.array_equal(begun.sums, resumed.sums)  # to the bit
    same(resumed, streamed(whole))


def test_moments_in_float32_features_keep_the_digits_that_float32_sums_lose() -> None:
    whole = (features(2, 4000) + 1e4).astype(np.float32)
    exact = np.cov(whole.astype(np.longdouble), rowvar=False)
    found = streamed(whole, 100, 2000).covariance
    np.testing.assert_allclose(found, exact, rtol=1e-11, atol=1e-11)


def test_moments_take_torch_features_of_half_precision() -> None:
    whole = torch.from_numpy(features(2, 50)).half()
    found, wanted = Moments(np.zeros(6)), Moments(np.zeros(6))
    found.update(whole, 0)
    wanted.update(whole.double().numpy(), 0)
    same(found, wanted)


def partial(rank_info: RankInfo) -> list[float]:
    whole = features(5, 100, 3)
    made = Moments(np.zeros(3))
    if rank_info.rank < 2:  # the third rank has no image
        made.update(whole[rank_info.rank * 64 :][:64], rank_info.rank * 64)
    made.all_reduce()
    return made.sums.ravel().tolist()


def test_moments_all_reduced_over_three_ranks_are_those_of_one(
    ranks: Callable[..., list],
) -> None:
    wanted = Moments(np.zeros(3))
    wanted.update(features(5, 100, 3), 0)
    for found in ranks(3, partial):
        np.testing.assert_allclose(found, wanted.sums.ravel(), rtol=1e-12)


@pytest.mark.parametrize("labels", [1000, 10, 7])
def test_blocks_of_images_hold_every_label_alike_whatever_its_order(labels: int) -> None:
    images = np.arange(20_000)
    moments = Moments(np.zeros(1))
    for y in (images % labels, images * labels // len(images)):
        moments.update(y[:, None], 0)
    # each block has 4,000 labels, of mean (labels - 1) / 2, with an error of a few per cent of their spread
    assert moments.counts.tolist() == [4000] * 10
    means = moments.sums[:, 1] / 4000 - (labels - 1) / 2
    assert np.abs(means).max() < 0.08 * labels / np.sqrt(12)


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Moments.of(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="shape"):
        Moments.of(np.zeros(5))
    with pytest.raises(ValueError, match="wide"):
        Moments(np.zeros(5)).update(np.zeros((2, 4)), 0)
    with pytest.raises(ValueError, match="at least 2"):
        Moments.of(np.zeros((1, 5))).gaussian()
    with pytest.raises(ValueError, match="shifts"):
        Moments(np.zeros(5)).merge(Moments(np.ones(5)))
    with pytest.raises(ValueError, match="blocks"):
        Moments(np.zeros(5), 10).merge(Moments(np.zeros(5), 9))
