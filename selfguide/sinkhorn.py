"""Exact distributed Sinkhorn-Knopp: n all-reduces of one K-vector, and nothing else.

Cuturi 2013; as an assignment of features to prototypes, Caron et al. 2020 (SwAV). Scaling by the global prototype
sums is invariant to any global factor, so the total mass, 1/K and 1/B cancel: no other collective is needed, and
unequal or empty batches on the ranks are exact as long as every rank calls.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: dist.ProcessGroup | str | None = None,
) -> Tensor:
    """Codes (B, K) whose rows sum to 1 and whose prototypes share the global batch evenly.

    Args:
        scores: (B, K), this rank's part; B may be 0 and differ between ranks. fp64 stays, all else becomes fp32.
        epsilon: entropy; of cosine scores at least 0.023, below which exp(-2 / epsilon) leaves fp32.
        group: a process group, None for the default one where initialised, or "local" for this process alone.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    with torch.autocast(scores.device.type, enabled=False):
        shared = group != "local" and dist.is_available() and dist.is_initialized()
        # cosine scores are at most 1: subtracting that bound needs no collective and changes nothing
        q = torch.exp((scores - 1.0) / epsilon)  # (B, K)
        tiny = torch.finfo(q.dtype).tiny
        for _ in range(iterations):
            mass = q.sum(0)  # (K,)
            if shared:
                dist.all_reduce(mass, group=None if group is None else group)  # type: ignore[arg-type]
            q = q / mass.clamp_min(tiny)
            q = q / q.sum(1, keepdim=True).clamp_min(tiny)
        return q
