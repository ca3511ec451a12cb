"""How groups agree with human labels: for readers, never for training, so that groups stay label-free."""

from __future__ import annotations

from typing import Any

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
