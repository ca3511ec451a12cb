"""The feature nets of `fd_digits` and `fd_digits_odd`: small classifiers of handwritten digits, fitted in the open.

`python -m tools.digitnet` fits one on a fixed half of scikit-learn's digits and writes the weights that lie beside
this file; scores taken with it are named after it. It stands where no Inception weights can be fetched. The nets have
no scan in common: what was chosen by a score in one can be reported in the other.
"""

from __future__ import annotations

import hashlib
from importlib import resources

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

# of each net, by the half of the scans that fitted it
WEIGHTS = {"even": "digitnet.safetensors", "odd": "digitnet-odd.safetensors"}
# of each protocol
FITTED_ON = {"fd_digits": "even", "fd_digits_odd": "odd"}
TOP = 16  # grey levels of the scans are 0..16


class DigitNet(nn.Module):
    """uint8 (B, 1, 8, 8) with levels 0..16 -> logits (B, 10) over features (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, 32, 3, padding=1)
        self.wide = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.classify = nn.Linear(64, 10)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 64), before the last non-linearity: closer to Gaussian than behind it."""
        x = pixels.float() / TOP
        x = F.max_pool2d(F.relu(self.wide(F.relu(self.near(x)))), 2)
        return self.hidden(x.flatten(1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classify(F.relu(self.features(pixels)))


def half(count: int) -> tuple[Tensor, Tensor]:
    """Ordinals of the fixed halves, even and odd: one fits a net, the other one tests it."""
    ordinals = torch.arange(count)
    return ordinals[0::2], ordinals[1::2]


def load_digitnet(protocol: str = "fd_digits") -> tuple[DigitNet, str]:
    """The committed net of a protocol in eval mode, and the sha256 of its weights."""
    package = resources.files("selfguide.evaluation.features")
    data = package.joinpath("weights", WEIGHTS[FITTED_ON[protocol]]).read_bytes()
    net = DigitNet()
    net.load_state_dict(load(data))
    return net.eval().requires_grad_(False), hashlib.sha256(data).hexdigest()


@torch.no_grad()
def embed(net: DigitNet, pixels: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Features (N, 64) and class probabilities (N, 10) of uint8 images (N, 1, 8, 8)."""
    parts = [net.features(part) for part in pixels.split(batch)]
    features = torch.cat(parts)
    return features, F.softmax(net.classify(F.relu(features)), dim=1)
