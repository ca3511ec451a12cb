"""What the distributed Sinkhorn costs: ours against SwAV's form and against gathering all scores on every rank.

The baselines are written plainly from what is published. SwAV (Caron et al. 2020, arXiv 2006.09882, appendix A; its
distributed form) scales a transposed plan in place and sums the total mass over ranks first: n + 1 collectives, equal
shards only. Gathering moves B x K numbers once and then needs no other collective, but every rank solves all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.distributed import RankInfo
from selfguide.sinkhorn import sinkhorn
from tools.bench.harness import Row, Variant, measure
from tools.ranks import run_ranks

BATCHES, GROUPS, WORLDS = (256, 1024), (300, 3000, 10_000), (1, 2, 4)
EPSILON, ITERATIONS = 0.05, 3
TITLE = (
    "sinkhorn: 3 iterations, epsilon 0.05, fp32, global batch B, K prototypes, W gloo ranks of one thread each; "
    "base ours, so gathering or SwAV's form wins where it says faster; more ranks than cores take turns"
)


def swav(scores: Tensor) -> Tensor:
    """(B, K) of equal shards -> codes, as SwAV has it."""
    world = dist.get_world_size()
    q = torch.exp(scores / EPSILON).T  # (K, B)
    groups, count = q.shape[0], q.shape[1] * world
    total = q.sum()
    dist.all_reduce(total)
    q /= total
    for _ in range(ITERATIONS):
        mass = q.sum(1, keepdim=True)
        dist.all_reduce(mass)
        q /= mass
        q /= groups
        q /= q.sum(0, keepdim=True)
        q /= count
    q *= count
    return q.T


def gathered(scores: Tensor) -> Tensor:
    """(B, K) of equal shards -> codes: the whole problem solved on every rank, of which each keeps its rows."""
    everywhere = [torch.empty_like(scores) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, scores)
    codes = sinkhorn(torch.cat(everywhere), epsilon=EPSILON, iterations=ITERATIONS, group="local")
    return codes[dist.get_rank() * len(scores) :][: len(scores)]


def ours(scores: Tensor) -> Tensor:
    return sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": ours,
    "SwAV's form": swav,
    "gathering": gathered,
}


def suite(repeats: int) -> list[Row]:
    return [row for world in WORLDS for row in run_ranks(world, _timed, repeats, on_cpu=True)[0]]


def _timed(rank_info: RankInfo, repeats: int) -> list[Row]:
    rows = []
    for batch, groups in itertools.product(BATCHES, GROUPS):
        scores = cosines(batch // rank_info.world, groups, seed=rank_info.rank)
        where = f"B={batch} K={groups} W={rank_info.world}"
        units = max(1, 4_000_000 // (batch * groups))  # small problems take less than a clock sees
        variants = [
            Variant(f"{where}: {name}", partial(_repeat, form, scores, units))
            for name, form in FORMS.items()
        ]
        rows += measure(variants, repeats=repeats, units=units, fence=dist.barrier)
    return rows


def _repeat(form: Callable[[Tensor], Tensor], scores: Tensor, times: int) -> None:
    for _ in range(times):
        form(scores)


def cosines(count: int, groups: int, seed: int, width: int = 128) -> Tensor:
    """(count, groups) scores of random features, other ones for each seed, against the same random prototypes."""
    generator = torch.Generator()
    prototypes = torch.randn(groups, width, generator=generator.manual_seed(2**32))
    features = torch.randn(count, width, generator=generator.manual_seed(seed))
    return torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(prototypes).T
