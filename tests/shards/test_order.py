"""The order is a permutation in every epoch, reads from any position alike, and never changes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.format.order import Mixture, Order, key, mix, permute, unpermute

MODES = st.sampled_from(["window", "global"])

GOLDEN_KEY = 9812528628958509896
GOLDEN_SOURCE = [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0]
GOLDEN_WITHIN = [4, 2, 0, 0, 3, 5, 1, 1, 6, 9, 2, 11, 7, 8, 3, 10, 4, 15, 13, 12, 5, 17, 14, 16]
GOLDEN = {
    ("window", 1_797, 0): [1014, 91, 1169, 1738, 304, 1072],
    ("window", 1_797, 1_794): [1677, 395, 1010, 831, 407, 391],
    ("window", 1_281_167, 500_000_000): [597594, 1009502, 713392, 654762, 623202, 841936],
    ("window", 1_000_000_000, 6_999_999_997): [
        436761493,
        436761553,
        248234097,
        386836112,
        935791583,
        51685183,
    ],
    ("global", 1_797, 0): [557, 835, 1260, 142, 606, 1749],
    ("global", 1_797, 1_794): [506, 385, 1486, 156, 1391, 1283],
    ("global", 1_281_167, 500_000_000): [988091, 1022232, 1201582, 1236424, 347758, 1224432],
    ("global", 1_000_000_000, 6_999_999_997): [
        443360828,
        394669055,
        315028209,
        561695524,
        947254388,
        586805112,
    ],
}


@given(count=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70))
def test_permute_is_a_bijection_and_unpermute_its_inverse(count: int, seed: int) -> None:
    index = np.arange(count)
    found = permute(index, count, key(seed))
    assert np.array_equal(np.sort(found), index)
    assert np.array_equal(unpermute(found, count, key(seed)), index)


@settings(deadline=None)
@given(
    count=st.integers(1, 2000),
    seed=st.integers(0, 2**64),
    mode=MODES,
    block=st.integers(1, 300),
    window=st.integers(1, 9),
    epoch=st.integers(0, 5),
)
def test_each_epoch_is_a_permutation(
    count: int, seed: int, mode: str, block: int, window: int, epoch: int
) -> None:
    order = Order(count=count, seed=seed, mode=mode, block=block, window=window)
    found = order.ordinals(np.arange(epoch * count, (epoch + 1) * count))
    assert np.array_equal(np.sort(found), np.arange(count))


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 2000),
    mode=MODES,
    start=st.integers(0, 10**12),
    cuts=st.lists(st.integers(0, 300), max_size=3),
)
def test_any_way_of_asking_gives_the_same_order(
    count: int, mode: str, start: int, cuts: list[int]
) -> None:
    order = Order(count=count, seed=7, mode=mode, block=16, window=4)
    positions = np.arange(start, start + 300)
    whole = order.ordinals(positions)
    parts = np.split(positions, sorted(cuts))
    assert np.array_equal(np.concatenate([order.ordinals(p) for p in parts]), whole)
    assert np.array_equal(order.ordinals(positions[::-1].reshape(20, 15)).ravel(), whole[::-1])
    assert order.ordinals(positions[0]).shape == () and order.ordinals(positions[0]) == whole[0]


@settings(deadline=None)
@given(count=st.integers(1, 2000), seed=st.integers(0, 99), window=st.integers(1, 5))
def test_a_window_needs_only_its_blocks(count: int, seed: int, window: int) -> None:
    order = Order(count=count, seed=seed, block=64, window=window)
    blocks = order.ordinals(np.arange(count)) // 64
    finished: set[int] = set()
    start = 0
    while start < count:
        held = list(dict.fromkeys(blocks[start:].tolist()))[:window]
        size = int(np.isin(blocks, held).sum())
        assert set(blocks[start : start + size].tolist()) == set(held)
        assert not finished & set(held)
        finished |= set(held)
        start += size


@settings(deadline=None)
@given(
    count=st.integers(1, 600),
    seed=st.integers(0, 99),
    window=st.integers(1, 5),
    position=st.integers(0, 2000),
)
def test_next_need_is_the_next_window_that_holds_the_block(
    count: int, seed: int, window: int, position: int
) -> None:
    order = Order(count=count, seed=seed, block=16, window=window)
    blocks = -(-count // 16)
    found = order.next_need(np.arange(blocks), position)
    epoch = position // count
    ahead = order.ordinals(np.arange(epoch * count, (epoch + 2) * count)) // 16
    for block in range(blocks):
        uses = epoch * count + np.flatnonzero(ahead == block)
        inside = position < (epoch + 1) * count and found[block] == -np.inf
        if inside:  # its window has begun and has not ended
            assert uses.min() < position + window * 16 and uses[uses < (epoch + 1) * count].size
        else:
            later = uses[uses >= position]
            assert position <= found[block] <= later.min() < found[block] + window * 16
            assert not ((uses >= position) & (uses < found[block])).any()
    assert (found == -np.inf).sum() <= window
    assert np.isin(ahead[position - epoch * count], np.flatnonzero(found == -np.inf))


def test_all_of_a_global_order_is_needed_all_the_time() -> None:
    order = Order(count=1000, seed=0, mode="global", block=16)
    assert (order.next_need(np.arange(5), 123) == -np.inf).all()


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 50), min_size=1, max_size=6),
    seed=st.integers(0, 2**63),
    block=st.integers(0, 10**9),
)
def test_each_block_of_a_mixture_has_exact_quotas_and_uses_each_position_once(
    weights: list[float], seed: int, block: int
) -> None:
    mixture = Mixture(weights=tuple(weights), seed=seed, block=5000)
    assert sum(mixture.quotas) == 5000
    exact = np.array(weights) / sum(weights) * 5000
    assert (np.abs(np.array(mixture.quotas) - exact) < 1).all()
    source, within = mixture.at(np.arange(block * 5000, (block + 1) * 5000))
    for i, quota in enumerate(mixture.quotas):
        assert np.sort(within[source == i]).tolist() == [*range(block * quota, (block + 1) * quota)]


def test_a_mixture_is_the_same_however_it_is_asked_and_for_ever() -> None:
    mixture = Mixture(weights=(3.0, 1.0), seed=20, block=8)
    source, within = mixture.at(np.arange(24))
    for p in (0, 7, 8, 23):
        assert mixture.at(p) == (source[p], within[p])
    assert mixture.quotas == (6, 2)
    assert source.tolist() == GOLDEN_SOURCE and within.tolist() == GOLDEN_WITHIN
    far = mixture.at(10**15 + np.arange(8))
    assert np.bincount(far[0]).tolist() == [6, 2]


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_bad_weights_are_named(weights: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="weights="):
        Mixture(weights=weights, seed=0)
    with pytest.raises(UserError, match="gets nothing"):
        Mixture(weights=(1.0, 1e-9), seed=0)


def test_golden_values() -> None:
    """Runs that resume next year must see this very order."""
    assert key(1, 2, 3).tolist() == [GOLDEN_KEY]
    for (mode, count, start), expected in GOLDEN.items():
        order = Order(count=count, seed=20, mode=mode)
        assert order.ordinals(np.arange(start, start + 6)).tolist() == expected


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(
            Order(count=1000, seed=seed, mode=mode).ordinals(np.arange(e * 1000, e * 1000 + 1000))
        )
        for seed in (0, 1, -1)
        for mode in ("window", "global")
        for e in range(3)
    ]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("count", [3, 4, 5, 12])
def test_every_index_goes_everywhere_equally_often(count: int) -> None:
    keys = 20_000
    found = permute(np.arange(count), count, mix(np.arange(keys, dtype=np.uint64))[:, None])
    tally = np.stack([np.bincount(found[:, i].astype(int), minlength=count) for i in range(count)])
    # of random permutation matrices this is chi-square with (n - 1)^2 degrees of freedom
    chi2 = np.square(tally - keys / count).sum() / (keys / count) * (count - 1) / count
    freedom = (count - 1) ** 2
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


def test_neighbours_are_strangers() -> None:
    count = 50_000
    found = permute(np.arange(count), count, key(4)).astype(np.float64)
    for lag in (1, 2, 3, 223, 224, 225):  # the halves have 224 values
        assert abs(np.corrcoef(found[lag:], found[:-lag])[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize("mode", ["window", "global"])
def test_a_billion_samples_cost_what_a_thousand_cost(mode: str) -> None:
    def seconds(count: int) -> float:
        order = Order(count=count, seed=1, mode=mode)
        positions = np.arange(9 * count // 10, 9 * count // 10 + 8192)
        order.ordinals(positions)
        started = time.thread_time()
        assert order.ordinals(positions).max() < count
        return time.thread_time() - started

    small, large = (min(seconds(count) for _ in range(5)) for count in (100_000, 10**9))
    assert large < 5 * small


def test_bad_orders_are_named() -> None:
    with pytest.raises(UserError, match="mode='shuffle'"):
        Order(count=5, seed=0, mode="shuffle")
    with pytest.raises(UserError, match="count=0"):
        Order(count=0, seed=0)
    with pytest.raises(ValueError, match="positions start at 0"):
        Order(count=5, seed=0).ordinals([-1])
