"""How groups agree with human labels: for readers, never for training, so that groups stay label-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def agreement(labels: NDArray[Any], ids: NDArray[Any]) -> dict[str, float]:
    """NMI, ARI and AMI of (N,) labels and (N,) groups, whatever either are called.

    NMI is normalised by the mean of the entropies, as in scikit-learn; ARI and AMI are 0 for groups drawn at random.
    """
    from sklearn import metrics  # takes a second to import, and most commands compare nothing

    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, ids)),
        "ari": float(metrics.adjusted_rand_score(labels, ids)),
        "ami": float(metrics.adjusted_mutual_info_score(labels, ids)),
    }


@dataclass(frozen=True)
class Matched:
    """Which class each group is taken for, by its number, and the share of images whose class that is."""

    # of as many groups as there are classes at most, each for a class of its own (Kuhn 1955, the Hungarian method)
    one_to_one: dict[int, int]
    accuracy: float
    # every group for its most frequent class, which is how many groups are compared with few classes
    majority: dict[int, int]
    majority_accuracy: float


def matched(labels: NDArray[Any], ids: NDArray[Any]) -> Matched:
    """The best maps from (N,) groups to (N,) classes, both numbers from 0, after the fact."""
    from scipy.optimize import linear_sum_assignment

    classes, groups = int(labels.max()) + 1, int(ids.max()) + 1
    together = np.bincount(ids.astype(np.int64) * classes + labels, minlength=groups * classes)
    counts = together.reshape(groups, classes)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    most = counts.argmax(1)
    used = np.flatnonzero(counts.sum(1))
    return Matched(
        one_to_one=dict(zip(rows.tolist(), columns.tolist(), strict=True)),
        accuracy=float(counts[rows, columns].sum() / len(ids)),
        majority={int(group): int(most[group]) for group in used},
        majority_accuracy=float(counts.max(1).sum() / len(ids)),
    )


def with_classes(labels: NDArray[Any], ids: NDArray[Any]) -> dict[str, Any]:
    """`matched` as facts: both accuracies, and `classes`, the class of each group that has one to itself."""
    found = matched(labels, ids)
    return {
        "accuracy": found.accuracy,
        "majority_accuracy": found.majority_accuracy,
        "classes": found.one_to_one,
    }
