"""Which images are in which group, and which stand for it: by a snapshot's prototypes, or in a sidecar of ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfguide.networks.head import PrototypeHead
from selfguide.sampling.condition_sampler import TrainingImages, conditions_each_patch
from selfguide.sampling.groups import features_of
from selfguide.snapshot import Snapshot
from shards import sidecar
from shards.cli import track
from shards.errors import UserError

NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Every group of a run or sidecar, and the images that stand for it, the best first."""

    p: NDArray[np.float64]  # (K,) share of each group
    ids: NDArray[np.int64]  # (N,) group of each image
    nearest: list[NDArray[np.int64]]  # K lists of ordinals
    closeness: list[NDArray[np.float64]]  # of these, by `measure`
    measure: str
    neighbours: list[
        list[tuple[int, float]]
    ]  # K lists of groups and their cosine; empty where unknown

    @property
    def order(self) -> list[int]:
        """Groups, the largest first."""
        return np.argsort(-self.p, kind="stable").tolist()


def of_snapshot(snapshot: Snapshot, count: int, batch: int = 256) -> Grouping:
    """Cosine of every training image with every prototype, as the head of the snapshot sees it.

    Raises:
        UserError: the snapshot has no prototypes, or one for each patch.
    """
    head = prototypes_of(snapshot)
    if conditions_each_patch(snapshot):
        raise UserError(
            "guidance.level=patch: this run's groups are of patches, and have no images of their own; an atlas needs a "
            "run with guidance.level=image"
        )
    known = len(head.prototypes)
    best = torch.full((0, known), -torch.inf)
    ordinals = torch.zeros(0, known, dtype=torch.int64)
    ids = []
    images = TrainingImages(snapshot)
    starts = range(0, images.count, batch)
    for start in track(starts, len(starts), "comparing images with prototypes"):
        index = torch.arange(start, min(start + batch, images.count))
        with torch.no_grad():  # in noise that depends on the ordinal only
            scores = head(features_of(snapshot, images.x0(index), index)).cpu()  # (B, K)
        ids.append(scores.argmax(1))
        both = torch.cat((best, scores))
        best, at = both.topk(min(count, len(both)), dim=0)
        ordinals = torch.cat((ordinals, index[:, None].expand(-1, known))).gather(0, at)
    groups = torch.cat(ids).numpy()
    rows = head.rows().cpu()
    p = snapshot.guidance["p"]
    counts = np.bincount(groups, minlength=known)
    return Grouping(
        p=counts / counts.sum() if p is None else np.asarray(p),
        ids=groups,
        nearest=list(ordinals.T.numpy()),
        closeness=list(best.T.double().numpy()),
        measure="cosine with the prototype",
        neighbours=_neighbours((rows @ rows.T).double().numpy()),
    )


def prototypes_of(snapshot: Snapshot) -> PrototypeHead:
    """The head whose prototypes are a snapshot's groups.

    Raises:
        UserError: it has none.
    """
    head = snapshot.student.head
    if head is None:
        raise UserError(
            f"guidance.source={snapshot.config.guidance.source} found no groups; name a run with guidance=online, or "
            "an annotation of kind id by --sidecar DIR"
        )
    return head


def check_ids(found: sidecar.Sidecar) -> None:
    """
    Raises:
        UserError: the annotation is of another kind than one group an image.
    """
    if found.kind != "id":
        raise UserError(f"{found.folder} holds {found.kind}; an atlas shows groups of kind id")


def of_sidecar(
    found: sidecar.Sidecar, count: int, features: sidecar.Sidecar | None = None
) -> Grouping:
    """Ids of an annotation; its images by confidence, by distance from the centroid, or by `features`.

    Raises:
        UserError: another kind of annotation, or nothing says which image stands for its group.
    """
    check_ids(found)
    ids, groups = np.asarray(found.rows()).astype(np.int64), int(found.groups or 0)
    means = None if features is None else _means(features, ids, groups)
    if "confidence" in found.more:
        closeness, sign, measure = np.asarray(found.column("confidence")), 1, "confidence"
    elif "distance" in found.more:
        closeness, sign, measure = np.asarray(found.column("distance")), -1, "squared distance"
    elif features is not None and means is not None:
        chunks = [((rows - means[ids[at]]) ** 2).sum(1) for at, rows in _chunks(features)]
        closeness, sign, measure = np.concatenate(chunks), -1, "squared distance"
    else:
        raise UserError(
            f"{found.folder} has no column of confidence or distance; give the features by --features DIR"
        )
    if means is None and "centroids.npy" in found.attached:
        means = np.load(found.folder / "centroids.npy")
    neighbours: list[list[tuple[int, float]]] = [[] for _ in range(groups)]
    if means is not None:
        unit = means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-12)
        neighbours = _neighbours(unit @ unit.T)
    by_group = np.lexsort((np.arange(len(ids)), -sign * closeness, ids))
    cuts = np.searchsorted(ids[by_group], np.arange(1, groups))
    nearest = [part[:count] for part in np.split(by_group, cuts)]
    return Grouping(
        p=np.bincount(ids, minlength=groups) / len(ids),
        ids=ids,
        nearest=nearest,
        closeness=[closeness[part].astype(np.float64) for part in nearest],
        measure=measure,
        neighbours=neighbours,
    )


def of_labels(labels: NDArray[np.int64], classes: int, count: int) -> Grouping:
    """The classes of the data as groups; the first images of each stand for it, for none is nearer than another."""
    nearest = [np.flatnonzero(labels == group)[:count] for group in range(classes)]
    return Grouping(
        p=np.bincount(labels, minlength=classes) / len(labels),
        ids=labels,
        nearest=nearest,
        closeness=[np.arange(len(part), dtype=np.float64) for part in nearest],
        measure="the first of the class",
        neighbours=[[] for _ in range(classes)],
    )


def _chunks(features: sidecar.Sidecar) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    rows = features.rows()
    for start in range(0, len(rows), 8192):
        part = slice(start, start + 8192)
        yield part, np.asarray(rows[part], dtype=np.float64)


def _means(features: sidecar.Sidecar, ids: NDArray[np.int64], groups: int) -> NDArray[Any]:
    """(K, P); zeros of an empty group."""
    if features.kind != "dense" or features.count != len(ids):
        raise UserError(
            f"{features.folder} holds {features.count} rows of kind {features.kind}; give {len(ids)} of kind dense"
        )
    sums = np.zeros((groups, features.shape[0]))
    for part, rows in _chunks(features):
        np.add.at(sums, ids[part], rows)
    return sums / np.bincount(ids, minlength=groups).clip(1)[:, None]


def _neighbours(cosines: NDArray[np.float64]) -> list[list[tuple[int, float]]]:
    """(K, K) -> the most similar other groups of each."""
    cosines = cosines.copy()
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(cosines) - 1)]
    return [[(int(j), float(cosines[i, j])) for j in row] for i, row in enumerate(nearest)]
