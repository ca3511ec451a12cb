"""Exact distributed Sinkhorn-Knopp: n all-reduces of one K-vector, and nothing else.

Cuturi 2013; as an assignment of features to prototypes, Caron et al. 2020 (SwAV, arXiv 2006.09882). Scaling by the
global prototype sums is invariant to any global factor, so the total mass, 1/K and 1/B cancel: no other collective is
needed, and unequal or empty batches on the ranks are exact as long as every rank calls.

The plan is diag(v) Q diag(u) with Q = exp(scores / epsilon): an iteration reads Q twice and changes only the K- and
B-vectors u and v (Cuturi's dual form); Q itself is scaled once, at the end. The log-domain form keeps ln u and ln v,
holds at any epsilon, and pays a second collective per iteration for the maximum.

Codes of scores that hold NaN or infinity are NaN: to raise here would make every step wait for the device. The loop's
watch over the loss finds them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# cosine scores spread over exp(2 / epsilon): below this epsilon that leaves fp32's range, and logarithms are kept
LEAST_EPSILON = 0.023

Group = dist.ProcessGroup | str | None


class Solution(NamedTuple):
    """codes (B, K), and which prototypes are dead (K,) bool; with stacked heads (H, B, K) and (H, K).

    Dead is a prototype so far from every sample of the global batch that its first mass is below the smallest number
    of the dtype beside the fullest one's. The plain form gives it nothing; the log-domain form its share all the same.
    """

    codes: Tensor
    dead: Tensor


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: Group = None,
    log_domain: bool | None = None,
) -> Tensor:
    """Codes whose rows sum to 1 and whose prototypes share the global batch evenly; see `solve`."""
    return solve(
        scores, epsilon=epsilon, iterations=iterations, group=group, log_domain=log_domain
    ).codes


@torch.no_grad()
def solve(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: Group = None,
    log_domain: bool | None = None,
) -> Solution:
    """Codes and dead prototypes, fp32, or fp64 of fp64 scores; also inside autocast.

    Args:
        scores: (B, K), this rank's part, or (H, B, K) of H heads solved at once with one collective for all; B may be
            0 and differ between ranks. The plain form takes scores of at most about 1, such as cosines.
        epsilon: entropy; SwAV's is 0.05.
        group: a process group, None for the default one where initialised, or "local" for this process alone.
        log_domain: for scores without a bound; None chooses it where epsilon < `LEAST_EPSILON`.

    Collectives: `iterations` sums of K (H x K) numbers in the working dtype; as many maxima too in the log domain.
    """
    if scores.dim() not in (2, 3) or epsilon <= 0 or iterations < 1:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)}, epsilon={epsilon}, iterations={iterations}"
        )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if log_domain is None:
        log_domain = epsilon < LEAST_EPSILON
    solver = _log_domain if log_domain else _plain
    # to switch off what is off would cost a small call dear
    if torch.is_autocast_enabled(scores.device.type):
        with torch.autocast(scores.device.type, enabled=False):
            return solver(scores, epsilon, iterations, group)
    return solver(scores, epsilon, iterations, group)


def _plain(scores: Tensor, epsilon: float, iterations: int, group: Group) -> Solution:
    # cosine scores are at most 1: subtracting that bound needs no collective and changes nothing
    q = (scores - 1.0).div_(epsilon).exp_()  # (..., B, K)
    tiny = torch.finfo(q.dtype).tiny
    v = q.new_ones(q.shape[:-1])  # (..., B)
    masses: list[Tensor] = []  # (..., K)
    for _ in range(iterations):
        mass = _reduced(_times(q.mT, v), dist.ReduceOp.SUM, group)
        # u and v are unique up to one factor, which grows as K / B with every iteration unless it is fixed
        masses.append(mass.div_(mass.amax(-1, keepdim=True).clamp_min_(tiny)).clamp_min_(tiny))
        u = mass.reciprocal()
        v = _times(q, u).clamp_min_(tiny).reciprocal_()
    return Solution(q.mul_(u.unsqueeze(-2)).mul_(v.unsqueeze(-1)), masses[0] <= tiny)


def _log_domain(scores: Tensor, epsilon: float, iterations: int, group: Group) -> Solution:
    # beside the best score of its row an entry that matters is near 0, where fp32 is finest
    top = scores.amax(-1, keepdim=True)
    logits = (scores - top).div_(epsilon)  # (..., B, K)
    f = top / epsilon  # (..., B, 1) ln v
    masses: list[Tensor] = []  # (..., K) -ln u
    for _ in range(iterations):
        if masses:
            f = -torch.logsumexp(logits - masses[-1].unsqueeze(-2), dim=-1, keepdim=True)
        mass = _log_mass(logits + f, group)
        masses.append(mass - mass.amax(-1, keepdim=True))  # the factor, as above
    codes = torch.softmax(logits - masses[-1].unsqueeze(-2), dim=-1)
    return Solution(codes, masses[0].exp() < torch.finfo(codes.dtype).tiny)


def _log_mass(terms: Tensor, group: Group) -> Tensor:
    """(..., B, K) -> (..., K): ln of the global sums of exp(terms), by a maximum and a sum over ranks."""
    *heads, count, groups = terms.shape
    top = terms.amax(-2) if count else terms.new_full((*heads, groups), -torch.inf)
    top = _reduced(top, dist.ReduceOp.MAX, group)
    rest = _reduced(terms.sub_(top.unsqueeze(-2)).exp_().sum(-2), dist.ReduceOp.SUM, group)
    return top + rest.log()


def _times(q: Tensor, x: Tensor) -> Tensor:
    """(M, N) by (N,) -> (M,); stacked heads one after the other, since a batched product may run in TF32 on GPUs."""
    if q.dim() == 2:
        return torch.mv(q, x)
    return torch.stack([torch.mv(matrix, vector) for matrix, vector in zip(q, x, strict=True)])


def _reduced(value: Tensor, how: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    """`value` over the ranks of `group`, in place."""
    if group != "local" and dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, op=how, group=None if group is None else group)  # type: ignore[arg-type]
    return value


class Queue:
    """This rank's recent features, whose scores under the present prototypes join a small batch (SwAV, section 4.1).

    `sinkhorn(torch.cat((scores, queue.rows() @ prototypes.T)))[:len(scores)]`, then `push`: the rows that joined
    get no loss. What is in a queue depends on the number of ranks, so codes with one do too, unlike those without.
    """

    def __init__(self, capacity: int, width: int, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: a queue holds 1 row or more")
        self.capacity = capacity
        self._rows = torch.empty(0, width, device=device)

    def push(self, features: Tensor) -> None:
        """(B, width) become the newest; the oldest beyond the capacity go.

        Rows that are not finite are kept as zeros, which resemble all prototypes alike: as they are, they would make
        all codes NaN, and with them every step, until they have gone.
        """
        recent = features.detach().to(self._rows)
        recent = torch.where(recent.isfinite().all(1, keepdim=True), recent, 0.0)
        self._rows = torch.cat((self._rows, recent))[-self.capacity :]

    def rows(self) -> Tensor:
        """(at most `capacity`, width) fp32, the oldest first."""
        return self._rows

    def saved_rows(self) -> Tensor:
        """A copy on the CPU, which `load_rows` takes to go on as if nothing had happened."""
        return self._rows.cpu().clone()

    def load_rows(self, rows: Tensor) -> None:
        """Takes the `saved_rows` of another queue; of a larger one only the newest."""
        if rows.dim() != 2 or rows.shape[1] != self._rows.shape[1]:
            raise ValueError(f"rows of shape {tuple(rows.shape)}, not (n, {self._rows.shape[1]})")
        self._rows = rows[-self.capacity :].to(self._rows, copy=True)
