"""Frozen ViTs give what timm's own forward computes, and nobody's weights are taken unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from selfguide.discovery.nets import self_supervised
from selfguide.discovery.vit import FrozenViT, load_vit
from selfguide.models.backbone import pool
from selfguide.spec.weight_files import FOLDER
from shards import storage
from shards.errors import UserError

NAME = "test_vit"  # timm's own for tests: patches of 16, width 64, trained with labels


@pytest.fixture(scope="module")
def vit() -> FrozenViT:
    return load_vit(NAME, "random:0")


def images(count: int = 2, height: int = 48, width: int = 64, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator).byte()


def plain_input(vit: FrozenViT, x: Tensor) -> Tensor:
    """Normalised and padded by a plain loop, and with the net's own mean and std."""
    config = resolve_model_data_config(vit.net)
    height, width = -(-x.shape[2] // 16) * 16, -(-x.shape[3] // 16) * 16
    out = torch.zeros(len(x), 3, height, width)
    for c in range(3):
        level = x[:, c if x.shape[1] == 3 else 0].float() / 255
        out[:, c, : x.shape[2], : x.shape[3]] = (level - config["mean"][c]) / config["std"][c]
    return out


def hooked(vit: FrozenViT, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys by qkv's plain output, and tokens behind the last norm."""
    seen: dict[str, Tensor] = {}
    qkv = vit.net.blocks[-1].attn.qkv
    hooks = [
        qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o)),
        vit.net.norm.register_forward_hook(lambda m, i, o: seen.update(tokens=o)),
    ]
    with torch.no_grad():
        vit.net.forward_features(x)
    for hook in hooks:
        hook.remove()
    _, keys, _ = seen["qkv"].chunk(3, dim=-1)
    return keys, seen["tokens"]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (160, 160), (33, 50), (16, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_keys_and_patches_are_those_of_a_plain_forward(
    vit: FrozenViT, height: int, width: int, channels: int
) -> None:
    x = images(2, height, width, channels)
    keys, tokens = hooked(vit, plain_input(vit, x))
    h, w = -(-height // 16), -(-width // 16)
    found = vit.keys(x)
    assert found.shape == (2, vit.width, h, w) == vit.patches(x).shape
    for row in range(h):
        for column in range(w):
            token = 1 + row * w + column
            torch.testing.assert_close(found[:, :, row, column], keys[:, token])
            torch.testing.assert_close(vit.patches(x)[:, :, row, column], tokens[:, token])


def test_pooled_reads_tokens_of_timms_own_transform(vit: FrozenViT) -> None:
    """Against PIL's bicubic filter, which rounds otherwise here and there."""
    smooth = torch.nn.functional.interpolate(
        images(3, 12, 16).float(), (96, 128), mode="bilinear"
    ).byte()
    transform = create_transform(**resolve_model_data_config(vit.net), is_training=False)
    x = torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in smooth])
    with torch.no_grad():
        tokens = vit.net.forward_features(x)
    for pooling, expected in {
        "cls": tokens[:, 0],
        "mean": tokens[:, 1:].mean(1),
        "flat": tokens[:, 1:].flatten(1),
    }.items():
        found = vit.pooled(smooth, pooling)
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_attention_pooling_is_a_plain_softmax_over_patches() -> None:
    tokens = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    for extras, cls in ((0, False), (1, True), (2, False), (2, True)):
        found = pool(tokens, "attention", extras, cls=cls)
        for image, row in zip(tokens.numpy(), found.numpy(), strict=True):
            patches = image[extras:]
            query = image[0] if cls else patches.mean(0)
            weights = np.exp([patch @ query / np.sqrt(8) for patch in patches])
            expected = sum(w * p for w, p in zip(weights / weights.sum(), patches, strict=True))
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    equal = torch.ones(2, 5, 4)  # patches that are all alike pool to themselves
    torch.testing.assert_close(pool(equal, "attention", 1), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("pooling", "extras", "cls"), [("cls", 0, True), ("cls", 1, False), ("men", 1, True)]
)
def test_impossible_poolings_are_refused(pooling: str, extras: int, cls: bool) -> None:
    with pytest.raises(UserError, match="pooling"):
        pool(torch.zeros(1, 3, 2), pooling, extras, cls=cls)


def test_a_net_without_cls_is_refused_where_it_is_asked_for() -> None:
    register = load_vit("test_vit2", "random:1")  # one extra token, and it is a register
    assert register.net.num_prefix_tokens == 1 and register.net.cls_token is None
    with pytest.raises(UserError, match=r"test_vit2.* has no \[CLS\]"):
        register.pooled(images(), "cls")
    assert register.pooled(images(), "mean").shape == (2, register.width)
    assert register.keys(images()).shape == (2, register.width, 3, 4)


