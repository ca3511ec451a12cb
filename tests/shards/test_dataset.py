"""`shards.Dataset`: samples by index, for PyTorch's loaders."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import shards
from shards.errors import UserError
from shards.read.fields import Fields


def _bright(sample: Fields) -> tuple[np.ndarray, int]:
    return sample.x // 2, sample.y


def test_dataset_indexed_holds_every_sample_by_ordinal(digits: Path) -> None:
    data, everything = shards.Dataset(digits), shards.read_all(digits)
    assert len(data) == 1797 and everything.x.shape == (1797, 1, 8, 8)
    for i in (0, 5, 1796, -1, np.int64(7)):
        one, row = data[i], int(i) % 1797
        np.testing.assert_array_equal(one.x, everything["x"][row])
        assert (one.y, one["key"], one.ordinal) == (everything.y[row], everything.key[row], row)
        assert type(one.y) is int and type(one.key) is str
    with pytest.raises(IndexError):
        data[1797]
    with pytest.raises(AttributeError, match="there are x, y"):
        _ = data[0].z
    with pytest.raises(UserError):
        shards.Dataset(digits.parent / "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_dataset_in_a_loader_gives_batches_with_named_fields(digits: Path, workers: int) -> None:
    data, everything = shards.Dataset(digits), shards.read_all(digits)
    # a reader that is open already does not follow into the workers
    _ = data[0]
    seen = 0
    for batch in DataLoader(data, batch_size=600, num_workers=workers):
        rows = batch.ordinal.numpy()
        assert torch.equal(batch.x, torch.as_tensor(everything.x[rows]))
        assert batch["y"].tolist() == everything.y[rows].tolist()
        assert batch.key == everything.key[rows].tolist()
        seen += len(rows)
    assert seen == 1797


def test_dataset_pickled_reads_and_transforms(digits: Path) -> None:
    data = shards.Dataset(digits, transform=_bright)
    first = data[3]
    again = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(again[3][0], first[0])
    assert again[3][1] == first[1]


def test_dataset_by_a_relative_name_reads_after_the_working_directory_changes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits.parent)
    data = shards.Dataset(digits.name)
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(data))[3].ordinal == data[3].ordinal == 3


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_dataset_in_workers_of_any_kind_shows_each_sample_once(digits: Path, context: str) -> None:
    data = shards.Dataset(digits, transform=_bright)
    _ = data[-1]
    loader = DataLoader(
        Subset(data, [-1, *range(1796)]),
        batch_size=600,
        num_workers=2,
        multiprocessing_context=context,
    )
    labels = torch.cat([y for _, y in loader])
    assert labels.roll(-1).tolist() == shards.read_all(digits)["y"].tolist()


def test_batches_of_a_stream_have_named_fields(digits: Path) -> None:
    with shards.open(
        digits, global_batch=8, micro_batch=8, rank=0, world=1, seed=0, mode="global"
    ) as stream:
        batch = next(stream)
    assert batch.x is batch["x"] and batch.position.tolist() == [*range(8)]
    with shards.scan(digits, micro_batch=8, rank=0, world=1) as scan:
        assert next(scan).mask.all()
