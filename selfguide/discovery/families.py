"""Published files of self-supervised methods: where in them the encoder is, and what its images were like.

Each of these trains an encoder that timm knows inside of a larger model, and publishes a checkpoint of that. A method's
name decides what of a file is read, under which names, and that no label was seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from selfguide.spec.pickled import unwrapped
from selfguide.weights import read_weights
from shards.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a method's published checkpoint is read."""

    # what holds the encoder's weights in it, best first
    containers: tuple[str, ...]
    # of the encoder's names there
    prefix: str = ""
    # what it has beside the encoder: projections, and tokens of training alone
    beside: tuple[str, ...] = ()
    # the encoder's names -> timm's
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    # of levels in [0, 1]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def read(self, file: Path) -> dict[str, Tensor]:
        """The encoder's tensors by timm's names; nothing that the file says is run.

        Raises:
            UserError: it cannot be read, or holds no encoder of this kind.
        """
        found = unwrapped(read_weights(file, str(file), containers=self.containers))
        # of several nets side by side only the encoder begins so; a file of it alone has no prefix
        own = {n: t for n, t in found.items() if n.startswith(self.prefix)} or found
        named = {n.removeprefix(self.prefix): t for n, t in own.items()}
        kept = {n: t for n, t in named.items() if not n.startswith(self.beside or (" ",))}
        if not kept:
            raise UserError(f"{file} holds no encoder under {', '.join(self.containers)}")
        return self.renamed(kept)


_STEM = {"0.0": "conv1", "0.1.0": "bn1"}
# of a bottleneck of SimCLR's: places in its sequence -> timm's names
_BOTTLENECK = {"0": "conv1", "1.0": "bn1", "2": "conv2", "3.0": "bn2", "4": "conv3", "5.0": "bn3"}
_PROJECTION = {"shortcut": "downsample.0", "bn.0": "downsample.1"}
_SIMCLR = re.compile(r"net\.(\d+)\.(?:blocks\.(\d+)\.)?(net|projection)?\.?(.+)\.(\w+)")


def _of_simclr(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SimCLRv2's ResNet without selective kernels, as it is converted from TensorFlow, in timm's names.

    Raises:
        UserError: a name that such a net has not.
    """
    if not any(name.startswith("net.") for name in tensors):  # named as torchvision's already
        return dict(tensors)
    return {_from_simclr(name): tensor for name, tensor in tensors.items()}


def _from_simclr(name: str) -> str:
    """net.2.blocks.1.net.2.weight -> layer2.1.conv2.weight."""
    found = _SIMCLR.fullmatch(name)
    if found is not None:
        stage, block, kind, place, what = found.groups()
        if block is None and f"{stage}.{place}" in _STEM:
            return f"{_STEM[f'{stage}.{place}']}.{what}"
        known = _PROJECTION if kind == "projection" else _BOTTLENECK
        if block is not None and place in known:
            return f"layer{stage}.{block}.{known[place]}.{what}"
    raise UserError(
        f"method=simclr: {name} is of no plain ResNet of SimCLRv2; take a file without selective kernels, such as "
        "r50_1x_sk0"
    )


FAMILIES = {
    # Caron et al. 2021, arXiv 2104.14294: the teacher of a full checkpoint, or the backbone alone
    "dino": Family(containers=("teacher", "state_dict"), prefix="backbone.", beside=("head.",)),
    # Zhou et al. 2022, arXiv 2111.07832
    "ibot": Family(
        containers=("teacher", "state_dict"), prefix="backbone.", beside=("head.", "masked_embed")
    ),
    # Chen et al. 2021, arXiv 2104.02057: ViTs and ResNets, with projections in place of their classifiers
    "mocov3": Family(containers=("state_dict",), prefix="base_encoder.", beside=("head.", "fc.")),
    # Assran et al. 2022, arXiv 2204.07141
    "msn": Family(containers=("target_encoder",), beside=("fc.",)),
    # Chen et al. 2020, arXiv 2006.10029, whose images are levels in [0, 1] as they are
    "simclr": Family(
        containers=("resnet", "state_dict"),
        beside=("fc.",),
        renamed=_of_simclr,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    ),
}
