"""Groups by k-means: offline guidance as SGDM finds it (Hu et al. 2023, arXiv 2210.06462, section 3.2).

Fit and assignment see the same features, L2-normalised unless that is switched off, all of them. SGDM's code fits
normalised features and assigns others (`assigned="raw"`), of no more than 256 samples a group (`per_group=256`, faiss's
own), once (`restarts=1`).

Two engines from the same beginnings: `kmeans` is faiss's, on the GPUs where it has them; `lloyd` is Lloyd's iteration
(Lloyd 1982) over rows that lie on several ranks, for features that no host can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import faiss
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from selfguide.discovery.agreement import agreement
from shards import cli
from shards.errors import UserError

ROWS = 8192  # assigned at once
TOGETHER = 5  # iterations of faiss between looks at whether anything still moves
Rows = NDArray[np.generic]
Assigned = Literal["unit", "raw"]  # features that are assigned, where unit ones were fitted


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Where the groups are, and which of them each sample is nearest to."""

    centroids: NDArray[
        np.float32
    ]  # (K, F), in the space that was fitted: of unit features by default
    ids: NDArray[np.int32]  # (n,) of the rows given
    distance: NDArray[np.float32]  # (n,) from the centroid, squared
    sizes: NDArray[np.int64]  # (K,) samples of each group, on all ranks
    inertia: float  # sum of `distance`, over all ranks
    iterations: int  # until nothing changed, or as many as were allowed


def kmeans(
    features: Rows,
    groups: int,
    *,
    seed: int = 0,
    iterations: int = 30,
    restarts: int = 3,
    spherical: bool = False,
    normalise: bool = True,
    assigned: Assigned = "unit",
    per_group: int | None = None,
) -> Groups:
    """The lowest inertia of `restarts` fits by faiss to features (N, F), which may be memory-mapped.

    Each begins with `groups` samples drawn by (seed, restart); a group that is empty splits another. `spherical` keeps
    the centroids on the unit sphere, where the features are.

    Args:
        assigned: "raw" assigns features as they are to centroids of unit ones.
        per_group: samples a group that a fit sees at most, drawn by (seed, restart); None is all.

    Raises:
        UserError: more groups than samples, settings below 1, spherical groups of features that are not normalised, or
            features to be assigned raw that are so already.
    """
    check(len(features), groups, iterations, restarts, spherical, normalise)
    if per_group is not None and per_group < 1:
        raise UserError(f"per_group={per_group}: take 1 or more")
    if assigned == "raw" and not normalise:
        raise UserError("features that are not normalised are assigned raw already: leave it out")
    every = prepared(features, normalise)
    others = prepared(features, False) if assigned == "raw" else every

    def one(restart: int) -> Groups:
        rows = every
        if per_group is not None and per_group * groups < len(every):
            drawn = np.random.default_rng((seed, restart, 1))
            rows = every[drawn.choice(len(every), per_group * groups, replace=False)]
        centroids, done = rows[beginning(len(rows), groups, seed, restart)], 0
        while done < iterations:
            together = min(TOGETHER, iterations - done)
            moved = _faiss(rows, centroids, together, spherical)
            still, centroids, done = np.array_equal(moved, centroids), moved, done + together
            if still:
                break
        return replace(_assigned(others, centroids), iterations=done)

    fits = map(one, cli.track(range(restarts), restarts, f"{restarts} times k-means"))
    return min(fits, key=lambda found: found.inertia)


def check(
    samples: int, groups: int, iterations: int, restarts: int, spherical: bool, normalise: bool
) -> None:
    """Returns when a fit to so many samples can have these settings.

    Raises:
        UserError: settings that no fit has; names the setting, its value and the cure.
    """
    if not 1 <= groups <= samples:
        raise UserError(f"groups={groups} of {samples:,} samples: take 1 to {samples}")
    for name, value in {"iterations": iterations, "restarts": restarts}.items():
        if value < 1:
            raise UserError(f"{name}={value}: take 1 or more")
    if spherical and not normalise:
        raise UserError(
            "spherical groups lie on the unit sphere, and these features do not: normalise them"
        )


