"""Nearest neighbours in chunks: 50,000 by 50,000 distances without a matrix of that size.

Distances are Euclidean. Sums run in the features' own precision where that is float64, in float32 otherwise, by
differences of products as `torch.cdist` has it for wide features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.progress import Progress, silent

# rows of both sides that are compared at once: 256 MB of float32
CHUNK = 8192


def as_rows(features: NDArray | Tensor) -> Tensor:
    """(N, D) as a floating tensor, on the device where it is.

    Raises:
        ValueError: they have another shape, or numbers that are not finite.
    """
    rows = torch.as_tensor(features)
    if not rows.dtype.is_floating_point or rows.dtype.itemsize < 4:
        rows = rows.float()
    if rows.ndim != 2 or not bool(rows.isfinite().all()):
        raise ValueError(f"features must be finite and (N, D), found shape {tuple(rows.shape)}")
    return rows


def pair(a: NDArray | Tensor, b: NDArray | Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of features, of one width and precision, on the device of the first."""
    first, second = as_rows(a), as_rows(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of widths {first.shape[1]} and {second.shape[1]}")
    return first, second.to(first)


def tiles(
    a: Tensor, b: Tensor, chunk: int, progress: Progress = silent
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of `a`, rows of `b`, and the distances between them."""
    for i in range(0, len(a), chunk):
        for j in range(0, len(b), chunk):
            yield (
                slice(i, i + chunk),
                slice(j, j + chunk),
                torch.cdist(a[i : i + chunk], b[j : j + chunk]),
            )
            progress()


def smallest(
    a: Tensor, b: Tensor, k: int, *, chunk: int = CHUNK, progress: Progress = silent
) -> Tensor:
    """(N, k) the distances of each row of `a` to its k nearest rows of `b`, ascending.

    Raises:
        ValueError: `b` has fewer rows.
    """
    if len(b) < k:
        raise ValueError(f"{len(b)} features have no {k} nearest ones")
    found = torch.full((len(a), k), torch.inf, dtype=a.dtype, device=a.device)
    for rows, _, distances in tiles(a, b, chunk, progress):
        both = torch.cat((found[rows], distances), 1)
        found[rows] = both.topk(k, largest=False).values
    return found


def radii(features: Tensor, k: int, *, chunk: int = CHUNK, progress: Progress = silent) -> Tensor:
    """(N,) the distance of each row to the k-th nearest of the others."""
    return smallest(features, features, k + 1, chunk=chunk, progress=progress)[:, k]
