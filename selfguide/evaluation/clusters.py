"""Which cluster each training image and each sample is in, for a Frechet distance within clusters.

A model that is conditioned on one group an image has its own clusters. One that is conditioned on rows of training
images, such as layouts, features or several groups, has those of the rows: their group where they hold a single one,
or k-means of what else they hold. A sample is in the cluster of the row that it is drawn for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from selfguide.diffusion.conditions import Condition
from selfguide.evaluation.progress import Progress, reported, silent
from selfguide.sampling.condition_sampler import (
    ConditionSampler,
    clusters_of,
    drawn_groups,
    sample_ordinals,
    samples_training_rows,
    training_rows,
)
from selfguide.snapshot import Snapshot
from selfguide.spec.config import EvaluationConfig
from shards.errors import UserError

# a layout is compared on so many by so many cells
CELLS = 8

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Clusters (N,) of some training images, and of samples by their seeds (B,)."""

    real: Ids
    made: Callable[[Tensor], Ids]


def clustering(
    snapshot: Snapshot, evaluation: EvaluationConfig, ordinals: Tensor, progress: Progress = silent
) -> Clustering:
    """The clusters of the training images at `ordinals` (N,), and how those of samples follow from their seeds.

    Raises:
        UserError: the snapshot has no clusters, fewer images than them, or its images or sidecars are gone.
    """
    parts = ordinals.split(evaluation.batch)
    if not samples_training_rows(snapshot):
        p, prior = snapshot.guidance["p"], evaluation.prior
        found = [clusters_of(snapshot, part).cpu().numpy() for part in reported(parts, progress)]
        return Clustering(
            real=np.concatenate(found),
            made=lambda seeds: drawn_groups(p, prior, seeds).numpy(),
        )
    total, rows = training_rows(snapshot)
    wanted = evaluation.cluster_count
    name = _groups(rows) if wanted is None else _nearest(rows, parts, wanted)

    def made(seeds: Tensor) -> Ids:
        ordinals = sample_ordinals(total, seeds)
        return np.concatenate([name(part) for part in ordinals.split(evaluation.batch)])

    return Clustering(real=np.concatenate([name(part) for part in parts]), made=made)


def _groups(rows: ConditionSampler) -> Callable[[Tensor], Ids]:
    def name(ordinals: Tensor) -> Ids:
        ids = rows(ordinals).id
        if ids is None:
            raise UserError(
                "evaluation.metrics: cluster_fd: this snapshot is conditioned on rows without a single group; give "
                "evaluation.cluster_count=100, the number of clusters that k-means makes of them"
            )
        return ids.cpu().numpy()

    return name


def _nearest(
    rows: ConditionSampler, parts: tuple[Tensor, ...], wanted: int
) -> Callable[[Tensor], Ids]:
    """The nearest of so many centres, which are fitted to the rows of these images."""
    fitted = np.concatenate([_vectors(rows(part)) for part in parts])
    if wanted > len(fitted):
        raise UserError(
            f"evaluation.cluster_count={wanted} clusters of {len(fitted)} images: give fewer, or more by "
            "evaluation.kept"
        )
    # which takes seconds to import, and most snapshots have their clusters
    from sklearn.cluster import KMeans

    found = KMeans(wanted, n_init=1, random_state=0).fit(fitted)
    return lambda ordinals: found.predict(_vectors(rows(ordinals))).astype(np.int64)


def _vectors(condition: Condition) -> NDArray[np.float64]:
    """(B, V) of rows without their single group: each of their fields at unit length, side by side."""
    found = []
    for name, value in condition.given.items():
        if name == "spatial":
            value = adaptive_avg_pool2d(value.float(), min(CELLS, *value.shape[-2:]))
        elif name == "patch":
            value = value.mean(1)
        if name != "id":
            found.append(normalize(value.flatten(1).double()))
    return torch.cat(found, 1).cpu().numpy()