def beginning(samples: int, groups: int, seed: int, restart: int) -> NDArray[np.int64]:
    """(K,) ordinals of the samples that a fit begins with: as faiss, distinct ones, evenly drawn."""
    return np.random.default_rng((seed, restart)).choice(samples, groups, replace=False)


def prepared(features: Rows, normalise: bool) -> NDArray[np.float32]:
    """fp32 and, with `normalise`, of unit length; a row of zeros stays."""
    rows = np.array(features, dtype=np.float32, order="C")  # a copy: it is divided in place
    if normalise:
        for start in range(0, len(rows), ROWS):
            piece = rows[start : start + ROWS]
            lengths = np.linalg.norm(piece, axis=1, keepdims=True)
            np.divide(piece, np.maximum(lengths, np.finfo(np.float32).tiny), out=piece)
    return rows


def _faiss(
    rows: NDArray[np.float32], centroids: NDArray[np.float32], iterations: int, spherical: bool
) -> NDArray[np.float32]:
    """Centroids after so many iterations."""
    groups, width = centroids.shape
    fit = faiss.Kmeans(
        width,
        groups,
        niter=iterations,
        spherical=spherical,
        gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),  # all samples: faiss draws some where there are more
    )
    fit.train(rows, init_centroids=np.ascontiguousarray(centroids))
    return np.asarray(fit.centroids)


def _assigned(rows: NDArray[np.float32], centroids: NDArray[np.float32]) -> Groups:
    index: Any = faiss.IndexFlatL2(centroids.shape[1])
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(centroids)
    distance, ids = index.search(rows, 1)
    distance = np.maximum(distance[:, 0], 0)
    return Groups(
        centroids=centroids,
        ids=ids[:, 0].astype(np.int32),
        distance=distance,
        sizes=np.bincount(ids[:, 0], minlength=len(centroids)),
        inertia=float(distance.sum(dtype=np.float64)),
        iterations=0,
    )


