"""Feature nets behind one interface: uint8 images in, fp32 features out, with all that a score is named after.

A net is known by the sha256 of its weights, which are read as tensors only. How images reach its size and its range is
part of the protocol that is named in `selfguide.spec.metrics`.

The nets and timm, which take seconds to import, are imported where one is loaded: many that score load none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfguide.evaluation.features.resize import RESIZES
from selfguide.spec.metrics import FEATURES
from selfguide.spec.suggest import nearest
from selfguide.spec.timm_nets import check_net
from selfguide.spec.weight_files import lacking, locate, timm_weights
from selfguide.weights import put, read_weights
from shards import storage
from shards.errors import UserError

DINOV2_NAME = "vit_large_patch14_dinov2"
DINOV2_SIZE = 224


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureNet:
    """A net in eval mode and fp32, and how it is shown images."""

    name: str
    # of the file of weights
    sha256: str
    # a name in `RESIZES`, and the edge it makes
    resize: str
    size: int
    # of levels 0..255, for each channel
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # of the features, and of the spatial ones behind them
    width: int
    spatial: int = 0
    # normalised images (B, 3, size, size) -> features (B, width), and spatial ones (B, spatial) or None
    net: nn.Module

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(B, width) fp32 on the CPU, of uint8 images (B, 1 or 3, H, W) of levels 0..255."""
        return self.rows(images)[:, : self.width]

    @torch.no_grad()
    def rows(self, images: Tensor) -> Tensor:
        """(B, width + spatial) fp32 on the CPU: the features, then the spatial ones.

        Raises:
            UserError: images of another type or number of channels, or of which the net makes no finite numbers.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images are {tuple(images.shape)} {images.dtype}: {self.name} takes uint8 (B, 1 or 3, H, W)"
            )
        with exact():
            levels = images.to(self.device).float()
            x = RESIZES[self.resize](levels, self.size).expand(-1, 3, -1, -1)
            found = [x for x in self.net(self._normal(x)) if x is not None]
            rows = torch.cat(found, 1)[:, : self.width + self.spatial].float().cpu()
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows)).any(1).int().argmax())
            raise UserError(
                f"{self.name} makes NaN or infinite features of image {bad} of {len(rows)}: its weights (sha256 "
                f"{self.sha256[:12]}) do not work with this version of the net; give others, or another net"
            )
        return rows

    @property
    def logits(self) -> Callable[[Tensor], Tensor] | None:
        """(B, width) features -> (B, K) logits; None where the net is no classifier."""
        return getattr(self.net, "logits", None)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> FeatureNet:
        self.net.to(device)
        return self

    @property
    def about(self) -> dict[str, Any]:
        """What a reference made with it says of it; two references compare only where all of it is equal."""
        return {
            "net": self.name,
            "sha256": self.sha256,
            "resize": f"{self.resize}, to {self.size}",
            "normalisation": [list(self.mean), list(self.std)],
            "width": self.width,
        }

    def _normal(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std


@contextmanager
def exact() -> Iterator[None]:
    """fp32 as it is written: no TF32, and of cuDNN nothing that adds up in any order."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def load_feature_net(
    protocol: str,
    weights: str | Path | None = None,
    *,
    net: str | None = None,
    sha256: str | None = None,
) -> FeatureNet:
    """The net that a protocol of images measures in, on the CPU.

    Args:
        weights: their file; by default it is looked for as `selfguide.spec.weight_files` says.
        net, sha256: of fd_timm, which has no net of its own: a model of timm or its published weights, such as
            resnet50.a1_in1k, and what its file must have; `selfguide.spec.timm_nets.found_sha256` finds it out.

    Raises:
        UserError: no weights, weights with another sha256, of another net, or not finite; an unknown net.
    """
    given = str(weights) if weights is not None else None
    if protocol == "fd_timm":
        return _any_timm(net, given, sha256)
    features = FEATURES.get(protocol)
    if features is None or features.weights is None:
        known = [name for name, each in FEATURES.items() if each.of_images]
        raise UserError(
            f"protocol={protocol!r} is no protocol of images{nearest(protocol, known)}; known: {', '.join(known)}"
        )
    file = locate(features.weights, given)
    if file is None:
        raise UserError(lacking(features.weights, given))
    tensors = _read(file, features.sha256)
    return _LOADERS[features.weights.name](tensors, str(file), protocol)


