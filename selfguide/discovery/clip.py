"""Pseudo-labels by text: the class whose name an image and text net finds nearest to each image.

Radford et al. 2021 (arXiv 2103.00020): images and texts come to unit vectors of one space, a class is the mean of its
name in several prompts, and an image is of the class with the largest cosine. C-EDM (Adaloglou et al. 2024, arXiv
2403.00570, section 4.4) conditions on such labels to compare them with clusters. People wrote the texts that both
towers learned from, and the names: whatever is made of this has seen labels, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from selfguide.data.autoencoders import Autoencoder, to_images
from selfguide.data.normaliser import Normaliser
from selfguide.spec.suggest import check_known
from selfguide.weights import put, read_weights
from shards import storage
from shards.errors import UserError
from shards.format.header import Header

# the first five of those that CLIP's authors publish for CIFAR; C-EDM takes five
PROMPTS = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a black and white photo of a {}.",
    "a low contrast photo of a {}.",
    "a high contrast photo of a {}.",
)
NAME = "{}"  # in a prompt, where the class's name goes


@dataclass(frozen=True, kw_only=True, eq=False)
class Towers:
    """Both towers of an image and text net of open_clip, in eval mode and fp32."""

    net: Any
    name: str
    sha256: str  # of the file of weights
    tokens: Any  # texts -> (N, L) int64
    size: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @torch.no_grad()
    def classes(self, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """(K, D) unit vectors, each the direction of the mean of a name's unit vectors in all prompts."""
        found = []
        for name in names:
            tokens = self.tokens([prompt.replace(NAME, name) for prompt in prompts])
            each = F.normalize(self.net.encode_text(tokens.to(self.device)), dim=-1)
            found.append(F.normalize(each.mean(0), dim=-1))
        return torch.stack(found)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """(B, D) unit vectors of uint8 images (B, 1 or 3, H, W) of levels 0..255."""
        x = images.to(self.device).expand(-1, 3, -1, -1)
        x = resize(x, [self.size], InterpolationMode.BICUBIC, antialias=True)
        x = center_crop(x, [self.size, self.size]).float() / 255
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return F.normalize(self.net.encode_image((x - mean) / std), dim=-1)


def load_towers(
    name: str, weights: Path, *, sha256: str | None = None, device: torch.device | str = "cpu"
) -> Towers:
    """open_clip's model `name`, such as ViT-bigG-14, with the weights of both towers in one file.

    Raises:
        UserError: open_clip is not installed, an unknown name, no file, another sha256 or weights of another net.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError(
            "clip: the text tower is open_clip's, which is not installed; pip install 'selfguide[clip]'"
        ) from None
    check_known("net", name, open_clip.list_models())
    config = open_clip.get_model_config(name)
    if config["text_cfg"].get("hf_tokenizer_name"):
        raise UserError(
            f"net={name}: its words are those of a model of the hub; name one with CLIP's own, such as ViT-bigG-14"
        )
    file = weights.expanduser()
    if not file.is_file():
        raise UserError(f"weights={weights}: no such file")
    found = storage.sha256(str(file))
    if sha256 is not None and found != sha256.lower():
        raise UserError(
            f"{file} has sha256 {found}, and {sha256} was asked for: get the file again, or correct the sha256"
        )
    net: Any = open_clip.create_model(name, load_weights=False)
    seen = open_clip.get_model_preprocess_cfg(net)
    put(net, read_weights(file, str(file)), str(file))
    size = seen["size"]
    return Towers(
        net=net.float().eval().requires_grad_(False).to(device),
        name=name,
        sha256=found,
        tokens=open_clip.get_tokenizer(name),
        size=int(size if isinstance(size, int) else size[0]),
        mean=seen["mean"],
        std=seen["std"],
    )


class TextLabels:
    """Stored samples to the class whose name is nearest."""

    def __init__(
        self,
        towers: Towers,
        header: Header,
        names: Sequence[str],
        prompts: Sequence[str] = PROMPTS,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        """
        Raises:
            UserError: fewer than two names, one of them twice, or a prompt without a place for a name.
        """
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"{len(names)} names: give two or more, each once")
        for prompt in prompts:
            if NAME not in prompt:
                raise UserError(f"prompt {prompt!r} has no {NAME}, where the class's name goes")
        self.towers, self.names, self.prompts = towers, tuple(names), tuple(prompts)
        self.normaliser, self.autoencoder = Normaliser.of(header), autoencoder
        self.classes = towers.classes(self.names, self.prompts)

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the labels; that texts were learned from and that people named the classes."""
        return {
            "method": "clip",
            "net": self.towers.name,
            "sha256": self.towers.sha256,
            "names": list(self.names),
            "prompts": list(self.prompts),
            "text": True,
            "saw_labels": True,
        }

    def __call__(self, stored: Tensor) -> Tensor:
        """Stored values (B, ...) -> (B,) int32 on the CPU."""
        images = to_images(self.normaliser.header, self.normaliser.encode(stored), self.autoencoder)
        return (self.towers.images(images) @ self.classes.T).argmax(1).int().cpu()
