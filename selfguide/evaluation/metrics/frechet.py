"""Frechet distance between Gaussians fitted to features, in float64, with its sampling error and bias.

Heusel et al. 2017, equation 6. The square root's trace comes from eigenvalues of a symmetric product, never from
`scipy.linalg.sqrtm`: that one is slow, was wrong near singular matrices, and changed its signature.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import lapack

from selfguide.evaluation.metrics.moments import Array, Moments
from shards.errors import UserError
from shards.sources.arrays import members, read_array

# of a score without a block of its jackknife
_WITHOUT = "without_block_"


@dataclass(frozen=True, eq=False)
class Reference:
    """What sets are compared with: mean (D,), covariance (D, D), and that one's square root, computed once."""

    mean: Array
    covariance: Array
    root: Array
    # features behind it, where that is known
    count: int | None = None
    # what it was made of and how, as JSON: feature net, resize, data set
    about: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(moments: Moments, about: Mapping[str, Any] | None = None) -> Reference:
        mean, covariance = moments.gaussian()
        return Reference(mean, covariance, square_root(covariance), moments.count, about or {})

    @staticmethod
    def load(path: Path, *, spatial: bool = False) -> Reference:
        """From a .npz with `mu` and `sigma`: ADM's, clean-fid's, anybody's, or what `save` wrote.

        Args:
            spatial: read ADM's `mu_s` and `sigma_s`, of its sFID, instead. ADM's sample images are not read.

        Raises:
            UserError: the file holds no such arrays, pickled ones, or what is no mean and covariance.
        """
        names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
        wanted = (*names, "count", "about") if spatial else (*names, "sqrt", "count", "about")
        try:
            there = members(str(path))
            found = {name: read_array(str(path), name) for name in wanted if name in there}
            about = json.loads(str(found.get("about", "{}")))
            if not isinstance(about, dict):
                raise ValueError(f"its `about` is {about}")
            count = int(found["count"].item()) if "count" in found else None
        except (UserError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is no reference: {error}") from error
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{path} is no reference: it holds no array {' or '.join(missing)}")
        for name in {*names, "sqrt"} & found.keys():
            if found[name].dtype.kind not in "fiu":
                raise UserError(f"{path} is no reference: its {name} is {found[name].dtype}")
        mean, covariance = (np.asarray(found[name], dtype=np.float64) for name in names)
        _check(mean, covariance, path)
        kept = found.get("sqrt")
        root = square_root(covariance) if kept is None else np.asarray(kept, dtype=np.float64)
        # not so where a file was put together from several, or sigma has negative eigenvalues
        if root.shape != covariance.shape or not np.allclose(
            root @ root, covariance, rtol=0, atol=1e-8 * np.trace(covariance)
        ):
            raise UserError(f"{path} is no reference: its sigma has no such square root")
        return Reference(mean, covariance, root, count, about)

    def save(self, path: Path) -> None:
        """Writes `mu`, `sigma`, `sqrt`, `count` and `about`, which others read as a plain `mu, sigma` file."""
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.covariance, "sqrt": self.root}
        if self.count is not None:
            arrays["count"] = self.count
        with path.open("wb") as file:
            np.savez(file, **arrays, about=json.dumps(self.about))

    @functools.cached_property
    def factor(self) -> Array:
        """Lower triangular (D, D), whose product with its transpose is the covariance, as that of the root is."""
        # of the root, since a singular covariance has no Cholesky factor
        return np.asarray(np.linalg.qr(self.root, mode="r")).T

    def distance(self, mean: Array, covariance: Array) -> float:
        """To a Gaussian: |mu_r - mu|^2 + tr(S_r + S - 2 (S_r^1/2 S S_r^1/2)^1/2); below 0 by rounding only."""
        # any root of S_r gives these eigenvalues, and a triangular one takes a quarter of the products
        product, _ = lapack.dsygst(covariance.T, self.factor, itype=2, lower=1)
        cross = np.sqrt(np.linalg.eigvalsh(product, UPLO="L").clip(min=0)).sum()
        shift = self.mean - mean
        own, other = np.trace(self.covariance), np.trace(covariance)
        return float(shift @ shift + own + other - 2 * cross)


@dataclass(frozen=True)
class FrechetScore:
    """A Frechet distance of N images, its standard error, and what it would be without the bias of a finite N."""

    value: float
    se: float
    corrected: float
    # the distance without each block in turn
    left_out: tuple[float, ...] = ()

    @property
    def blocks(self) -> dict[str, float]:
        """The distance without each block as scores beside it, which `parted` takes out again."""
        return {f"{_WITHOUT}{block}": value for block, value in enumerate(self.left_out)}


def parted(scores: Mapping[str, float]) -> tuple[dict[str, float], tuple[float, ...]]:
    """Scores, and what `FrechetScore.blocks` put among them."""
    plain = {name: value for name, value in scores.items() if not name.startswith(_WITHOUT)}
    names = (f"{_WITHOUT}{block}" for block in itertools.count())
    return plain, tuple(scores[name] for name in itertools.takewhile(scores.__contains__, names))


def frechet(reference: Reference, moments: Moments) -> FrechetScore:
    """The distance with its delete-one-block jackknife (Efron and Stein 1981) over the blocks of the generated set.

    The correction removes the bias of the generated set, about 1 / N, and not that of the reference.

    Raises:
        ValueError: the two are of different widths, or a block of the set is empty.
    """
    if len(reference.mean) != len(moments.shift):
        raise ValueError(f"a reference of {len(reference.mean)} features and {len(moments.shift)}")
    return jackknife(moments, lambda block: reference.distance(*moments.gaussian(block)))


def jackknife(moments: Moments, statistic: Callable[[int | None], float]) -> FrechetScore:
    """A statistic of all blocks (None), its standard error, and its value less its bias, from those without one block.

    Raises:
        ValueError: a block is empty.
    """
    blocks = moments.blocks
    if moments.counts.min() == 0:
        raise ValueError(f"{moments.count} features do not fill {blocks} blocks")
    return jackknifed(statistic(None), [statistic(block) for block in range(blocks)])


def jackknifed(full: float, without: Sequence[float]) -> FrechetScore:
    """The same of a statistic's value and its values without each block in turn."""
    blocks, left_out = len(without), np.array(without)
    variance = (blocks - 1) / blocks * ((left_out - left_out.mean()) ** 2).sum()
    corrected = blocks * full - (blocks - 1) * left_out.mean()
    return FrechetScore(full, float(np.sqrt(variance)), float(corrected), tuple(left_out.tolist()))


def distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """Between two Gaussians, once; a `Reference` keeps the square root for the next."""
    return Reference(mean1, covariance1, square_root(covariance1)).distance(mean2, covariance2)


def between(a: Moments, b: Moments) -> float:
    """The distance alone."""
    return distance(*a.gaussian(), *b.gaussian())


def square_root(covariance: Array) -> Array:
    """The symmetric square root (D, D); what rounding made negative is 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _check(mean: Array, covariance: Array, where: Path) -> None:
    """Raises UserError unless these are (D,) and (D, D), finite, symmetric, and of some variance."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{mean.shape} and {covariance.shape}"
        raise UserError(f"{where} is no reference: mean and covariance have shapes {shapes}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{where} is no reference: some of its numbers are not finite")
    size = np.abs(covariance).max(initial=0)
    if np.trace(covariance) <= 0 or np.abs(covariance - covariance.T).max() > 1e-6 * size:
        raise UserError(f"{where} is no reference: its covariance is not symmetric and positive")
