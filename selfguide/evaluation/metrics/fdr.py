"""Frechet distance ratio: distances in several feature nets on one scale, that of what real images reach."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def fdr(distances: Mapping[str, float], validation: Mapping[str, float]) -> float:
    """Mean over named nets of a model's distance over the validation set's, both to the training set.

    A model as near to the training set as unseen real images are has 1; no net counts more than another.

    Raises:
        ValueError: the two name other nets, or none, or a validation distance is not above 0.
    """
    if not distances or distances.keys() != validation.keys():
        named = f"{sorted(distances)} and {sorted(validation)}"
        raise ValueError(f"distances and those of the validation set are in other nets: {named}")
    if bad := [net for net, value in validation.items() if not value > 0]:
        raise ValueError(f"the validation set's distance is not above 0 in {', '.join(bad)}")
    return float(np.mean([distances[net] / validation[net] for net in sorted(distances)]))
