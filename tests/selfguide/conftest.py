"""What several tests of training need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from selfguide.distributed import RankInfo


@pytest.fixture
def single() -> Iterator[RankInfo]:
    """This process as the only rank of a group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield RankInfo(0, 0, 1)
    torch.distributed.destroy_process_group()