def lloyd(
    shard: Rows,
    initial: Rows,
    *,
    iterations: int = 30,
    spherical: bool = False,
    normalise: bool = False,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> Groups:
    """Lloyd's iteration over the rows of all ranks; this one holds `shard` (n, F), maybe none, and gets its ids.

    All ranks begin at the same `initial` (K, F). An iteration is one all-reduce of K (F + 1) + 2 sums in fp64, so the
    result is one process's up to rounding. Empty groups move to the samples farthest from their centroids, as
    scikit-learn's do; only then ranks exchange single samples. Rows may be memory-mapped: they are read piece by
    piece, in fp64 if they are fp64.
    """
    wide = shard.dtype == np.float64
    work = _Lloyd(
        shard, torch.float64 if wide else torch.float32, normalise, torch.device(device), group
    )
    centroids = torch.from_numpy(np.array(initial, dtype=np.float64)).to(device)
    ids = torch.full((len(shard),), -1, dtype=torch.int64)
    done = 0
    for done in range(1, iterations + 1):  # noqa: B007 - counts
        found = work.assign(centroids, ids)
        ids = found.ids
        if not found.changed:
            break
        centroids = work.means(found, centroids)
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    found = work.assign(centroids, ids)
    return Groups(
        centroids=centroids.float().cpu().numpy(),
        ids=found.ids.numpy().astype(np.int32),
        distance=found.distance.float().numpy(),
        sizes=found.counts.long().cpu().numpy(),
        inertia=found.inertia,
        iterations=done,
    )


@dataclass(frozen=True, eq=False)
class _Assignment:
    """Of this rank's rows; `sums` (K, F), `counts` (K,), `inertia` and `changed` are of all ranks."""

    ids: Tensor
    distance: Tensor
    sums: Tensor
    counts: Tensor
    inertia: float
    changed: int


@dataclass(frozen=True, eq=False)
class _Lloyd:
    """One rank's part of the iteration."""

    shard: Rows
    dtype: torch.dtype
    normalise: bool
    device: torch.device
    group: Any

    def assign(self, centroids: Tensor, before: Tensor) -> _Assignment:
        """Nearest centroids, of equally near ones the first, and the sums over all ranks."""
        groups, width = centroids.shape
        near = centroids.to(self.dtype)
        total = torch.zeros(groups * (width + 1) + 2, dtype=torch.float64, device=self.device)
        sums, counts = total[: groups * width].view(groups, width), total[groups * width : -2]
        ids, distance = torch.empty_like(before), torch.empty(len(before), dtype=torch.float64)
        for start in range(0, len(before), ROWS):
            rows = self._rows(start, ROWS)
            # |x|^2 is the same for all centroids
            here = (near.square().sum(1) - 2 * rows @ near.T).argmin(1)
            away = (rows.double() - centroids[here]).square().sum(1)
            sums.index_add_(0, here, rows.double())
            counts.index_add_(0, here, torch.ones_like(away))
            ids[start : start + ROWS] = here.cpu()
            distance[start : start + ROWS] = away.cpu()
        total[-2], total[-1] = distance.sum(), (ids != before).sum()
        if dist.is_initialized():
            dist.all_reduce(total, group=self.group)
        return _Assignment(ids, distance, sums, counts, float(total[-2]), int(total[-1]))

    def means(self, found: _Assignment, before: Tensor) -> Tensor:
        """(K, F) fp64; empty groups take the farthest samples, which leave their own groups."""
        sums, counts = found.sums.clone(), found.counts.clone()
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far = self._farthest(found, len(empty))  # (E, 2 + F): distance, group, sample
            for group, row in zip(empty.tolist(), far, strict=True):
                old = int(row[1])
                if (
                    row[0] <= 0 or counts[old] <= 1
                ):  # fewer samples than groups, copies counted once
                    continue
                sums[old] -= row[2:]
                counts[old] -= 1
                sums[group], counts[group] = row[2:], 1
        held = counts[:, None] > 0
        return torch.where(held, sums / counts[:, None].clamp_min(1), before)

    def _farthest(self, found: _Assignment, count: int) -> Tensor:
        """The samples of all ranks farthest from their centroids, farthest first, of equally far ones the first."""
        order = torch.argsort(found.distance, descending=True, stable=True)[:count]
        mine = torch.full((count, 2 + found.sums.shape[1]), -1.0, dtype=torch.float64)
        for place, row in enumerate(order.tolist()):
            sample = self._rows(row, 1)[0].double().cpu()
            mine[place] = torch.cat((found.distance[row, None], found.ids[row, None], sample))
        if dist.is_initialized():
            mine = mine.to(self.device)
            gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(gathered, mine, group=self.group)
            mine = torch.cat(gathered).cpu()
        best = torch.argsort(mine[:, 0], descending=True, stable=True)[:count]
        return mine[best].to(self.device)

    def _rows(self, start: int, count: int) -> Tensor:
        """A piece of the shard, as it is compared."""
        piece = np.array(self.shard[start : start + count])  # torch wants arrays of its own
        rows = torch.from_numpy(piece).to(self.device, self.dtype)
        return torch.nn.functional.normalize(rows, dim=1) if self.normalise else rows


def report(found: Groups, labels: NDArray[np.integer] | None = None) -> dict[str, float]:
    """How good groups are: how tight, how many in use and, where labels exist, how they agree with these."""
    said = {
        "inertia": found.inertia,
        "utilisation": float((found.sizes > 0).mean()),
        "largest": float(found.sizes.max() / found.sizes.sum()),
        "smallest": float(found.sizes.min() / found.sizes.sum()),
    }
    return said if labels is None else said | agreement(labels, found.ids)
