"""Frozen networks of timm: what others' nets, with labels or without, see in an image.

Weights resolve in one order: explicit file, folder of weights, local hub cache, download only where allowed. Their
sha256 is always recorded, and compared where one is given. Published files of self-supervised methods are read by the
method's name (`selfguide.discovery.families`), which says what their images were like and that they saw no labels.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from selfguide.discovery.families import FAMILIES, Family
from selfguide.spec.suggest import check_known, nearest
from selfguide.spec.weight_files import FOLDER, HUB_FILES, from_hub_cache
from selfguide.weights import put, read_weights
from shards import storage
from shards.errors import UserError

RANDOM = "random:"  # in place of a file: weights drawn from the seed behind it, for tests
OF_HEAD = ("head.", "head_dist.")  # a ViT's classifiers stay behind: features are read before them
# of a safetensors file of ours, "yes" or "no": whether what it was made from saw labels
SAW_LABELS = "saw_labels"
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
class FrozenNet:
    """A net of timm in eval mode, fp32; every method takes uint8 images (B, 1 or 3, H, W) of levels 0..255."""

    net: Any
    name: str
    sha256: str | None  # of the file of weights; None where they are random
    seed: int | None  # of random weights
    saw_labels: bool
    # of its images, in place of what timm says: mean and std
    seen: Mapping[str, Any] = field(default_factory=dict)

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
        """The same of images of any size."""
        return self.provenance

    @property
    def pooling(self) -> str:
        """How it pools by default: a net that is no ViT has one way, which is its own."""
        return "own"

    @torch.no_grad()
    def pooled(self, images: Tensor, pooling: str = "own", view: str = "timm") -> Tensor:
        """(B, F) of images at the net's own size by one of `VIEWS`: what its classifier would read.

        Raises:
            UserError: another pooling than its own.
        """
        if pooling != "own":
            raise UserError(
                f"pooling={pooling}: {self.name} is no vision transformer and pools by itself; leave it out"
            )
        return self.net(self.normalised(self._viewed(self._levels(images), view)))

    def to(self, device: torch.device | str) -> Any:
        self.net.to(device)
        return self

    def _levels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the net's device."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images are {tuple(images.shape)} {images.dtype}: {self.name} takes uint8 (B, 1 or 3, H, W)"
            )
        return images.to(self.device).expand(-1, 3, -1, -1)

    def _viewed(self, images: Tensor, view: str) -> Tensor:
        """The short edge brought to what the view says, of the net's size or with more than it, whose centre is cut."""
        config, (scale, mode, cut) = self.config, VIEWS[view]
        edge = config["input_size"][-1]
        short = math.floor(edge / config["crop_pct"]) if scale is None else round(scale * edge)
        filtered = InterpolationMode(mode or config["interpolation"])
        scaled = resize(images, [short], filtered, antialias=True)
        return center_crop(scaled, [edge, edge]) if cut else scaled

    def normalised(self, images: Tensor) -> Tensor:
        """Levels 0..255 (B, 3, H, W) on the net's device, as it reads them."""
        config = self.config
        mean = torch.tensor(config["mean"], device=self.device)[:, None, None]
        std = torch.tensor(config["std"], device=self.device)[:, None, None]
        return (images.float() / 255 - mean) / std

    @property
    def config(self) -> dict[str, Any]:
        """How the net sees images: input_size, mean, std, interpolation, crop_pct."""
        return {**resolve_model_data_config(self.net), **self.seen}


