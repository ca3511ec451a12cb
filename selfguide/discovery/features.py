"""What a frozen network sees in an image: one vector, pooled from one layer.

Three nets: a snapshot of ours, read at one layer and one noise-time (Hu et al. 2023, arXiv 2312.08825, section 3.1); a
net of timm (as Hu et al. 2023, arXiv 2210.06462, take DINO's); and the pixels themselves, the baseline to beat.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, to_images
from selfguide.data.crop_flip import CropFlip
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.conditions import NULL, UNCONDITIONAL, Condition, mirrored_labels
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.models.backbone import pool
from selfguide.randomness import normal
from selfguide.snapshot import Snapshot
from selfguide.spec.config import POOLINGS
from selfguide.spec.suggest import nearest
from shards.errors import UserError
from shards.format.header import Header

if TYPE_CHECKING:
    # timm takes seconds to import, and a snapshot's features need none of it
    from selfguide.discovery.nets import FrozenNet


class FeatureNet(Protocol):
    """Stored samples to features; a pure function of what is stored and the ordinal."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """All that decides the features, `saw_labels` among it; JSON."""

    def __call__(self, stored: Tensor, ordinals: Tensor) -> Tensor:
        """Stored values (B, ...) of the samples `ordinals` (B,) -> fp32 features (B, F) on the CPU."""


class SnapshotFeatures:
    """Pooled tokens of one layer of a published student, without a condition, of images noised to one noise-time."""

    def __init__(
        self,
        snapshot: Snapshot,
        header: Header | Mapping[str, Any],
        *,
        layer: int | str | None = None,
        noise_time: float = 0.2,  # SGFM
        pooling: str | None = None,
        seed: int = 0,
    ) -> None:
        """`header` is that of the shards to be read. By default the middle layer, and [CLS] where there is one, else
        the mean.

        Raises:
            UserError: no such layer or pooling, a noise-time off the path, shards that the student was not made for.
        """
        net = snapshot.student.backbone.net
        self.snapshot, self.seed, self.noise_time = snapshot, seed, noise_time
        self.cls = bool(getattr(net, "cls_token", False))
        self.pooling = pooling or ("cls" if self.cls else "mean")
        self.number = net.middle if layer is None else net.layer(layer)
        self.layer = net.layers[self.number - 1]
        self.normaliser = Normaliser.of(header)
        self.preconditioning = build_preconditioning(snapshot.config.path)
        # an online student has trained its unconditional row, one that was conditioned from the start its null row
        source = snapshot.guidance["source"]
        self.state = NULL if snapshot.conditioned and source != "online" else UNCONDITIONAL
        if self.state == NULL and snapshot.never_null:
            warnings.warn(
                "this snapshot was trained with guidance.drop=0, so never without its condition, and its features are "
                "read without; take one of a run with guidance.drop=0.1, or an unconditional one",
                stacklevel=2,
            )
        self._check()

    def _check(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(
                f"pooling={self.pooling!r} is unknown{nearest(self.pooling, POOLINGS)}; known: {', '.join(POOLINGS)}"
            )
        if self.pooling == "cls" and not self.cls:
            raise UserError(
                "pooling=cls: this network has no [CLS] (model.cls_token=false); take mean, flat or attention"
            )
        path = self.preconditioning.path
        if not path.last <= self.noise_time <= path.first:
            raise UserError(
                f"noise_time={self.noise_time:g} is not on this snapshot's path; take {path.last:g} to {path.first:g}"
            )
        own, given = Header.of(self.snapshot.data["header"]), self.normaliser.header
        for field in ("kind", "encoder", "encoder_sha256", "shift", "scale"):
            expected, found = getattr(own, field), getattr(given, field)
            if expected != found:
                raise UserError(
                    f"the shards' header has {field}={found}, and the snapshot was trained on {field}={expected}; "
                    "give shards made as its own"
                )

    @property
    def provenance(self) -> dict[str, Any]:
        snapshot = self.snapshot
        return {
            "net": snapshot.config.model.name,
            "experiment": snapshot.config.experiment,
            "images": snapshot.images,
            "ema_halflife": snapshot.ema,
            "sha256": snapshot.sha256,
            "layer": self.layer.name,
            "noise_time": self.noise_time,
            "pooling": self.pooling,
            "told": "null" if self.state == NULL else "unconditional",
            "noise_seed": self.seed,
            "saw_labels": snapshot.saw_labels,
        }

    @torch.no_grad()
    def __call__(self, stored: Tensor, ordinals: Tensor) -> Tensor:
        x0 = self.shown(self.normaliser.encode(stored))
        eps = normal(self.seed, "extraction-noise", ordinals, tuple(x0.shape[1:]))
        return self.of_layers(x0, eps, [self.number])[0].cpu()

    @torch.no_grad()
    def tokens(self, x0: Tensor, ordinals: Tensor) -> Tensor:
        """(B, T, D) of the layer for images in model space (B, C, H, W), which meet the noise of `ordinals` (B,)."""
        x0 = self.shown(x0)
        eps = normal(self.seed, "extraction-noise", ordinals, tuple(x0.shape[1:]))
        return self._tokens(x0, eps, [self.number])[0]

    @torch.no_grad()
    def of_layers(
        self,
        x0: Tensor,
        eps: Tensor,
        numbers: Sequence[int],
        place: Tensor | None = None,
        mirrored: Tensor | None = None,
    ) -> list[Tensor]:
        """Features (B, F) of several layers, from one forward of images x0 (B, C, H, W) with the noise `eps`; fp32, on
        the snapshot's device.

        Args:
            place: (B,) in [0, 1), where in each image the one patch is that is taken in place of all of them.
            mirrored: (B,) which images are, for a network that was trained with augmentation.
        """
        layers = self.snapshot.student.backbone.net.layers
        extras = [layers[number - 1].extras for number in numbers]
        augment = None if mirrored is None else mirrored_labels(mirrored)
        both = zip(self._tokens(x0, eps, numbers, augment), extras, strict=True)
        if place is not None:
            return [_one_patch(each[:, n:], place).float() for each, n in both]
        return [pool(each, self.pooling, n, cls=self.cls).float() for each, n in both]

    def _tokens(
        self, x0: Tensor, eps: Tensor, numbers: Sequence[int], augment: Tensor | None = None
    ) -> list[Tensor]:
        device, backbone = self.snapshot.device, self.snapshot.student.backbone
        tau = torch.full((len(x0),), self.noise_time, device=device)
        x = self.preconditioning.noised(x0.to(device), eps.to(device), tau)
        x = x.to(next(self.snapshot.student.parameters()).dtype)
        state = torch.full((len(x0),), self.state, device=device)
        nothing = Condition(state, augment=None if augment is None else augment.to(device))
        return backbone.features_of(x, tau, nothing, numbers)

    def shown(self, x0: Tensor) -> Tensor:
        """The middle of images that training saw windows of."""
        edge, grid = self.snapshot.student.backbone.net.size, (x0.shape[-2], x0.shape[-1])
        if not self.snapshot.config.data.crop or grid == (edge, edge):
            return x0
        return CropFlip.centred(len(x0), grid, (edge, edge)).images(x0)


def _one_patch(patches: Tensor, place: Tensor) -> Tensor:
    """(B, T, D) -> (B, D), the patch at that share of the way through each image's."""
    # a product in fp32 may round up to T
    at = (place.double() * patches.shape[1]).long().to(patches.device)
    return patches.take_along_dim(at[:, None, None], dim=1)[:, 0]


