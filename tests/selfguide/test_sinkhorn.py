"""Distributed Sinkhorn: exact for unequal and empty shards, n all-reduces, the right marginals."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from selfguide.distributed import Place
from selfguide.sinkhorn import sinkhorn

SIZES = (3, 0, 22, 15)


def scores(dtype: torch.dtype, count: int = sum(SIZES), groups: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(
        torch.randn(count, 8, generator=generator, dtype=torch.float64), dim=1
    )
    prototypes = torch.nn.functional.normalize(
        torch.randn(groups, 8, generator=generator, dtype=torch.float64), dim=1
    )
    return (z @ prototypes.T).to(dtype)


def part(place: Place, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[list, int]:
    calls: list[Any] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(tensor.shape))
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted  # counts the real collective, replaces nothing
    mine = scores(dtype).split(sizes)[place.rank]
    return sinkhorn(mine, iterations=3).tolist(), len(calls)


@pytest.mark.parametrize(("world", "sizes"), [(2, (18, 22)), (4, SIZES)])
def test_shards_of_any_size_give_the_codes_of_one_process(
    ranks: Any, world: int, sizes: tuple[int, ...]
) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        answers = ranks(world, part, sizes, dtype)
        together = torch.tensor([row for rows, _ in answers for row in rows], dtype=dtype)
        torch.testing.assert_close(
            together, sinkhorn(scores(dtype), group="local"), atol=tolerance, rtol=0
        )
        assert all(calls == 3 for _, calls in answers)


def test_many_iterations_make_the_plan_doubly_stochastic() -> None:
    codes = sinkhorn(scores(torch.float64), iterations=100)
    torch.testing.assert_close(codes.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(
        codes.sum(0), torch.full((12,), 40 / 12, dtype=torch.float64), atol=1e-5, rtol=0
    )


@given(st.floats(-3, 1), st.integers(1, 5))
def test_a_shift_of_all_scores_changes_nothing(shift: float, iterations: int) -> None:
    base = scores(torch.float64)
    torch.testing.assert_close(
        sinkhorn(base + shift, iterations=iterations), sinkhorn(base, iterations=iterations)
    )


def test_half_precision_is_widened_before_the_exponential() -> None:
    codes = sinkhorn(scores(torch.float16))
    assert codes.dtype == torch.float32 and torch.isfinite(codes).all()


def test_a_dead_prototype_gives_no_nan() -> None:
    dead = scores(torch.float32)
    dead[:, 3] = -200.0
    codes = sinkhorn(dead)
    assert torch.isfinite(codes).all() and codes[:, 3].max() == 0
