"""Metrics beside a protocol's own score: each takes the features of samples and what they are compared with.

A row of `_MEASURES` turns a metric of `evaluation.metrics`, with the settings that its protocol names, into scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from selfguide.discovery.agreement import agreement
from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.metrics.cluster_frechet import cluster_frechet
from selfguide.evaluation.metrics.density_coverage import density_coverage
from selfguide.evaluation.metrics.fdr import fdr
from selfguide.evaluation.metrics.frechet import Reference
from selfguide.evaluation.metrics.inception_score import inception_score
from selfguide.evaluation.metrics.kid import kid
from selfguide.evaluation.metrics.moments import Array, Moments
from selfguide.evaluation.metrics.nearest import nearest_reference
from selfguide.evaluation.metrics.ood import ood_auroc
from selfguide.evaluation.metrics.precision_recall import precision_recall
from selfguide.evaluation.metrics.ufid import ufid
from selfguide.evaluation.progress import Progress, silent
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.extras import check_real, measured
from shards.errors import UserError

Features = NDArray[np.generic]
Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The groups of the first training images, of samples, and the labels of the former where there are any."""

    real: NDArray[np.int64]
    made: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What metrics beside a score compare samples with; None where no metric of the protocol reads it."""

    # (M, D) of the first training images, in their order
    train: Features | None = None
    # (M, D) of images that nobody trained on
    test: Features | None = None
    # of samples of a named unconditional run
    unconditional: Reference | None = None
    clusters: Clusters | None = None
    # of samples and of the test images, in each of the nets of the ratio, by the name of its protocol
    distances: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One set of samples."""

    evaluation: EvaluationConfig
    net: FeatureNet
    # (N, D)
    features: Features
    # of the reference, where it keeps some
    real: Features | None
    beside: Beside
    # for metrics that take long
    progress: Progress = silent

    def kept(self, name: str) -> Features:
        """Features of real images.

        Raises:
            UserError: the reference holds none.
        """
        if self.real is None:
            raise _lacks_features(self.evaluation, name)
        return self.real

    def training(self, name: str) -> Features:
        return self.kept(name) if self.beside.train is None else self.beside.train


def check_features(
    evaluation: EvaluationConfig, real: Features | None, more: Sequence[str] = ()
) -> None:
    """Returns when a reference keeps the features that metrics need: asked before samples are drawn.

    Args:
        real: of the reference, where it keeps some.
        more: metrics that read them as well, where nothing else is known of the training images.

    Raises:
        UserError: it keeps none, or too few of them.
    """
    for name in ("precision_recall", "kid", "density_coverage", *more):
        if real is None and name in evaluation.metrics:
            raise _lacks_features(evaluation, name)
    if real is not None:
        given = next((n for n in ("reference", "shards") if getattr(evaluation, n)), None)
        told = f"evaluation.{given}={getattr(evaluation, given)}" if given else "the run's images"
        check_real(evaluation, len(real), told)


def _lacks_features(evaluation: EvaluationConfig, name: str) -> UserError:
    return UserError(
        f"evaluation.metrics: {name} needs features of real images, and "
        f"evaluation.reference={evaluation.reference} holds a mean and a covariance alone; give "
        f"evaluation.shards=ROOT in its place, or a file that `python -m tools.reference make ROOT` wrote"
    )


def measure(of: Measured) -> Scores:
    """The scores of every metric that the protocol names beside its own.

    Raises:
        UserError: what a metric needs is not there, or is too little.
    """
    found: Scores = {}
    for name in measured(of.evaluation):
        # of ADM's protocol itself, where a reference of others' holds no images
        if name not in of.evaluation.metrics and not _possible(name, of):
            continue
        try:
            found |= _MEASURES[name](of)
        except ValueError as error:
            raise UserError(
                f"evaluation.metrics: {name} cannot be taken: {error}; give more samples or real images, other "
                f"settings of it, or leave {name} out"
            ) from error
        of.progress()
    return found


def over_sets(each: Sequence[Scores]) -> Scores:
    """Scores of several sets as their mean, with `<name>_sd`, the deviation between sets, where it is one of samples.

    Standard errors of single sets become that of their mean.
    """
    if len(each) == 1:
        return each[0]
    found: Scores = {}
    for name in each[0]:
        values = np.array([scores[name] for scores in each])
        if name.endswith("_se"):
            found[name] = float(np.sqrt((values**2).sum())) / len(values)
        else:
            found[name] = float(values.mean())
            if np.ptp(values):
                found[f"{name}_sd"] = float(values.std(ddof=1))
    return found