def _inception(tensors: dict[str, Tensor], where: str, protocol: str) -> FeatureNet:
    from selfguide.evaluation.features import inception

    return FeatureNet(
        name="inception_v3_2015",
        sha256=FEATURES["fid_adm"].sha256,
        resize=_resize_of(protocol),
        size=inception.SIZE,
        mean=(128.0,) * 3,
        std=(128.0,) * 3,
        width=inception.WIDTH,
        # which ADM's sFID alone reads
        spatial=17 * 17 * 7 if protocol == "fid_adm" else 0,
        net=_filled(inception.Inception(), inception.with_counters(tensors), where),
    )


def _effnet(tensors: dict[str, Tensor], where: str, protocol: str) -> FeatureNet:
    from selfguide.evaluation.features import effnet

    return FeatureNet(
        name="efficientnet_lite0_stage5",
        sha256=FEATURES["fd_effnet"].sha256,
        resize=_resize_of(protocol),
        size=effnet.SIZE,
        mean=(127.5,) * 3,
        std=(127.5,) * 3,
        width=effnet.WIDTH,
        net=_filled(effnet.EffNet(), effnet.in_timm_names(tensors), where),
    )


def _dinov2(tensors: dict[str, Tensor], where: str, protocol: str) -> FeatureNet:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    net: Any = timm.create_model(DINOV2_NAME, num_classes=0, img_size=DINOV2_SIZE)
    return _of_timm(
        net,
        dict(checkpoint_filter_fn(tensors, net)),
        where,
        name=f"{DINOV2_NAME}.lvd142m",
        sha256=FEATURES["fdd"].sha256,
        size=DINOV2_SIZE,
    )


# by the weight file's name
_LOADERS: dict[str, Callable[[dict[str, Tensor], str, str], FeatureNet]] = {
    "inception": _inception,
    "effnet": _effnet,
    "dinov2": _dinov2,
}


class _Pooled(nn.Module):
    """A model of timm without its classifier, as a net with features and no spatial ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.model(x), None


def _any_timm(name: str | None, given: str | None, sha256: str | None) -> FeatureNet:
    if not name or not sha256:
        raise UserError(
            f"protocol=fd_timm with net={name}, weights={given}, sha256={sha256}: it measures in the net of timm that "
            "you name, so give its name and the sha256 of its weights"
        )
    check_net(name, given, where="")
    file = locate(timm_weights(name, sha256), given)
    if file is None and given:
        raise UserError(f"weights={given}: no such file")
    if file is None:
        raise UserError(lacking(timm_weights(name, sha256)))
    tensors = _read(file, sha256)

    import timm

    from selfguide.discovery.nets import in_own_names

    net: Any = timm.create_model(name, num_classes=0)
    own = dict(in_own_names(net, tensors))
    return _of_timm(net, own, str(file), name=name, sha256=sha256.lower(), size=None)


def _of_timm(
    net: Any, tensors: dict[str, Tensor], where: str, *, name: str, sha256: str, size: int | None
) -> FeatureNet:
    """A model of timm as it is evaluated, but for the resize, which makes the whole image square."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(net)
    mean, std = ([255 * v for v in config[field]] for field in ("mean", "std"))
    return FeatureNet(
        name=name,
        sha256=sha256,
        resize="bicubic, antialiased, float",
        size=size or config["input_size"][-1],
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        width=int(net.num_features),
        net=_Pooled(_filled(net, tensors, where)),
    )


def _resize_of(protocol: str) -> str:
    return FEATURES[protocol].resize.partition(", to ")[0]


def _filled(net: nn.Module, tensors: dict[str, Tensor], where: str) -> Any:
    put(net, tensors, where)
    return net.float().eval().requires_grad_(False)


def _read(file: Path, sha256: str) -> dict[str, Tensor]:
    found = storage.sha256(str(file))
    if found != sha256.lower():
        raise UserError(
            f"{file} has sha256 {found}, and {sha256} is what the protocol is named after: fetch the file again"
        )
    return read_weights(file, str(file))
