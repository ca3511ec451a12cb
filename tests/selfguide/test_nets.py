"""Any net of timm is read as timm's own forward has it, and methods' published checkpoints by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from selfguide.discovery.families import FAMILIES
from selfguide.discovery.nets import FrozenNet
from selfguide.discovery.vit import FrozenViT, load_net, load_vit
from shards.errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LEVELS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def images(edge: int = 160, count: int = 2) -> Tensor:
    """Smooth ones, of which every filter makes nearly the same."""
    rough = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (255 * nn.functional.interpolate(rough, (edge, edge), mode="bicubic").clamp(0, 1)).byte()


def normal(x: Tensor, mean: Any, std: Any) -> Tensor:
    return (x.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_a_cnns_features_are_what_its_classifier_reads(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = timm.create_model(name, pretrained=False).eval()
    # as timm publishes it: with the classifier, and as older files are, without counters
    kept = {n: t for n, t in plain.state_dict().items() if "num_batches_tracked" not in n}
    save_file(kept, tmp_path / "w.safetensors")
    net = load_net(name, tmp_path / "w.safetensors")
    assert type(net) is FrozenNet and net.saw_labels
    transform = create_transform(**resolve_model_data_config(plain), is_training=False)
    x = images(200)
    seen = torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in x])
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(seen), pre_logits=True)
        logits = plain.get_classifier()(expected)
        torch.testing.assert_close(logits, plain(seen))
    found = net.pooled(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 0.02 * expected.norm()


def around(net: nn.Module, before: str) -> dict[str, Tensor]:
    return {f"{before}{name}": tensor for name, tensor in net.state_dict().items()}


def published(method: str, net: nn.Module) -> dict[str, Any]:
    """A checkpoint in the layout in which the method's authors published theirs, with all that lies beside."""
    other = timm.create_model("test_vit", num_classes=0)
    plain = {"epoch": 300, "arch": "vit", "optimizer": {"state": {}, "param_groups": []}}
    ones = torch.ones(2, 3)
    if method in ("dino", "ibot"):
        heads = {"module.head.mlp.0.weight": ones, "module.head.last_layer.weight_g": ones}
        masked = {"module.backbone.masked_embed": ones} if method == "ibot" else {}
        return {
            "student": around(other, "module.backbone.") | heads,
            "teacher": around(net, "module.backbone.") | heads | masked,
            **plain,
        }
    if method == "mocov3":
        inside = around(net, "module.base_encoder.") | around(other, "module.momentum_encoder.")
        more = {"module.base_encoder.head.0.weight": ones, "module.predictor.0.weight": ones}
        return {"state_dict": inside | more, **plain}
    assert method == "msn"
    head = {"module.fc.fc1.weight": ones}
    return {
        "encoder": around(other, "module.") | head,
        "target_encoder": around(net, "module.") | head,
        "prototypes": ones,
        "epoch": 3,
        "opt": {},
    }


@pytest.mark.parametrize("method", ["dino", "ibot", "mocov3", "msn"])
def test_a_methods_checkpoint_is_read_by_its_name(method: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    plain = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(published(method, plain), tmp_path / "w.pth.tar")
    net = load_net("test_vit", tmp_path / "w.pth.tar", method=method)
    assert isinstance(net, FrozenViT) and not net.saw_labels
    assert net.provenance["net"] == f"test_vit.{method}"
    x = images()  # of the net's own size, so that nothing is resized by --view sgdm
    with torch.no_grad():
        expected = plain.forward_features(normal(x, *IMAGENET))[:, 0]
    torch.testing.assert_close(net.pooled(x, "cls", "sgdm"), expected)


class Normed(nn.Sequential):
    """SimCLR's BatchNormRelu."""

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU() if relu else nn.Identity())