def _possible(name: str, of: Measured) -> bool:
    if name == "inception_score":
        return of.net.logits is not None
    return of.real is not None and len(of.real) > of.evaluation.pr_k


def _inception_score(of: Measured) -> Scores:
    logits = of.net.logits
    assert logits is not None
    parts = (of.features[i : i + 1000] for i in range(0, len(of.features), 1000))
    found = [logits(torch.from_numpy(np.asarray(part)).to(of.net.device)).cpu() for part in parts]
    splits = min(of.evaluation.is_splits, len(of.features))
    score = inception_score(torch.cat(found), splits=splits, seed=of.evaluation.is_seed)
    return {"inception_score": score.value, "inception_score_of_splits_sd": score.sd}


def _precision_recall(of: Measured) -> Scores:
    evaluation = of.evaluation
    both = precision_recall(
        of.kept("precision_recall"),
        of.features,
        k=evaluation.pr_k,
        strict=evaluation.pr_strict,
        sizes=evaluation.pr_sizes,
        progress=of.progress,
    )
    return {"precision": both.precision, "recall": both.recall}


def _kid(of: Measured) -> Scores:
    evaluation = of.evaluation
    found = kid(
        of.kept("kid"),
        of.features,
        subsets=evaluation.kid_subsets,
        size=evaluation.kid_size,
        seed=evaluation.kid_seed,
        progress=of.progress,
    )
    return {"kid": found.value, "kid_of_subsets_sd": found.sd}


def _density_coverage(of: Measured) -> Scores:
    both = density_coverage(
        of.kept("density_coverage"), of.features, k=of.evaluation.dc_k, progress=of.progress
    )
    return {"density": both.density, "coverage": both.coverage}


def _near_copies(of: Measured) -> Scores:
    found = nearest_reference(
        of.training("near_copies"),
        of.features,
        quantile=of.evaluation.copies_quantile,
        progress=of.progress,
    )
    return {"near_copies": found.rate, "near_copies_real": found.rate_real}


def _ood_auroc(of: Measured) -> Scores:
    assert of.beside.test is not None
    train, test = of.training("ood_auroc"), of.beside.test
    return {"ood_auroc": ood_auroc(train, of.features, test, progress=of.progress)}


def _fdr(of: Measured) -> Scores:
    return {"fdr": fdr(of.beside.distances, of.beside.validation)}


def _ufid(of: Measured) -> Scores:
    assert of.beside.unconditional is not None
    score = ufid(of.beside.unconditional, moments(of.features, of.beside.unconditional.mean))
    return {"ufid": score.value, "ufid_se": score.se, "ufid_corrected": score.corrected}


def _cluster_fd(of: Measured) -> Scores:
    clusters = of.beside.clusters
    assert clusters is not None
    found = cluster_frechet(
        of.training("cluster_fd")[: len(clusters.real)],
        clusters.real,
        of.features,
        clusters.made,
        least=of.evaluation.cluster_least,
    )
    return {"cluster_fd": found.value, "cluster_fd_clusters": float(len(found.each))}


def _agreement(of: Measured) -> Scores:
    clusters = of.beside.clusters
    assert clusters is not None
    assert clusters.labels is not None
    used = {"groups_used": float(len(np.unique(clusters.real)))}
    return agreement(clusters.labels, clusters.real) | used


def moments(features: Features, shift: Array) -> Moments:
    """Of features (N, D) about a mean, in the blocks of the jackknife."""
    made = Moments(shift)
    made.update(np.asarray(features, dtype=np.float64), 0)
    return made


_MEASURES: Mapping[str, Callable[[Measured], Scores]] = {
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
    "kid": _kid,
    "density_coverage": _density_coverage,
    "near_copies": _near_copies,
    "ood_auroc": _ood_auroc,
    "fdr": _fdr,
    "ufid": _ufid,
    "cluster_fd": _cluster_fd,
    "agreement": _agreement,
    # of a model and its samples, measured where they are drawn
    "drift": lambda of: {},
}
