"""Averages while a run trains: equal to full ones, unmoved by skipped steps, and put in the place of the weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfguide.distributed import RankInfo
from selfguide.spec.averages import AverageSpec
from selfguide.training.ema import Averages
from selfguide.training.loop import advance
from selfguide.training.work import Training
from tests.selfguide.test_loop import BATCH, begun, masters
from tests.selfguide.test_optimisers import alone, trained_with

SPECS = [
    AverageSpec(halflife=500),
    AverageSpec(halflife=200),
    AverageSpec(width=0.05),
    AverageSpec(width=0.1),
    AverageSpec(rate=0.01),
]


def averaging(root: Path, broken: tuple[int, ...] = ()) -> Training:
    """A run with five averages, of every kind."""
    job = begun(root, 0, broken)
    job.state.averages = Averages(job.state.engine, SPECS, 0.05)
    return job


def full(job: Training) -> list[Tensor]:
    """Every average as one vector."""
    return [job.state.engine.gather(shard).clone() for shard in job.state.averages.shards]


def everything(job: Training) -> list[Tensor]:
    """Masters, averages, live weights and buffers."""
    live = [tensor.clone() for tensor in job.state.engine.module.state_dict().values()]
    return [masters(job).clone(), *full(job), *live]


def test_averages_equal_full_fp32_ones_and_skipped_steps_move_none(
    single: RankInfo, tmp_path: Path
) -> None:
    job = averaging(tmp_path, broken=(2 * BATCH, 4 * BATCH))
    wanted = full(job)
    for step in range(7):
        before = masters(job).clone()
        advance(job)
        images = job.state.images
        if step in (2, 4):
            assert torch.equal(before, masters(job))
        else:
            for spec, average in zip(SPECS, wanted, strict=True):
                average.lerp_(masters(job), torch.tensor(1 - spec.decay(BATCH, images, 0.05)))
        for found, average in zip(full(job), wanted, strict=True):
            assert torch.equal(found, average)


class Kernels(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_moves_all_averages_of_many_ranges_in_one_kernel() -> None:
    """Muon steps each matrix by itself, so bare torch owns a range for each; they lie end to end in one vector."""
    engine, _ = alone(trained_with(optimiser="muon"))
    averages = Averages(engine, SPECS, 0.05)
    assert len(engine.ranges) > 10
    wanted = [engine.gather(engine.masters).clone() for _ in SPECS]
    for master in engine.masters:
        master += torch.randn(master.shape)
    with Kernels() as kernels:
        averages.update(BATCH, BATCH, torch.tensor(True))
    assert kernels.seen["lerp_"] == 1 and kernels.seen.total() < 3 * len(SPECS)
    for spec, shard, average in zip(SPECS, averages.shards, wanted, strict=True):
        average.lerp_(engine.gather(engine.masters), 1 - spec.decay(BATCH, BATCH, 0.05))
        assert torch.equal(engine.gather(shard), average)


@pytest.mark.parametrize("index", [0, 3])
def test_an_average_takes_the_place_of_the_weights_and_leaves_every_bit_as_it_was(
    single: RankInfo, tmp_path: Path, index: int
) -> None:
    job, twin = averaging(tmp_path / "one"), averaging(tmp_path / "two")
    for each in (job, twin):
        for _ in range(3):
            advance(each)
    before, wanted = everything(job), job.state.averages.weights(index)
    wanted = {name: tensor.clone() for name, tensor in wanted.items()}
    with job.state.averaged(index) as network:
        assert not network.training and network is job.state.engine.module
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, wanted[name]), name
    with pytest.raises(KeyboardInterrupt), job.state.averaged(index):
        raise KeyboardInterrupt
    assert job.state.engine.module.training
    after = everything(job)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for each in (job, twin):
        advance(each)
    assert torch.equal(masters(job), masters(twin)), "and the next step is what it would have been"