def build(
    name: str,
    weights: str | Path | None = None,
    *,
    sha256: str | None = None,
    download: bool = False,
    saw_labels: bool | None = None,
    method: str | None = None,
    among: Sequence[str] | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What the fields of a `FrozenNet` are for timm's model `name`.

    Args:
        weights: a safetensors file or a torch file of tensors. By default `<name>.safetensors` or `.pth` in the folder
            that SELFGUIDE_WEIGHTS_DIR names, then the local hub cache. "random:SEED" draws them instead.
        sha256: what the file must have.
        download: whether the hub may be asked where no file is here.
        saw_labels: of the weights' training; by default what a file of ours says, or False for a method or a name that
            is known to be self-supervised.
        method: one of `FAMILIES`, whose published file `weights` is.
        among: the architectures that are taken, vision transformers; all of timm's by default.
        settings: of the model's constructor.

    Raises:
        UserError: an unknown name, no weights, another sha256, weights of another net or not finite.
    """
    family = _family(method, weights, name)
    full = _known(name, among) if method is None else f"{_architecture(name, among)}.{method}"
    given = str(weights) if weights is not None else None
    seed = _seed(given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        made = full if method is None else name
        net: Any = timm.create_model(made, num_classes=0, **settings)
    found = None
    if seed is None:
        file = _locate(full, given, download)
        found = storage.sha256(str(file))
        if sha256 is not None and found != sha256.lower():
            raise UserError(
                f"{file} has sha256 {found}, and {sha256} was asked for: get the file again, or correct the sha256"
            )
        read = read_weights(file, str(file)) if family is None else family.read(file)
        put(net, in_own_names(net, read), str(file))
        if saw_labels is None:
            saw_labels = _said(file)
    elif sha256 is not None:
        raise UserError(f"sha256={sha256}: random weights come from no file; leave it out")
    if saw_labels is None:
        saw_labels = seed is None and family is None and not self_supervised(full)
    net.eval().requires_grad_(False)
    return {
        "net": net,
        "name": full,
        "sha256": found,
        "seed": seed,
        "saw_labels": saw_labels,
        "seen": {} if family is None else {"mean": family.mean, "std": family.std},
    }


def load_any(name: str, weights: str | Path | None = None, **how: Any) -> FrozenNet:
    """timm's model `name` that is no vision transformer, such as resnet50.a1_in1k; see `build`."""
    return FrozenNet(**build(name, weights, **how))


def self_supervised(name: str) -> bool:
    """Whether the name says that training saw no labels: a known method, and no fine-tuning."""
    words = re.split(r"[._]", name.lower())
    return "ft" not in words and any(w.startswith(SELF_SUPERVISED) for w in words)


def _family(method: str | None, weights: str | Path | None, name: str) -> Family | None:
    if method is None:
        return None
    check_known("method", method, FAMILIES)
    if weights is None or str(weights).startswith(RANDOM):
        raise UserError(f"method={method}: it says whose file of weights is read; give the file")
    if "." in name:
        raise UserError(
            f"method={method} with {name}, which names weights already; give {name.partition('.')[0]} alone"
        )
    return FAMILIES[method]


def _seed(given: str | None) -> int | None:
    if given is None or not given.startswith(RANDOM):
        return None
    text = given.removeprefix(RANDOM)
    if not text.isdigit():
        raise UserError(f"weights={given}: give a whole number as the seed, such as {RANDOM}0")
    return int(text)


def in_own_names(net: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A published file's tensors by the names of timm's `net`, and without a classifier's."""
    classifier = net.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    vit = type(net).__module__.endswith("vision_transformer")
    behind = (*(f"{head}." for head in heads), *(OF_HEAD if vit else ()))
    tensors = {n: t for n, t in tensors.items() if not n.startswith(behind)}
    # how many batches were averaged, which is no weight and which some published files leave out
    own = net.state_dict()
    counters = {n: own[n] for n in own if n.endswith("num_batches_tracked") and n not in tensors}
    renamed = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    return {**(renamed(tensors, net) if renamed else tensors), **counters}


def _said(file: Path) -> bool | None:
    """What a file of ours says of whether it saw labels; None where it says nothing."""
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(str(file), "pt") as opened:
            said = (opened.metadata() or {}).get(SAW_LABELS)
    except (OSError, SafetensorError):  # of which `read_weights` says what is wrong
        return None
    return None if said is None else said == "yes"


def _architecture(name: str, among: Sequence[str] | None) -> str:
    architecture = name.partition(".")[0]
    if among is not None and architecture not in among:
        raise UserError(
            f"vit={name!r} is not a vision transformer of timm {timm.__version__}{nearest(architecture, among)}"
        )
    if not timm.is_model(architecture):
        raise UserError(
            f"net={name!r} is no model of timm {timm.__version__}{nearest(architecture, timm.list_models())}"
        )
    return architecture


def _known(name: str, among: Sequence[str] | None) -> str:
    """The architecture with its tag; timm names a default where the user names none."""
    architecture, tag = _architecture(name, among), name.partition(".")[2]
    tags = [n for n in timm.list_pretrained(f"{architecture}.*") if n.split(".")[0] == architecture]
    if tag and name not in tags:
        what = "net" if among is None else "vit"
        raise UserError(
            f"{what}={name!r}: {architecture} has no weights {tag!r}{nearest(name, tags)}; "
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
