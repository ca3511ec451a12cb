"""Feature nets against the packages that others' scores come from, on the same weights; and what they refuse."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from selfguide.evaluation.features import net as nets
from selfguide.evaluation.features.effnet import EffNet
from selfguide.evaluation.features.inception import Inception
from selfguide.evaluation.features.resize import bicubic_antialiased, tf1_bilinear
from selfguide.spec import metrics, weight_files
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.reference_files import check_file
from selfguide.spec.weight_files import EFFNET, INCEPTION, locate
from shards.errors import UserError

SIZES = (32, 64, 256, 299, 512)


def random_state(net: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state dict that leaves features of some size: convolutions keep the variance of what they read."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in net.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            found[name] = tensor
        elif name.endswith("running_var"):
            found[name] = 1 + 0.2 * noise.abs()
        elif tensor.ndim > 1:
            found[name] = noise * (2 / tensor[0].numel()) ** 0.5
        else:
            found[name] = 0.1 * noise + name.endswith("bn.weight")
    return found


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of random weights that stands for the published one."""
    file = tmp_path_factory.mktemp("weights") / INCEPTION.files[0]
    torch.save(random_state(Inception()), file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fid_adm", "fid_clean"):
            patch.setitem(metrics.FEATURES, name, replace(metrics.FEATURES[name], sha256=sha256))
        yield file


@pytest.fixture(scope="module")
def ours(inception: Path) -> nets.FeatureNet:
    return nets.load_feature_net("fid_adm", inception)


def images(size: int, count: int = 1) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, size, size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(size),
    )


@pytest.fixture(scope="module")
def fidelity(inception: Path) -> Any:
    """torch-fidelity's Inception with these weights: uint8 images -> features and logits."""
    return _oracle("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "own", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception)
    )


@pytest.mark.parametrize("size", SIZES)
def test_fid_adm_with_torch_fidelitys_weights_is_its_features_bit_for_bit(
    ours: nets.FeatureNet, fidelity: Any, size: int
) -> None:
    assert ours.logits is not None
    features, logits = fidelity(images(size))
    assert torch.equal(ours.embed(images(size)), features)
    assert torch.equal(ours.logits(features), logits)


def test_fid_adm_beside_torchmetrics_differs_by_its_antialias_alone(
    inception: Path, ours: nets.FeatureNet
) -> None:
    kind = _oracle("torchmetrics.image.fid").NoTrainInceptionV3
    theirs = kind("inception-v3-compat", ["2048"], str(inception))
    for size in (32, 299):
        own = ours.embed(images(size))
        theirs.use_antialias = False
        assert torch.equal(theirs(images(size)).reshape(1, -1), own), size
        theirs.use_antialias = True
        far = (theirs(images(size)).reshape(1, -1) - own).norm() / own.norm()
        assert (far == 0) if size == 299 else (1e-4 < far < 0.3), size


