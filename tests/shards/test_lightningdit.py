"""LightningDiT's extracted latents: as its script saves them, in several files, and what can be wrong with them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import shards
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.lightningdit import lightningdit
from shards.verify import verify
from tests.shards.data import names
from tools.shards import __main__ as command

C, H, W = 4, 3, 2
MEAN, STD = np.array([1.0, -2.0, 0.5, 0.0]), np.array([2.0, 1.0, 4.0, 0.5])


def tensors(count: int, seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {
        n: rng.standard_normal((count, C, H, W)).astype(dtype) for n in ("latents", "latents_flip")
    }
    return {**made, "labels": rng.integers(0, 7, count)}


def extraction(root: Path, **changes: dict[str, Any]) -> Path:
    """Two ranks' files and the statistics; `changes` of the second file's tensors, None leaves one out."""
    root.mkdir()
    second = {n: t for n, t in (tensors(301, 1) | changes).items() if t is not None}
    save_file(tensors(400, 0), root / "latents_rank00_shard000.safetensors")
    save_file(second, root / "latents_rank01_shard000.safetensors")
    torch.save(
        {n: torch.tensor(v).view(1, C, 1, 1) for n, v in (("mean", MEAN), ("std", STD))},
        root / "latents_stats.pt",
    )
    return root


def make(root: Path, out: Path, *more: str) -> manifests.Manifest:
    words = ["make", "lightningdit", str(root), "--out", str(out), "--shard-mb", "0.05", *more]
    assert command.main(words) == 0
    return manifests.load(out)


def test_every_row_of_every_file_is_a_sample_with_its_mirror_image(tmp_path: Path) -> None:
    root = extraction(tmp_path / "in")
    manifest = make(root, tmp_path / "out")
    found, given = shards.read_all(tmp_path / "out"), {}
    for file in root.glob("*.safetensors"):
        held = load_file(file)
        for row in range(len(held["labels"])):
            given[f"{file.stem}:{row:03d}"] = (
                np.stack([held["latents"][row], held["latents_flip"][row]]),
                held["labels"][row],
            )
    assert sorted(found["key"].tolist()) == sorted(given) and len(given) == 701
    assert found["x"].dtype == np.float32 and manifest.shape == (2, C, H, W)
    for key, x, y in zip(found["key"].tolist(), found["x"], found["y"], strict=True):
        assert np.array_equal(x, given[key][0]) and y == given[key][1]
    assert len(manifest.shards) > 1 and verify(tmp_path / "out").problems == ()


def test_a_model_sees_them_by_their_statistics(tmp_path: Path) -> None:
    root = extraction(tmp_path / "in")
    weights = tmp_path / "vae.pt"
    weights.write_bytes(b"weights")
    header = Header.of(make(root, tmp_path / "out", "--weights", str(weights)).header)
    assert (header.kind, header.encoder, header.flips, header.content) == (
        "latent",
        "va_vae",
        True,
        "sample",
    )
    assert header.encoder_sha256 == manifests.sha256_of(b"weights")
    np.testing.assert_allclose(header.shift, MEAN)
    np.testing.assert_allclose(header.scale, 1 / STD)
    other = tmp_path / "other.pt"
    torch.save({"mean": torch.zeros(C), "std": torch.full((C,), 4.0)}, other)
    told = make(root, tmp_path / "other", "--statistics", str(other))
    assert Header.of(told.header).scale == (0.25,) * C and told.header["encoder_sha256"] is None


def test_a_pickled_listing_reads_the_same_bytes_and_carries_no_latents(tmp_path: Path) -> None:
    made = lightningdit(str(extraction(tmp_path / "in")))
    rows = [made.store.read(row) for row in (0, 399, 400, 700)]
    data = pickle.dumps(made)
    assert len(data) < 50_000
    again = pickle.loads(data)
    assert [again.store.read(row) for row in (0, 399, 400, 700)] == rows


def test_equal_latents_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    first = tensors(400, 0)
    root = extraction(tmp_path / "in", **{n: t[:5] for n, t in first.items()})
    assert make(root, tmp_path / "all").count == 405
    kept = make(root, tmp_path / "once", "--dedupe")
    assert kept.count == 400 and kept.source["duplicates"] == 5
    keys = shards.read_all(tmp_path / "once")["key"].tolist()
    assert {key.partition(":")[0] for key in keys} == {"latents_rank00_shard000"}


def test_latents_may_be_stored_as_float16(tmp_path: Path) -> None:
    second = tensors(301, 1)
    second["latents"][7, 0, 0, 0] = 1e6  # beyond what float16 holds
    root = extraction(tmp_path / "in", **second)
    with pytest.raises(UserError, match="1 of 701 inputs cannot be used"):
        make(root, tmp_path / "out", "--dtype", "float16")
    manifest = make(root, tmp_path / "out", "--dtype", "float16", "--max-skipped", "1")
    assert manifest.count == 700
    found = shards.read_all(tmp_path / "out")
    assert found["x"].dtype == np.float16
    assert "latents_rank01_shard000:007" not in found["key"].tolist()
    row = found["key"].tolist().index("latents_rank01_shard000:008")
    assert np.array_equal(found["x"][row, 1], second["latents_flip"][8].astype(np.float16))


GOOD = tensors(301, 1)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"latents_flip": None}, (), "lacks latents_flip: it holds labels, latents"),
        ({"labels": None}, (), "lacks labels"),
        ({"labels": GOOD["labels"][:300]}, (), "holds 301 latents and 300 labels"),
        ({"labels": GOOD["labels"] - 1}, (), r"label -1 of sample 'latents_rank01_shard000:\d+' is below 0"),
        ({}, ("--classes", "5"), "is out of range .* with classes=5"),
        ({"labels": GOOD["labels"].astype(np.float32)}, (), r"holds labels \(301,\) float32"),
        ({"latents_flip": GOOD["latents"][..., :1]}, (), "both must be"),
        ({"latents": GOOD["latents"][:, 0], "latents_flip": GOOD["latents"][:, 0]}, (), "both must be"),
        ({n: GOOD[n][:, :2] for n in ("latents", "latents_flip")}, (), "they are not of one extraction"),
        ({n: GOOD[n].astype(np.float16) for n in ("latents", "latents_flip")}, (), "float32 and latents_rank01"),
        ({"latents": GOOD["latents"].astype(np.int32)}, (), "holds latents I32 and F32"),
        ({}, ("--statistics", "none.pt"), "file of statistics none.pt does not exist"),
        ({}, ("--weights", "none.pt"), "file of weights none.pt does not exist"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], more: tuple[str, ...], message: str
) -> None:
    root = extraction(tmp_path / "in", **changes)
    with pytest.raises(UserError, match=message):
        make(root, tmp_path / "out", *more)
    assert names(tmp_path) == ["in"]


def test_files_and_statistics_that_are_none_are_named(tmp_path: Path) -> None:
    root = extraction(tmp_path / "in")
    stats, file = root / "latents_stats.pt", root / "latents_rank00_shard000.safetensors"
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, stats)
    with pytest.raises(UserError, match="scale and shift are for 3 channels; a model sees 4"):
        make(root, tmp_path / "out")
    for wrong in ({"mean": torch.zeros(4)}, {"mean": torch.zeros(4), "std": torch.zeros(4)}):
        torch.save(wrong, stats)
        with pytest.raises(UserError, match=r"latents_stats\.pt holds"):
            make(root, tmp_path / "out")
    stats.unlink()
    with pytest.raises(UserError, match=r"latents_stats\.pt does not exist"):
        make(root, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"shard000\.safetensors cannot be read"):
        make(root, tmp_path / "out")
    for path in root.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors files"):
        make(root, tmp_path / "out")
    with pytest.raises(UserError, match="none does not exist"):
        make(tmp_path / "none", tmp_path / "out")
    assert names(tmp_path) == ["in"]
