"""The one table of metrics: what each is called, which way it is better, how it is written, and its protocol's facts.

A new metric is a row here, a file in `selfguide/evaluation/metrics/` that computes it, and a `protocol` of
`evaluation=`; the board, the records and the protocols take the rest from the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a score is shown."""

    # the heading of its column
    heading: str
    note: str
    higher_is_better: bool = False
    form: Literal["number", "percent", "count"] = "number"
    # whether seeds are shown as mean and standard deviation, or as the mean alone
    with_spread: bool = False
    # the score of the real data that stands beside it
    beside: str | None = None


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a protocol measures in: everything about it that a config does not choose."""

    # of the code; a new version scores every snapshot again
    version: int
    # of the feature net's weights
    sha256: str
    resize: str
    quantisation: str
    dtype: str = "fp32"


# in the order of the board's columns
METRICS: dict[str, Metric] = {
    "fd_digits": Metric(
        heading="fd_digits",
        note="Frechet distance to real digits in the features of a small digit net; lower is better",
        with_spread=True,
    ),
    "floor": Metric(
        heading="floor",
        note="the same distance between the two halves of the real data: what a perfect model would reach",
    ),
    "copy_rate": Metric(
        heading="copies",
        note="share of samples nearer to a real image than 1 % of real images are; then that of real ones",
        form="percent",
        beside="copy_rate_real",
    ),
    "nmi": Metric(
        heading="NMI",
        note="normalised mutual information of the groups found with the true labels",
        higher_is_better=True,
        with_spread=True,
    ),
    "ari": Metric(
        heading="ARI",
        note="adjusted Rand index of the groups found with the true labels",
        higher_is_better=True,
        with_spread=True,
    ),
    "ami": Metric(
        heading="AMI",
        note="adjusted mutual information of the groups found with the true labels",
        higher_is_better=True,
        with_spread=True,
    ),
    "confident": Metric(
        heading="confident",
        note="share of samples with at least 0.9 on the digit net's top class",
        higher_is_better=True,
        form="percent",
    ),
    "classes": Metric(
        heading="classes",
        note="how many of the classes occur among the samples",
        higher_is_better=True,
        form="count",
    ),
    "kid": Metric(
        heading="KID",
        note="kernel distance to real images, unbiased, mean over 100 subsets of 1,000; lower is better",
    ),
    "density": Metric(
        heading="density",
        note="how many balls around real images, out to their 5th neighbours, hold a sample; 1 for equal sets",
        higher_is_better=True,
    ),
    "coverage": Metric(
        heading="coverage",
        note="share of real images with a sample nearer than their 5th neighbour",
        higher_is_better=True,
        form="percent",
    ),
    "cluster_fd": Metric(
        heading="FD per cluster",
        note="mean Frechet distance between the samples and the real images of each cluster; lower is better",
    ),
    "near_copies": Metric(
        heading="copies (features)",
        note="share of samples nearer to a training image, in features, than 1 % of these are; then that of real ones",
        form="percent",
        beside="near_copies_real",
    ),
    "ood_auroc": Metric(
        heading="OOD AUROC",
        note="how well the nearest cosine to training images tells samples from test images; 0.5: not at all",
    ),
    "fdr": Metric(
        heading="FDR",
        note="mean over feature nets of the distance over that of the validation set, which has 1; lower is better",
    ),
    "ufid": Metric(
        heading="uFID",
        note="Frechet distance to the samples of a named unconditional run instead of real images",
    ),
}  # fmt: skip

# protocol of `evaluation=` -> what it measures in; its score is the metric of the same name
FEATURES: dict[str, Features] = {
    "fd_digits": Features(
        version=1,
        sha256="9ccbd016db9dbec4006e3f967b9a8432966ae68b6c73415b55c6d0d9e6eb9285",
        resize="none",
        quantisation="round to 0..16",
    ),
}


def higher_is_better(name: str) -> bool:
    """Whether more of that score is better; of a score that the table does not know, less is."""
    return name in METRICS and METRICS[name].higher_is_better