class Projection(nn.Module):
    def __init__(self, before: int, behind: int, stride: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(before, behind, 1, stride, bias=False)
        self.bn = Normed(behind, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.shortcut(x))


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.projection = Projection(before, 4 * width, stride) if projected else nn.Identity()
        self.net = nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False),
            Normed(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            Normed(width),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            Normed(4 * width, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.projection(x) + self.net(x))


class Stage(nn.Module):
    def __init__(self, count: int, before: int, width: int, stride: int) -> None:
        super().__init__()
        first = Bottleneck(before, width, stride, True)
        more = [Bottleneck(4 * width, width, 1, False) for _ in range(count - 1)]
        self.blocks = nn.ModuleList([first, *more])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class SimclrResNet(nn.Module):
    """SimCLRv2's ResNet as it is converted from TensorFlow, of bottlenecks (2, 2, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), Normed(64), nn.MaxPool2d(3, 2, 1)
        )
        before, stages = 64, []
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            stages.append(Stage(2, before, width, stride))
            before = 4 * width
        self.net = nn.Sequential(stem, *stages)
        self.fc = nn.Linear(before, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))


def test_simclrs_resnet_is_read_under_timms_names(tmp_path: Path) -> None:
    torch.manual_seed(7)
    plain = SimclrResNet().eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # no two alike
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    head = {"layers.0.weight": torch.ones(2, 2)}
    torch.save({"resnet": plain.state_dict(), "head": head}, tmp_path / "r.pth")
    net = load_net("resnet26", tmp_path / "r.pth", method="simclr")
    assert net.provenance["net"] == "resnet26.simclr" and not net.saw_labels
    x = images(net.config["input_size"][-1])
    with torch.no_grad():
        expected = plain(normal(x, *LEVELS))
    torch.testing.assert_close(net.pooled(x, view="sgdm"), expected, rtol=1e-4, atol=1e-4)


def test_what_a_file_of_ours_says_of_labels_decides(tmp_path: Path) -> None:
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    for said in ("yes", "no"):
        file = tmp_path / f"{said}.safetensors"
        save_file(tensors, file, {"saw_labels": said})
        assert load_vit("test_vit", file).saw_labels == (said == "yes")
        assert load_vit("test_vit", file, saw_labels=True).saw_labels


def test_what_no_method_or_net_takes_is_named(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(published("mocov3", timm.create_model("test_vit", num_classes=0)), file)
    selective = {"net.1.blocks.0.net.2.main_conv.0.weight": torch.ones(1)}
    torch.save({"resnet": selective}, tmp_path / "sk.pth")
    for call, said in {
        lambda: load_net("resnet51"): "no model of timm .*; did you mean 'resnet",
        lambda: load_net("resnet50.a7_in1k"): "has no weights 'a7_in1k'; did you mean",
        lambda: load_net("test_vit", file, method="mocov4"): "method='mocov4'",
        lambda: load_net("test_vit", method="mocov3"): "give the file",
        lambda: load_net("test_vit", "random:0", method="mocov3"): "give the file",
        lambda: load_net("test_vit.r160_in1k", file, method="mocov3"): "give test_vit alone",
        lambda: load_net("test_vit", file, method="msn"): "no state dict|no encoder|lacks",
        lambda: load_net("resnet26", tmp_path / "sk.pth", method="simclr"): "selective kernels",
        lambda: load_net("test_resnet", "random:0").pooled(images(), "mean"): "pools by itself",
    }.items():
        with pytest.raises(UserError, match=said):
            call()
    assert set(FAMILIES) == {"dino", "ibot", "mocov3", "msn", "simclr"}


TOLD: list[str] = []


def tell(what: str) -> None:
    TOLD.append(what)


class Anybody:
    """A class of a foreign program, of which unpickling would be told."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (tell, ("run",))


def test_a_file_that_would_run_something_is_refused(tmp_path: Path) -> None:
    tensors = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save({"target_encoder": tensors, "extra": Anybody()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="tensors only"):
        load_net("test_vit", tmp_path / "w.pth", method="msn")
    assert not TOLD
