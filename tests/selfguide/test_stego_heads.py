"""STEGO's published heads are read from a Lightning checkpoint's layout, and nothing of it is run."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.discovery.stego_heads import read_heads
from selfguide.weights import read_weights
from shards.errors import UserError

WIDTH, GROUPS = 70, 28  # of a code; 27 classes and one cluster more


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()


class Code(nn.Module):
    """The authors' `DinoFeaturizer`, but for its backbone."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.cluster1 = nn.Sequential(nn.Conv2d(features, WIDTH, (1, 1)))
        self.cluster2 = nn.Sequential(
            nn.Conv2d(features, features, (1, 1)), nn.ReLU(), nn.Conv2d(features, WIDTH, (1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cluster1(x) + self.cluster2(x)


@pytest.fixture(scope="module")
def code() -> Code:
    torch.manual_seed(1)
    return Code(64)


@pytest.fixture(scope="module")
def clusters() -> Tensor:
    return torch.randn(GROUPS, WIDTH, generator=torch.Generator().manual_seed(2))


def foreign(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of a program that is here while a file is written, and gone when it is read."""
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        path = ".".join(parts[:number])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    made = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


def written(file: Path, vit: nn.Module, code: Code, clusters: Tensor) -> Path:
    """A checkpoint in the layout of pytorch-lightning 1.x, with an omegaconf-like configuration."""
    with pytest.MonkeyPatch.context() as patched:
        config = foreign("somewhere.dictconfig", "DictConfig", patched)()
        meta = foreign("somewhere.base", "ContainerMetadata", patched)()
        meta.__dict__.update(ref_type=dict, resolver_cache=defaultdict(dict), flags={"a": True})
        config.__dict__.update(_content={"dim": WIDTH}, _metadata=meta, _parent=None)
        callback = foreign("lightning_like.callbacks", "ModelCheckpoint", patched)
        state = OrderedDict()
        for name, tensor in vit.state_dict().items():
            state[f"net.model.{name}"] = tensor
        for name, tensor in code.state_dict().items():
            state[f"net.{name}"] = tensor
        state["train_cluster_probe.clusters"] = torch.zeros(27, WIDTH)
        state["cluster_probe.clusters"] = clusters
        state["linear_probe.weight"] = torch.zeros(27, WIDTH, 1, 1)
        state["linear_probe.bias"] = torch.zeros(27)
        state["decoder.weight"] = torch.zeros(64, WIDTH, 1, 1)
        torch.save(
            {
                "epoch": 5,
                "global_step": 7000,
                "pytorch-lightning_version": "1.5.10",
                "state_dict": state,
                "callbacks": {callback: {"best_model_score": torch.tensor(1.0)}},
                "optimizer_states": [{"state": {0: {"step": 1}}, "param_groups": []}],
                "lr_schedulers": [],
                "hparams_name": "kwargs",
                "hyper_parameters": {"n_classes": 27, "cfg": config},
            },
            file,
        )
    return file


def test_published_heads_give_the_authors_codes_and_clusters(
    tmp_path: Path, vit: nn.Module, code: Code, clusters: Tensor
) -> None:
    file = written(tmp_path / "cocostuff27.ckpt", vit, code, clusters)
    made = read_heads(file, vit, "test_vit")
    assert "somewhere" not in sys.modules and "lightning_like" not in sys.modules
    x = torch.randn(2, 64, 5, 7, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(made.codes(x), code(x))
        # their evaluation: both mirror images, brought to the image's size, the nearest unit centroid
        both = (code(x) + code(x.flip(3)).flip(3)) / 2
        wide = F.interpolate(both, (20, 28), mode="bilinear", align_corners=False)
        found = torch.einsum(
            "bchw,nc->bnhw", F.normalize(wide, dim=1), F.normalize(clusters, dim=1)
        )
    masks = made.masks(x, (20, 28), x.flip(3))
    assert (masks == found.argmax(1)).float().mean() > 0.999
    assert len(masks.unique()) > 5


def test_a_strangers_class_is_passed_over_only_where_that_is_asked_for(
    tmp_path: Path, vit: nn.Module, code: Code, clusters: Tensor
) -> None:
    file = written(tmp_path / "s.ckpt", vit, code, clusters)
    with pytest.raises(UserError, match="cannot be read as tensors only"):
        read_weights(file, str(file))
    assert "cluster_probe.clusters" in read_weights(file, str(file), strangers=True)


class Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("touch ran",)


def test_what_would_run_a_command_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": Runs()}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="cannot be read as tensors only"):
        read_weights(tmp_path / "bad.ckpt", "bad", strangers=True)
    assert not (tmp_path / "ran").exists()


def test_other_nets_and_other_heads_are_refused(
    tmp_path: Path, vit: nn.Module, code: Code, clusters: Tensor
) -> None:
    file = written(tmp_path / "s.ckpt", vit, code, clusters)
    other = timm.create_model("test_vit", num_classes=0)
    with pytest.raises(UserError, match=r"another net than test_vit: .* differs"):
        read_heads(file, other, "test_vit")
    with pytest.raises(UserError, match="no such file"):
        read_heads(tmp_path / "gone.ckpt", vit, "test_vit")
    torch.save({"state_dict": {"net.cluster1.0.weight": torch.ones(70, 64, 1, 1)}}, file)
    with pytest.raises(UserError, match=r"lacks net.cluster1.0.bias"):
        read_heads(file, vit, "test_vit")