def test_fid_adm_beside_pytorch_fids_differs_by_its_normalisation(
    inception: Path, ours: nets.FeatureNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _oracle("cleanfid.inception_pytorch")
    tensors = torch.load(inception, weights_only=True)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: tensors)
    theirs = module.InceptionV3(resize_input=False, normalize_input=True).eval()
    for size in SIZES:
        own, shown = ours.embed(images(size)), tf1_bilinear(images(size).float(), 299)
        with torch.no_grad():
            # the same pixels: theirs become (x - 127.5) / 127.5
            found = theirs(shown / 255)[0].flatten(1)
            same = theirs((shown - 128) / 256 + 0.5)[0].flatten(1)
        assert 1e-4 < (found - own).norm() / own.norm() < 2e-2, size
        torch.testing.assert_close(same, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_antialiased_of_any_size_is_clean_fids_to_a_hundredth_of_a_level(size: int) -> None:
    resize = _oracle("cleanfid.resize").build_resizer("clean")
    theirs = np.stack([resize(each.permute(1, 2, 0).numpy()) for each in images(size)])
    ours = bicubic_antialiased(images(size).float(), 299).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 0.01
    assert np.abs(ours - theirs).mean() < 1e-3


def test_fid_clean_is_clean_fids_resize_before_its_inception(
    inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = _oracle("cleanfid.resize").build_resizer("clean")
    shown = np.stack([resize(each.permute(1, 2, 0).numpy()) for each in images(64)])
    module = _oracle("cleanfid.inception_pytorch")
    tensors = torch.load(inception, weights_only=True)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: tensors)
    theirs = module.InceptionV3(resize_input=False, normalize_input=True).eval()
    with torch.no_grad():
        # what it makes (x - 128) / 128 of
        levels = (torch.from_numpy(shown).permute(0, 3, 1, 2) - 128) / 256 + 0.5
        wanted = theirs(levels)[0].flatten(1)
    found = nets.load_feature_net("fid_clean", inception).embed(images(64))
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_inception_without_batch_norms_counters_loads(inception: Path, tmp_path: Path) -> None:
    tensors = torch.load(inception, weights_only=True)
    file = tmp_path / "few.pth"
    torch.save({n: t for n, t in tensors.items() if not n.endswith("tracked")}, file)
    with pytest.MonkeyPatch.context() as patch:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        row = replace(metrics.FEATURES["fid_clean"], sha256=sha256)
        patch.setitem(metrics.FEATURES, "fid_clean", row)
        found = nets.load_feature_net("fid_clean", file)
    assert found.rows(images(32, 2)).shape == (2, 2048)


def test_fid_adm_spatial_features_are_the_first_channels_of_mixed_6_by_row_and_column(
    ours: nets.FeatureNet, fidelity: Any
) -> None:
    # ADM reads "mixed_6/conv:0" and keeps [..., :7] of it. TensorFlow calls its blocks mixed, mixed_1, ..., mixed_10,
    # so that this is the seventh, whose first branch is the first of what the whole block returns.
    names = [n for n, _ in ours.net.named_children() if n.startswith("Mixed_")]
    seventh = names[6]
    assert (len(names), seventh) == (11, "Mixed_6d")
    seen: list[Tensor] = []
    hook = getattr(fidelity, seventh).register_forward_hook(lambda *call: seen.append(call[-1]))
    fidelity(images(64, 2))
    hook.remove()
    assert seen[0].shape == (2, 768, 17, 17)
    assert ours.spatial == 17 * 17 * 7
    spatial = ours.rows(images(64, 2))[:, 2048:].reshape(2, 17, 17, 7)
    assert torch.equal(spatial, seen[0][:, :7].permute(0, 2, 3, 1))


@pytest.mark.skipif(locate(EFFNET) is None, reason="the extra `features` is not installed")
def test_fd_effnet_from_the_package_sees_what_timm_sees() -> None:
    net = nets.load_feature_net("fd_effnet")
    assert isinstance(net.net, EffNet)
    assert (net.width, net.size, net.sha256) == (112, 96, EFFNET.sha256)
    model = net.net.net
    x = (bicubic_antialiased(images(32).float(), 96) - 127.5) / 127.5
    with torch.no_grad():
        (stage,) = model.forward_intermediates(x, indices=[3], intermediates_only=True)
    assert torch.equal(net.embed(images(32)), stage.mean((2, 3)))


@pytest.mark.skipif(locate(EFFNET) is None, reason="the extra `features` is not installed")
def test_fd_effnet_of_grey_images_is_that_of_three_equal_channels() -> None:
    net = nets.load_feature_net("fd_effnet")
    grey = images(16)[:, :1]
    assert torch.equal(net.embed(grey), net.embed(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    "protocol",
    [
        "fid_adm",
        "fid_clean",
        pytest.param(
            "fd_effnet",
            marks=pytest.mark.skipif(
                locate(EFFNET) is None, reason="the extra `features` is not installed"
            ),
        ),
    ],
)
def test_a_reference_made_by_a_protocol_s_net_is_what_a_submission_takes_for_it(
    protocol: str, inception: Path, tmp_path: Path
) -> None:
    """The launcher knows a net by the table alone, without building it."""
    net = nets.load_feature_net(protocol, None if protocol == "fd_effnet" else inception)
    file, mean = tmp_path / "val.npz", np.zeros(net.width)
    stated = json.dumps({"features": net.about})
    np.savez(file, mu=mean, sigma=np.zeros((1, 1)), about=np.array(stated))
    check_file("reference", file, EvaluationConfig(protocol=protocol))
    for name in ("width", "resize", "sha256"):
        other = json.dumps({"features": {**net.about, name: "another"}})
        np.savez(file, mu=mean, sigma=np.zeros((1, 1)), about=np.array(other))
        with pytest.raises(UserError, match=f"{name}=another"):
            check_file("reference", file, EvaluationConfig(protocol=protocol))


def test_a_reference_of_a_net_whose_sha256_was_typed_in_capitals_is_taken(tmp_path: Path) -> None:
    file, stated = tmp_path / "val.npz", json.dumps({"features": {"sha256": "ab" * 32}})
    np.savez(file, mu=np.zeros(7), sigma=np.zeros((1, 1)), about=np.array(stated))
    typed = EvaluationConfig(protocol="fd_timm", net="resnet10t", sha256="AB" * 32)
    check_file("reference", file, typed)
    with pytest.raises(UserError, match="was made with sha256=abab"):
        check_file("reference", file, replace(typed, sha256="AC" * 32))


def test_fd_timm_of_any_net_reads_its_file_and_keeps_its_sha256(tmp_path: Path) -> None:
    file, sha256 = _timm_file(tmp_path / "net.safetensors", "resnet10t")
    found = nets.load_feature_net("fd_timm", file, net="resnet10t", sha256=sha256)
    assert (found.sha256, found.width) == (sha256, 512)
    assert found.embed(images(32, 2)).shape == (2, 512)


def test_fd_timm_features_are_what_timm_makes_of_clean_fids_resize(tmp_path: Path) -> None:
    file, sha256 = _timm_file(tmp_path / "net.safetensors", "resnet10t")
    found = nets.load_feature_net("fd_timm", file, net="resnet10t", sha256=sha256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t").eval()
    resize = _oracle("cleanfid.resize").make_resizer("PIL", False, "bicubic", (found.size,) * 2)
    shown = np.stack([resize(each.permute(1, 2, 0).numpy()) for each in images(32, 2)])
    config = model.pretrained_cfg
    assert (found.size, found.size) == config["input_size"][1:]
    normal = (shown / 255 - np.array(config["mean"])) / np.array(config["std"])
    with torch.no_grad():
        x = model.forward_features(torch.from_numpy(normal).permute(0, 3, 1, 2).float())
        wanted = model.forward_head(x, pre_logits=True)
    torch.testing.assert_close(found.embed(images(32, 2)), wanted, rtol=1e-3, atol=1e-3)


def test_fd_timm_two_nets_of_one_name_are_told_apart_by_their_sha256(tmp_path: Path) -> None:
    one = _timm_file(tmp_path / "one.safetensors", "resnet10t", seed=1)
    two = _timm_file(tmp_path / "two.safetensors", "resnet10t", seed=2)
    with pytest.raises(UserError, match=one[1]):
        nets.load_feature_net("fd_timm", two[0], net="resnet10t", sha256=one[1])


def test_fd_timm_without_a_sha256_is_refused(tmp_path: Path) -> None:
    file, _ = _timm_file(tmp_path / "net.safetensors", "resnet10t")
    with pytest.raises(UserError, match="sha256"):
        nets.load_feature_net("fd_timm", file, net="resnet10t")


def test_load_with_wrong_weights_names_both_checksums(tmp_path: Path) -> None:
    file = tmp_path / INCEPTION.files[0]
    torch.save(random_state(Inception(), seed=1), file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError) as refused:
        nets.load_feature_net("fid_adm", file)
    assert found in str(refused.value)
    assert metrics.FEATURES["fid_adm"].sha256 in str(refused.value)


def test_load_without_weights_names_the_file_its_places_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(weight_files.FOLDER, raising=False)
    with pytest.raises(UserError) as refused:
        nets.load_feature_net("fid_adm")
    for part in (INCEPTION.files[0], str(tmp_path), "tools.reference fetch inception"):
        assert part in str(refused.value)


def test_locate_with_a_folder_of_weights_takes_it_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "checkpoints" / INCEPTION.files[1]
    own = tmp_path / "own" / INCEPTION.files[0]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(weight_files.FOLDER, str(own.parent))
    for file in (cached, own):
        file.parent.mkdir(parents=True)
        file.touch()
    assert locate(INCEPTION) == own
    own.unlink()
    assert locate(INCEPTION) == cached
    assert locate(INCEPTION, str(tmp_path / "nothing")) is None


def test_images_of_floats_are_refused() -> None:
    net = nets.FeatureNet(
        name="n", sha256="", resize="TF1 bilinear", size=8, mean=(0.0,) * 3, std=(1.0,) * 3, width=1,
        net=torch.nn.Identity(),
    )  # fmt: skip
    with pytest.raises(UserError, match="uint8"):
        net.embed(torch.zeros(2, 3, 8, 8))


def _timm_file(file: Path, name: str, seed: int = 0) -> tuple[Path, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name)
    save_file(model.state_dict(), file)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def _oracle(module: str) -> Any:
    return pytest.importorskip(module.split(".")[0]) and importlib.import_module(module)
