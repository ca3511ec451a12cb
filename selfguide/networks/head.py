"""The online head: features -> unit vectors -> cosine scores against K prototypes (SGFM, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfguide.distributed import sum_over_ranks


class GlobalBatchNorm(nn.Module):
    """BatchNorm1d over the images of all ranks, by one all-reduce of sums.

    So the statistics depend neither on the world size nor on how many images a rank holds, none included.
    Statistics and buffers are fp32 in every engine.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, width: int, momentum: float = 0.1, eps: float = 1e-5, *, affine: bool = True
    ) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, *, by_batch: bool = False) -> Tensor:
        """(B, F) -> (B, F). With `by_batch` also in eval mode by what is measured of the batch, which is not kept."""
        wide = x.float()
        if self.training or by_batch:
            mean, var = self._measure(wide)
        else:
            mean, var = self.running_mean.float(), self.running_var.float()
        normal = (wide - mean) * torch.rsqrt(var + self.eps)
        if self.weight is not None and self.bias is not None:
            normal = normal * self.weight.float() + self.bias.float()
        return normal.to(x.dtype)

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over the global batch, (F,) each; running ones take the unbiased variance."""
        # shifting by the running mean keeps the one-pass variance from cancelling
        shifted = x - self.running_mean
        sums = torch.cat((shifted.sum(0), shifted.square().sum(0), x.new_full((1,), len(x))))
        sums = sum_over_ranks(sums)
        first, second, count = sums[: x.shape[1]], sums[x.shape[1] : -1], sums[-1]
        offset = first / count
        var = (second / count - offset.square()).clamp_min(0)
        mean = offset + self.running_mean
        if self.training:
            self._remember(self.running_mean, mean)
            self._remember(self.running_var, var * count / (count - 1).clamp_min(1))
        return mean, var

    @torch.no_grad()
    def _remember(self, kept: Tensor, seen: Tensor) -> None:
        # a step whose numbers are not finite is skipped, and must leave nothing that makes the next one so
        kept.lerp_(torch.where(seen.isfinite(), seen, kept), self.momentum)


class PrototypeHead(nn.Module):
    """Linear-BatchNorm-ReLU-Linear, then cosine with prototypes normalised in the forward.

    Never in place: ZeRO's masters would overwrite it.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        width: int,
        groups: int,
        *,
        condition: str = "unit",
        ids: str = "unit",
        gradient: str = "tangent",
        std: float | None = None,
    ) -> None:
        """Takes `condition`, `ids` and `gradient` from `OnlineGuidance`; `std` of the linear maps, None is torch's."""
        super().__init__()
        self._condition, self._ids, self._gradient = condition, ids, gradient
        self.hidden = nn.Linear(features, hidden)
        self.norm = GlobalBatchNorm(hidden)
        self.out = nn.Linear(hidden, width)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(groups, width), dim=1))
        if std is not None:
            for linear in (self.hidden, self.out):
                nn.init.trunc_normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> scores (B, K), fp32, of which the largest names the id; cosines, but with rows as they are."""
        rows = self.rows() if self._ids == "unit" else self.prototypes.float()
        return self.embed(features) @ rows.T

    def embed(self, features: Tensor) -> Tensor:
        """(B, F) -> unit vectors (B, P), fp32."""
        z = self.out(F.relu(self.norm(self.hidden(features.to(self.hidden.weight.dtype)))))
        return F.normalize(z.float(), dim=1)

    def rows(self) -> Tensor:
        """(K, P) unit prototypes, fp32; a plain gradient takes their length for given."""
        prototypes = self.prototypes.float()
        if self._gradient == "tangent":
            return F.normalize(prototypes, dim=1)
        return prototypes / prototypes.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)

    def condition_rows(self) -> Tensor:
        """(K, P) fp32: the condition that stands for each prototype; see `OnlineGuidance.condition_rows`."""
        return self.rows() if self._condition == "unit" else self.prototypes.float()
