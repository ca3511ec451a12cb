"""Annotations of pictures for the same pictures at another resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shards
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write.writer import write
from tools.annotate.__main__ import main

HEADER = Header(kind="image", shift=127.5, scale=1 / 127.5)


def data(root: Path, edge: int, numbers: list[int], seed: int) -> Path:
    """Pictures whose keys are these numbers."""
    x = np.zeros((len(numbers), 3, edge, edge), dtype=np.uint8)
    keys = [f"picture-{number}" for number in numbers]
    write(str(root), ArraySource.of("pictures", x, keys=keys), header=HEADER, seed=seed)
    return root


def test_annotation_adopted_by_key_is_of_the_same_pictures(tmp_path: Path) -> None:
    large = data(tmp_path / "large", 8, [*range(30)], seed=0)
    small = data(tmp_path / "small", 4, [29, 3, 7, 12], seed=5)
    numbers = np.array([int(key.split("-")[1]) for key in shards.read_all(large).key])
    found = tmp_path / "found"
    sidecar.write(found, (numbers % 5).astype(np.int64), manifest=manifests.load(large).hash, kind="id", groups=5,
                  provenance={"saw_labels": False}, distance=numbers.astype(np.float32))  # fmt: skip
    words = ["adopt", str(small), "--annotation", str(found), "--out", str(tmp_path / "out")]
    assert main([*words, "--by-key", str(large)]) == 0
    made = sidecar.read(tmp_path / "out", manifest=manifests.load(small).hash)
    own = np.array([int(key.split("-")[1]) for key in shards.read_all(small).key])
    assert made.rows().tolist() == (own % 5).tolist()
    assert made.column("distance").tolist() == own.tolist()


def test_annotation_of_other_pictures_is_refused(tmp_path: Path) -> None:
    large = data(tmp_path / "large", 8, [*range(6)], seed=0)
    other = data(tmp_path / "other", 4, [1, 99], seed=0)
    found = tmp_path / "found"
    sidecar.write(found, np.zeros(6, dtype=np.int64), manifest=manifests.load(large).hash, kind="id", groups=1,
                  provenance={"saw_labels": False})  # fmt: skip
    words = ["adopt", str(other), "--annotation", str(found), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="picture-99"):
        main([*words, "--by-key", str(large)])
    with pytest.raises(UserError, match="give those that were annotated"):
        main([*words, "--by-key", str(other)])
    with pytest.raises(UserError, match="--by-key"):
        main(words)
    assert not (tmp_path / "out").exists()
