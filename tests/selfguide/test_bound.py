"""The search for the upper bound, against the utilisation that C-EDM's published assignments have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfguide.discovery import bound
from selfguide.discovery.bound import search
from shards.errors import UserError

# groups in use of those asked for, in the assignments that C-EDM's authors ship (arXiv 2403.00570)
PUBLISHED = {
    "CIFAR-10": {100: 100, 200: 199, 300: 295, 400: 391, 500: 490, 600: 558, 800: 741, 1000: 918},
    "CIFAR-100": {200: 199, 300: 298, 400: 394, 500: 489, 600: 580, 800: 751, 1000: 909},
    "FFHQ": {200: 197, 300: 297, 400: 392, 500: 488, 600: 578, 800: 756, 1000: 917},
}


@pytest.mark.parametrize(("data", "bound"), [("CIFAR-10", 500), ("CIFAR-100", 600), ("FFHQ", 600)])
def test_the_published_assignments_give_the_published_bounds(data: str, bound: int) -> None:
    table = PUBLISHED[data]
    asked = []

    def used(groups: int) -> int:
        asked.append(groups)
        return round(np.interp(groups, list(table), list(table.values())))  # 700 is in no table

    found = search(used, limit=50_000, alpha=0.96, start=200)
    assert asked == [200, 400, 800, 500, 600, 700]
    assert found.bound == bound and not found.open
    assert [p.groups for p in found.points] == sorted(asked)


@given(
    limit=st.integers(2, 4000),
    capacity=st.integers(1, 4000),
    alpha=st.floats(0.05, 1.0),
    finer=st.integers(0, 7),
    data=st.data(),
)
def test_the_bound_of_features_that_separate_so_many_groups(
    limit: int, capacity: int, alpha: float, finer: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(2, limit))
    asked: list[int] = []

    def used(groups: int) -> int:
        asked.append(groups)
        return min(groups, capacity)

    found = search(used, limit=limit, alpha=alpha, start=start, finer=finer)
    assert len(asked) == len(set(asked)), "a fit was asked for twice"
    assert max(asked) <= limit
    highest = int(np.floor(capacity / alpha + 1e-9))  # min(K, c) / K >= alpha up to K = c / alpha
    if found.bound is None:
        assert start > highest - 1 and asked == [start]
    else:
        assert found.bound <= highest + 1
        larger = [g for g in asked if g > found.bound]
        assert all(min(g, capacity) / g < alpha for g in larger)
        if found.open:
            assert not larger and 2 * found.bound > limit
        else:  # off by no more than one step of the finer grid
            step = -(-max(g for g in asked if g in _doublings(start)) // (2 * (finer + 1)))
            assert min(larger) - found.bound <= step


def _doublings(start: int) -> set[int]:
    return {start << i for i in range(13)}


def test_a_dip_below_alpha_between_two_good_values_does_not_lower_the_bound() -> None:
    table = {10: 10, 20: 20, 40: 30, 25: 20, 30: 30, 35: 33}
    found = search(table.__getitem__, limit=1000, alpha=0.96, start=10)
    assert found.bound == 30


def test_the_first_value_being_too_large_leaves_no_bound() -> None:
    found = search(lambda groups: 3, limit=1000, start=16)
    assert found.bound is None and [p.groups for p in found.points] == [16]


def test_the_search_ends_at_the_number_of_images() -> None:
    found = search(lambda groups: groups, limit=100, start=16)
    assert [p.groups for p in found.points] == [16, 32, 64]
    assert found.bound == 64 and found.open


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.01, float("nan")])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha="):
        search(lambda groups: groups, limit=100, alpha=alpha)


@pytest.mark.parametrize("start", [1, 0, 101])
def test_a_start_that_no_fit_can_have(start: int) -> None:
    with pytest.raises(UserError, match=f"start={start} of 100 images"):
        search(lambda groups: groups, limit=100, start=start)


def test_a_ratio_of_exactly_alpha_is_enough() -> None:
    found = search(
        {8: 8, 16: 12, 32: 20, 24: 18}.__getitem__, limit=64, alpha=0.75, start=8, finer=1
    )
    assert found.bound == 24
    assert search(lambda groups: groups, limit=40, alpha=1.0, start=8).bound == 32


def test_the_lower_bound_is_the_mean_over_k_with_the_deviation_of_a_sample() -> None:
    asked = []

    def used(groups: int) -> int:
        asked.append(groups)
        return {50: 34, 100: 36, 200: 41}[groups]

    found = bound.lower(used, (200, 50, 100), limit=1000)
    assert asked == [50, 100, 200]
    # 37 over three K, whose differences are 3, 1 and 4: (9 + 1 + 16) / 2
    assert found.mean == 37 and found.deviation == pytest.approx(13**0.5)


@pytest.mark.parametrize("over", [(), (50,), (50, 50), (1, 50), (50, 2000)])
def test_a_lower_bound_of_k_that_make_no_mean_is_refused(over: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="over="):
        bound.lower(lambda groups: groups, over, limit=1000)
