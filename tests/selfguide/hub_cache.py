"""A cache of Hugging Face's hub in its real layout, written by files: nothing asks a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from shards import storage

# the smallest of timm
NET = "test_resnet.r160_in1k"


def use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are looked for in this folder's caches alone, where there are none yet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(root / "torch"))
    monkeypatch.setenv("SELFGUIDE_WEIGHTS_DIR", str(root / "weights"))
    monkeypatch.setenv("SELFGUIDE_CACHE", str(root / "remembered"))


def save(file: Path, net: str = NET, seed: int = 0) -> str:
    """Writes random weights of a whole net, as timm publishes it; returns their sha256."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(timm.create_model(net).state_dict(), file)
    return storage.sha256(str(file))


def add(root: Path, net: str = NET, seed: int = 0) -> tuple[Path, str]:
    """Puts random weights into the hub's cache; returns the file's name there and its sha256."""
    repository = root / "hub" / f"models--timm--{net}"
    snapshot = repository / "snapshots" / "0a1b"
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0a1b")
    draft = repository / "draft"
    sha256 = save(draft, net, seed)
    draft.rename(repository / "blobs" / sha256)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{sha256}")
    return snapshot / "model.safetensors", sha256
