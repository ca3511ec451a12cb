"""A rank that fails takes all down, with its own words, while others wait for it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist

from shards.errors import UserError
from tools.ranks import RankFailed, run_ranks


def _raises(place: Any) -> None:
    if place.rank == 1:
        raise ValueError("the words of rank 1")
    time.sleep(600)


def _dies(place: Any) -> None:
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_raises, "rank 1 of 2 failed:(.|\n)*_raises(.|\n)*the words of rank 1"),
        (_dies, "rank 1 of 2 died .* -9"),
    ],
)
def test_a_failing_rank_ends_all_without_a_timeout(function: Any, said: str) -> None:
    with pytest.raises(RankFailed, match=said):
        run_ranks(2, function, timeout=None)


def _waits_for_a_mistaken_rank(place: Any) -> None:
    if place.rank == 1:
        raise UserError("beta=0: take more")
    dist.barrier()


def test_a_users_mistake_is_the_users_in_a_rank_too() -> None:
    with pytest.raises(UserError, match=r"^beta=0: take more$"):
        run_ranks(2, _waits_for_a_mistaken_rank, timeout=None)
