"""Frozen vision transformers from timm: what others' self-supervised nets see in an image.

SGDM (Hu et al. 2023, arXiv 2210.06462) reads its groups, boxes and masks from DINO. Weights resolve in one order:
explicit file, folder of weights, local hub cache, download only where allowed. Their sha256 is always recorded, and
compared where one is given.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from selfguide.models.backbone import pool
from selfguide.spec.suggest import nearest
from selfguide.weights import from_hub_cache, put, read_weights
from shards import storage
from shards.errors import UserError

FOLDER = "SELFGUIDE_WEIGHTS_DIR"  # names a folder that holds <name>.safetensors, or .pth
RANDOM = "random:"  # in place of a file: weights drawn from the seed behind it, for tests
OF_HEAD = ("head.", "head_dist.")  # classifiers stay behind: features are read before them
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm publishes them
Positions = Literal["dino", "timm"]  # how positions are resampled for images of another size
OFFSET = 0.1  # patches, that DINO's code adds to a grid before it divides by the net's own
# how pooled features see an image: the short edge over the net's size, the filter, whether the centre is cut out; None
# is timm's own. SGDM reads the DINO of torch.hub by its own transform and timm's by timm's; TEMI has one for ImageNet.
VIEWS: dict[str, tuple[float | None, str | None, bool]] = {
    "timm": (None, None, True),
    "sgdm": (1.0, "bilinear", False),
    "temi": (1.0, "bicubic", False),
    "temi_in1k": (256 / 224, "bilinear", True),
}
SELF_SUPERVISED = ("dino", "mae", "moco", "ibot")  # words of names whose training saw no labels


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenViT:
    """A ViT in eval mode, fp32; every method takes uint8 images (B, 1 or 3, H, W) of levels 0..255."""

    net: VisionTransformer
    name: str
    sha256: str | None  # of the file of weights; None where they are random
    seed: int | None  # of random weights
    saw_labels: bool
    positions: Positions = "timm"

    @property
    def patch(self) -> int:
        return int(self.net.patch_embed.patch_size[0])

    @property
    def width(self) -> int:
        return int(self.net.embed_dim)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def provenance(self) -> dict[str, Any]:
        """What a sidecar made from it says of it, images of the net's own size."""
        weights = {"sha256": self.sha256} if self.sha256 else {"random_seed": self.seed}
        return {"net": self.name, **weights, "saw_labels": self.saw_labels}

    @property
    def provenance_at_any_size(self) -> dict[str, Any]:
        """The same of images of any size; those of before have timm's positions and do not say so."""
        said = {} if self.positions == "timm" else {"positions": self.positions}
        return self.provenance | said

    @torch.no_grad()
    def pooled(self, images: Tensor, pooling: str = "cls", view: str = "timm") -> Tensor:
        """(B, F) of images at the net's own size by one of `VIEWS`; see `selfguide.models.backbone.pool`."""
        if pooling == "cls" and self.net.cls_token is None:
            raise UserError(f"pooling=cls: {self.name} has no [CLS]; take mean or attention")
        tokens = self._tokens(self._normal(self._viewed(self._levels(images), view)))
        extras = self.net.num_prefix_tokens
        return pool(tokens, pooling, extras, cls=self.net.cls_token is not None)

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """(B, D, h, w) patch tokens of the last layer, of images in their own size.

        The grid covers the image: it is padded with zeros on the right and at the bottom to whole patches.
        """
        x = self._padded(self._normal(self._levels(images)))
        tokens = self._tokens(x)[:, self.net.num_prefix_tokens :]
        return self._grid(tokens, x)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """(B, D, h, w) keys of the last attention, heads side by side, of images in their own size.

        What LOST compares patches by (Simeoni et al. 2021, arXiv 2109.14279). Padded as `patches` does.
        """
        x = self._padded(self._normal(self._levels(images)))
        attention: Any = self.net.blocks[-1].attn
        with _kept(attention.k_norm) as kept:  # where keys pass, normalised or not
            self._tokens(x)
        keys = kept[0].transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, heads d)
        return self._grid(keys[:, self.net.num_prefix_tokens :], x)

    def to(self, device: torch.device | str) -> FrozenViT:
        self.net.to(device)
        return self

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, N, D) behind the last norm, of normalised images."""
        net: Any = self.net
        if self.positions == "timm":
            return net.forward_features(x)
        return net.norm(net.blocks(net.norm_pre(_placed(net, net.patch_embed(x)))))

    def _levels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the net's device."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images are {tuple(images.shape)} {images.dtype}: {self.name} takes uint8 (B, 1 or 3, H, W)"
            )
        return images.to(self.device).expand(-1, 3, -1, -1)

    def _viewed(self, images: Tensor, view: str) -> Tensor:
        """The short edge brought to what the view says, of the net's size or with more than it, whose centre is cut."""
        config, (scale, mode, cut) = self._config, VIEWS[view]
        edge = config["input_size"][-1]
        short = math.floor(edge / config["crop_pct"]) if scale is None else round(scale * edge)
        filtered = InterpolationMode(mode or config["interpolation"])
        scaled = resize(images, [short], filtered, antialias=True)
        return center_crop(scaled, [edge, edge]) if cut else scaled

    def _normal(self, images: Tensor) -> Tensor:
        config = self._config
        mean = torch.tensor(config["mean"], device=self.device)[:, None, None]
        std = torch.tensor(config["std"], device=self.device)[:, None, None]
        return (images.float() / 255 - mean) / std

    def _padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.pad(x, (0, -width % self.patch, 0, -height % self.patch))

    def _grid(self, tokens: Tensor, x: Tensor) -> Tensor:
        """(B, h w, D) -> (B, D, h, w)."""
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()

    @property
    def _config(self) -> dict[str, Any]:
        return resolve_model_data_config(self.net)


