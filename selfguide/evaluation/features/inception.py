"""Inception v3 as the Frechet inception distance knows it: torchvision's, with the pools of the TensorFlow graph.

Its weights are those of 2015 with 1,008 classes, in the layout of pytorch-fid, torch-fidelity and torchmetrics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as blocks

SIZE = 299
WIDTH = 2048
SPATIAL_CHANNELS = 7  # of ADM's sFID (Nash et al. 2021 take them of an intermediate layer)
# of the graph, in order; pools stand between them
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1")
_LAYERS = (
    *_STEM,
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"),
    *("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def _mean_pool(x: Tensor) -> Tensor:
    """TensorFlow's average does not count what is padded."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(blocks.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), five, three, self.branch_pool(_mean_pool(x))]


class _C(blocks.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return [self.branch1x1(x), seven, twice, self.branch_pool(_mean_pool(x))]


class _E(blocks.InceptionE):
    def __init__(self, channels: int, conv_block: type[nn.Module] | None = None) -> None:
        super().__init__(channels, conv_block)
        self.last = channels == WIDTH

    def _forward(self, x: Tensor) -> list[Tensor]:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        # of the graph's last block, and of that one alone, the pool takes the largest
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else _mean_pool(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(three), self.branch3x3_2b(three)], 1),
            torch.cat([self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)], 1),
            self.branch_pool(pooled),
        ]


class Inception(blocks.Inception3):
    """Normalised images (B, 3, 299, 299) -> features (B, 2048) and spatial ones (B, 17 * 17 * 7)."""

    def __init__(self) -> None:
        parts = [blocks.BasicConv2d, _A, blocks.InceptionB, _C, blocks.InceptionD, _E]
        super().__init__(
            num_classes=1008,
            aux_logits=False,
            inception_blocks=[*parts, blocks.InceptionAux],
            init_weights=False,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spatial: list[Tensor] = []
        # the first branch of TensorFlow's mixed_6, behind its ReLU
        branch = self.Mixed_6d.branch1x1
        hook = branch.register_forward_hook(lambda *call: spatial.append(call[-1]))
        try:
            for name in _LAYERS:
                x = getattr(self, name)(x)
        finally:
            hook.remove()
        # rows, columns, channels, as ADM's statistics have them
        small = spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1), small

    def logits(self, features: Tensor) -> Tensor:
        """(B, 1008), without the bias: ADM's and torch-fidelity's Inception Score leaves it out."""
        return features.mm(self.fc.weight.T)


def with_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with BatchNorm's counters, which some files leave out and nothing reads in eval mode."""
    counters = {
        f"{name.removesuffix('running_var')}num_batches_tracked": torch.tensor(0)
        for name in tensors
        if name.endswith("running_var")
    }
    return counters | tensors
