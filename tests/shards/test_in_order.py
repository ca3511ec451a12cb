"""A scan gives every sample once, whatever its batches and ranks, and a batch belongs to who was given it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shards
from shards.errors import DamagedError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write import writer

COUNT = 600  # two whole blocks and a part
SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = np.random.default_rng(0).standard_normal((COUNT, *SHAPE)).astype(np.float32)
    source = ArraySource.of("latents", x, labels=np.arange(COUNT) % 7, classes=7)
    root = tmp_path_factory.mktemp("shards")
    writer.write(root, source, header=Header(kind="latent", encoder="test"))
    return root


@pytest.mark.parametrize("micro_batch", [1, 100, 256, 600, 1000])
@pytest.mark.parametrize("world", [1, 3])
def test_scan_by_any_batch_and_world_equals_all_samples(
    root: Path, micro_batch: int, world: int
) -> None:
    wanted = shards.read_all(root)
    seen = []
    for rank in range(world):
        with shards.scan(root, micro_batch=micro_batch, rank=rank, world=world) as scan:
            for batch in scan:
                rows = batch["mask"]
                for name in ("x", "y", "key"):
                    assert np.array_equal(batch[name], wanted[name][batch["ordinal"]]), name
                seen += batch["ordinal"][rows].tolist()
    assert sorted(seen) == [*range(COUNT)]


def test_batches_of_a_scan_can_be_changed_without_changing_others(root: Path) -> None:
    before = shards.read_all(root)["x"].copy()
    with shards.scan(root, micro_batch=128, rank=0, world=1) as scan:
        kept = []
        for batch in scan:
            kept.append(batch["x"][batch["mask"]].copy())
            batch["x"][:] = np.nan
    assert np.array_equal(np.concatenate(kept), before)
    assert np.array_equal(shards.read_all(root)["x"], before)


def test_scan_over_a_changed_byte_names_it_and_gives_nothing_of_its_block(
    root: Path, tmp_path: Path
) -> None:
    manifest = manifests.load(root)
    copy = tmp_path / "copy"
    shards_folder = copy / "shards"
    shards_folder.mkdir(parents=True)
    for path in root.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    tar = copy / manifest.shards[0].name
    data = bytearray(tar.read_bytes())
    data[int(manifest.blocks["offset"][1, 0]) + 5] ^= 1
    tar.write_bytes(data)
    with shards.scan(copy, micro_batch=256, rank=0, world=1) as scan:
        assert next(scan)["ordinal"][0] == 0
        with pytest.raises(DamagedError, match="block 1"):
            next(scan)