@contextmanager
def _kept(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What `module` hands on while the block runs."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda *call: kept.append(call[-1]))
    try:
        yield kept
    finally:
        hook.remove()


def load_vit(
    name: str,
    weights: str | Path | None = None,
    *,
    sha256: str | None = None,
    download: bool = False,
    saw_labels: bool | None = None,
    positions: Positions | None = None,
) -> FrozenViT:
    """timm's ViT `name`, such as vit_base_patch16_224.dino.

    Args:
        weights: a safetensors file or a torch file of tensors. By default `<name>.safetensors` or `.pth` in the folder
            that SELFGUIDE_WEIGHTS_DIR names, then the local hub cache. "random:SEED" draws them instead.
        sha256: what the file must have.
        download: whether the hub may be asked where no file is here.
        saw_labels: of the weights' training; by default False only for names known to be self-supervised.
        positions: "dino" or "timm", see `scaled_positions`; by default the code's that published the weights.

    Raises:
        UserError: an unknown name, no weights, another sha256, weights of another net or not finite, DINO's positions
            of a net that has none like DINO's.
    """
    full = _known(name)
    given = str(weights) if weights is not None else None
    seed = None
    if given is not None and given.startswith(RANDOM):
        text = given.removeprefix(RANDOM)
        if not text.isdigit():
            raise UserError(f"weights={given}: give a whole number as the seed, such as {RANDOM}0")
        seed = int(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        net: Any = timm.create_model(full, num_classes=0, dynamic_img_size=True)
    found = None
    if seed is None:
        file = _locate(full, given, download)
        found = storage.sha256(str(file))
        if sha256 is not None and found != sha256.lower():
            raise UserError(
                f"{file} has sha256 {found}, and {sha256} was asked for: get the file again, or correct the sha256"
            )
        tensors = {
            n: t for n, t in read_weights(file, str(file)).items() if not n.startswith(OF_HEAD)
        }
        put(net, checkpoint_filter_fn(tensors, net), str(file))
    elif sha256 is not None:
        raise UserError(f"sha256={sha256}: random weights come from no file; leave it out")
    if saw_labels is None:
        saw_labels = seed is None and not self_supervised(full)
    net.eval().requires_grad_(False)
    positions = positions or positions_of(full)
    own = net.pos_embed is not None and net.cls_token is not None and net.num_prefix_tokens == 1
    if positions == "dino" and not own:
        raise UserError(
            f"positions=dino: {full} has no positions of [CLS] and patches alone; take positions=timm"
        )
    return FrozenViT(
        net=net, name=full, sha256=found, seed=seed, saw_labels=saw_labels, positions=positions
    )


def positions_of(name: str) -> Positions:
    """Whose resampling the weights of that name were published with.

    DINO's (Caron et al. 2021), and DINOv2's without registers (Oquab et al. 2023); those with registers (Darcet et al.
    2023) are resampled as timm does, with antialiasing and no offset.
    """
    words = re.split(r"[._]", name.lower())
    registers = any(w.startswith("reg") for w in words)
    return "dino" if {"dino", "dinov2"} & set(words) and not registers else "timm"


def scaled_positions(own: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Positions (1, 1 + N, D) of [CLS] and a grid of `size` -> (1, 1 + h w, D) of another, as DINO's code has them.

    Bicubic without antialiasing, by the factor (h + 0.1) / H: the 0.1 was to save a rounding, and moves every position
    by up to a tenth of a patch. timm resamples by h / H and, where a grid shrinks, with antialiasing.
    """
    if size == grid:
        return own
    cls, patches = own[:, :1], own[:, 1:]
    factors = [(new + OFFSET) / old for new, old in zip(grid, size, strict=True)]
    lying = patches.transpose(1, 2).unflatten(2, size)  # (1, D, H, W)
    moved = F.interpolate(lying, scale_factor=factors, mode="bicubic")
    return torch.cat((cls, moved.flatten(2).transpose(1, 2)), dim=1)


def _placed(net: Any, x: Tensor) -> Tensor:
    """Patches (B, h, w, D) -> [CLS] and patches with their positions (B, 1 + h w, D)."""
    cls = net.cls_token.expand(len(x), -1, -1)
    tokens = torch.cat((cls, x.flatten(1, 2)), dim=1)
    grid = (x.shape[1], x.shape[2])
    return tokens + scaled_positions(net.pos_embed, net.patch_embed.grid_size, grid)


def self_supervised(name: str) -> bool:
    """Whether the name says that training saw no labels: a known method, and no fine-tuning."""
    words = re.split(r"[._]", name.lower())
    return "ft" not in words and any(w.startswith(SELF_SUPERVISED) for w in words)


def _known(name: str) -> str:
    """The architecture with its tag; timm names a default where the user names none."""
    family = timm.list_models(module="vision_transformer")
    architecture, _, tag = name.partition(".")
    if architecture not in family:
        raise UserError(
            f"vit={name!r} is not a vision transformer of timm {timm.__version__}{nearest(architecture, family)}"
        )
    tags = [n for n in timm.list_pretrained(f"{architecture}.*") if n.split(".")[0] == architecture]
    if tag and name not in tags:
        raise UserError(
            f"vit={name!r}: {architecture} has no weights {tag!r}{nearest(name, tags)}; "
            f"known: {', '.join(tags) or 'none'}"
        )
    if tag or not tags:
        return name
    default = get_pretrained_cfg(name)
    return f"{name}.{default.tag}" if default is not None and default.tag else name


def _locate(name: str, given: str | None, download: bool) -> Path:
    """The file of weights, in the one order of all weights that cannot be fetched everywhere."""
    if given is not None:
        file = Path(given).expanduser()
        if not file.is_file():
            raise UserError(f"weights={given}: no such file")
        return file
    folder = os.environ.get(FOLDER)
    if folder:
        for suffix in (".safetensors", ".pth"):
            file = Path(folder).expanduser() / f"{name}{suffix}"
            if file.is_file():
                return file
    published, where = get_pretrained_cfg(name), ""
    if published is not None and published.hf_hub_id:
        cached = from_hub_cache(published.hf_hub_id, HUB_FILES)
        if cached is not None:
            return cached
        if download:
            return Path(hf_hub_download(published.hf_hub_id, HUB_FILES[0]))
        where = f", have {published.hf_hub_id} in the local hub cache, or allow the download"
    raise UserError(
        f"no weights of {name}: give their file, put {name}.safetensors into the folder that {FOLDER} names{where}"
    )