def test_the_seed_of_random_weights_is_all_there_is_to_them(vit: FrozenViT) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    same, other = load_vit(NAME, "random:0"), load_vit(NAME, "random:1")
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(same.keys(images()), vit.keys(images()))
    assert not torch.allclose(other.keys(images()), vit.keys(images()))
    assert vit.provenance == {"net": "test_vit.r160_in1k", "random_seed": 0, "saw_labels": False}
    assert not any(p.requires_grad for p in vit.net.parameters()) and not vit.net.training


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """As timm publishes weights: with the classifier."""
    torch.manual_seed(11)
    net = timm.create_model(NAME, pretrained=False)
    file = tmp_path / "some.safetensors"
    save_file(net.state_dict(), file)
    return file


def test_weights_by_path_by_folder_and_as_a_torch_file(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = load_vit(NAME, saved)
    assert given.sha256 == storage.sha256(saved) == given.provenance["sha256"]
    torch.manual_seed(11)
    plain = timm.create_model(NAME, pretrained=False)
    assert torch.equal(given.net.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    torch.save({"model": plain.state_dict()}, tmp_path / "test_vit.r160_in1k.pth")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    by_folder = load_vit(NAME)
    assert torch.equal(by_folder.keys(images()), given.keys(images()))
    saved.rename(tmp_path / "test_vit.r160_in1k.safetensors")  # before .pth
    assert load_vit(NAME).sha256 == given.sha256
    assert load_vit(NAME, sha256=str(given.sha256).upper()).sha256 == given.sha256


def test_the_hubs_cache_comes_after_the_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    hub = tmp_path / "hub"
    snapshot = hub / "models--timm--test_vit.r160_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    saved.rename(snapshot / "model.safetensors")
    import huggingface_hub.file_download as cache

    monkeypatch.setattr(cache, "HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.setattr(cache.constants, "HF_HUB_CACHE", str(hub))
    assert load_vit(NAME).sha256 == storage.sha256(snapshot / "model.safetensors")


def broken(change: Any, path: Path) -> Path:
    tensors = timm.create_model(NAME, pretrained=False).state_dict()
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("norm.weight"), "lacks norm.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "holds more"),
        (lambda t: t["norm.bias"].fill_(torch.nan), "norm.bias has 64 of 64"),
        (lambda t: t.update({"norm.bias": torch.zeros(3)}), "norm.bias is \\(3,\\)"),
    ],
)
def test_weights_of_another_net_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_vit(NAME, broken(change, tmp_path / "bad.safetensors"))


def test_bad_input_is_named(
    vit: FrozenViT, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call, said in {
        lambda: load_vit("vit_smal_patch16_224.dino"): "did you mean 'vit_small_patch16_224'",
        lambda: load_vit("resnet50"): "is not a vision transformer of timm",
        lambda: load_vit("vit_small_patch16_224.dyno"): "no weights 'dyno'; did you mean",
        lambda: load_vit(NAME, "random:x"): "random:x: give a whole number",
        lambda: load_vit(NAME, "random:0", sha256="ab"): "random weights come from no file",
        lambda: load_vit(NAME, tmp_path / "gone"): "no such file",
        lambda: load_vit(NAME, saved, sha256="0" * 64): "has sha256 [0-9a-f]{64}, and 0000",
        lambda: load_vit("vit_small_patch8_224.dino"): f"put vit_small_patch8.*{FOLDER}",
        lambda: vit.keys(images().float()): "takes uint8",
        lambda: vit.keys(images(channels=2)): "takes uint8 \\(B, 1 or 3, H, W\\)",
        lambda: vit.pooled(images(), "max"): "pooling='max' is unknown",
    }.items():
        with pytest.raises(UserError, match=said):
            call()


@pytest.mark.parametrize(
    ("name", "label_free"),
    [
        ("vit_base_patch16_224.dino", True),
        ("vit_base_patch14_reg4_dinov2.lvd142m", True),
        ("vit_base_patch16_224.mae", True),
        ("vit_base_patch16_224.augreg_in21k_ft_in1k", False),
        ("vit_base_patch16_224.dino_ft_in1k", False),
        ("vit_tiny_patch16_224", False),
    ],
)
def test_labels_are_assumed_where_a_name_does_not_rule_them_out(
    name: str, label_free: bool
) -> None:
    assert self_supervised(name) == label_free


def test_the_caller_may_state_whether_weights_saw_labels(saved: Path) -> None:
    assert load_vit(NAME, saved).saw_labels
    assert not load_vit(NAME, saved, saw_labels=False).saw_labels
    assert load_vit(NAME, "random:0", saw_labels=True).provenance["saw_labels"]
