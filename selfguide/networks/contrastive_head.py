"""The heads of contrastive self-distillation: MoCo v3's projector and predictor, fed the noise-time.

Chen et al. 2021 (MoCo v3, arXiv 2104.02057) put a projector of three layers and a predictor of two behind a ViT, with a
BatchNorm after each, the last ones without scale and bias. Features of a denoiser depend on how noisy its input is, so
DDAE++ (Xiang et al. 2025, arXiv 2505.10999, section 4.2) makes the projector time-dependent. It does not say how: ours
is scaled and shifted behind its first layer by what a time embedding says, which begins as no change.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.models.backbone import Backbone, pool
from selfguide.models.blocks import TimeEmbedding, time_input
from selfguide.networks.branch import Branch
from selfguide.networks.head import GlobalBatchNorm
from selfguide.spec.architecture import Architecture
from selfguide.spec.config.contrastive import TIME_FREQUENCIES, ContrastiveConfig


class ContrastiveHead(Branch):
    """Queries of the student, and keys where it is the teacher's."""

    def __init__(self, settings: ContrastiveConfig, net: Architecture) -> None:
        """`net` is the backbone whose layer `settings` name."""
        super().__init__(settings.number(net))
        layer, hidden, width = net.layers[self.layer - 1], settings.hidden, settings.width
        self.net, self.extras = net, layer.extras
        self.pooling = "cls" if settings.feature == "cls" else "mean"
        self.first = _Layer(layer.width, hidden)
        self.time = _Modulation(layer.width, hidden) if settings.head == "time" else None
        self.projector = nn.ModuleList((_Layer(hidden, hidden), _Layer(hidden, width, last=True)))
        self.predictor = nn.ModuleList((_Layer(width, hidden), _Layer(hidden, width, last=True)))

    def forward(self, tokens: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """Queries (B, P)."""
        hidden, out = self.predictor
        return out(F.relu(hidden(self._project(tokens, tau))))

    def target(self, backbone: Backbone, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """Keys (B, P): without the predictor, and normalised by their own batch, as in MoCo v3's momentum encoder."""
        tokens = backbone.features(x, tau, condition, self.layer)
        return self._project(tokens, tau, by_batch=True)

    def _project(self, tokens: Tensor, tau: Tensor, *, by_batch: bool = False) -> Tensor:
        h = self.first(pool(tokens, self.pooling, self.extras), by_batch=by_batch)
        if self.time is not None:
            fed = time_input(self.net.time, tau, whole=self.net.whole_index)
            scale, shift = self.time(fed).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        hidden, out = self.projector
        return out(F.relu(hidden(F.relu(h), by_batch=by_batch)), by_batch=by_batch)


class _Layer(nn.Module):
    """A linear map without bias, and BatchNorm."""

    def __init__(self, fan_in: int, width: int, *, last: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(fan_in, width, bias=False)
        self.norm = GlobalBatchNorm(width, affine=not last)

    def forward(self, x: Tensor, *, by_batch: bool = False) -> Tensor:
        return self.norm(self.map(x), by_batch=by_batch)


class _Modulation(nn.Module):
    """A time as the network is fed it (B,) -> scales and shifts (B, 2 `hidden`), of zeros at first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = TimeEmbedding(TIME_FREQUENCIES, width)
        self.out = nn.Linear(width, 2 * hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, time: Tensor) -> Tensor:
        return self.out(F.silu(self.embedding(time)))