class TimmFeatures:
    """What a frozen net of timm pools, of a ViT its tokens; latents are decoded by the autoencoder that made them."""

    def __init__(
        self,
        vit: FrozenNet,
        header: Header | Mapping[str, Any],
        *,
        pooling: str | None = None,
        view: str = "timm",
        autoencoder: Autoencoder | None = None,
    ) -> None:
        self.vit, self.view, self.autoencoder = vit, view, autoencoder
        self.pooling = pooling or vit.pooling
        self.normaliser = Normaliser.of(header)
        if self.normaliser.header.kind == "latent" and autoencoder is None:
            raise UserError(
                f"the shards hold latents of {self.normaliser.header.encoder}: a network of images needs its "
                "autoencoder"
            )

    @property
    def provenance(self) -> dict[str, Any]:
        # timm's view is the one from before there were others; where the whole image is seen its size may be any
        seen = self.vit.provenance_at_any_size | {"view": self.view}
        said = {
            **(self.vit.provenance if self.view == "timm" else seen),
            "pooling": self.pooling,
        }
        if self.autoencoder is not None:
            said |= {"decoder": self.autoencoder.name, "decoder_sha256": self.autoencoder.sha256}
        return said

    def __call__(self, stored: Tensor, ordinals: Tensor) -> Tensor:
        images = to_images(self.normaliser.header, self.normaliser.encode(stored), self.autoencoder)
        return self.vit.pooled(images, self.pooling, self.view).float().cpu()


class InputFeatures:
    """What a model sees, pixels or latents, side by side: what any feature has to beat."""

    def __init__(self, header: Header | Mapping[str, Any]) -> None:
        self.normaliser = Normaliser.of(header)

    @property
    def name(self) -> str:
        """`pixels` or `latents`."""
        return "pixels" if self.normaliser.header.kind == "image" else "latents"

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {"net": self.name, "saw_labels": False}

    def __call__(self, stored: Tensor, ordinals: Tensor) -> Tensor:
        return self.normaliser.encode(stored).flatten(1)


class PixelFeatures(InputFeatures):
    """Images alone.

    Raises:
        UserError: the shards hold latents.
    """

    def __init__(self, header: Header | Mapping[str, Any]) -> None:
        super().__init__(header)
        if self.name != "pixels":
            raise UserError("pixels: the shards hold latents; give a snapshot or a ViT")
