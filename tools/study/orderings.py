"""What the papers found to be better than what, each held against the study's own runs of the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tools.study.guided import Paired

Metric = Literal["fd", "probe"]


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """One arm is better than another."""

    better: str
    worse: str
    # lower distances and higher accuracies of a linear probe are better
    metric: Metric = "fd"
    # where a paper says so, and its numbers, the better arm's first
    paper: str
    where: str
    published: str
    # what is not so here
    differs: str = ""

    @property
    def name(self) -> str:
        what = "a lower distance" if self.metric == "fd" else "a higher probe accuracy"
        return f"{self.better} has {what} than {self.worse}"


_SGFM = "Hu et al. 2023 (2312.08825)"
_SGDM = "Hu et al. 2023 (2210.06462)"
_CEDM = "Adaloglou et al. 2024 (2403.00570)"
_DDAEPP = "Xiang et al. 2025 (2505.10999)"


def _sgfm(better: str, worse: str, where: str, published: str) -> Ordering:
    return Ordering(better=better, worse=worse, paper=_SGFM, where=where, published=published)


def _ddaepp(
    better: str, worse: str, metric: Metric, where: str, published: str, differs: str = ""
) -> Ordering:
    return Ordering(
        better=better,
        worse=worse,
        metric=metric,
        paper=_DDAEPP,
        where=where,
        published=published,
        differs=differs,
    )


_AUGMENTED = "both with augmentation, as no arm is here"
ORDERINGS = (
    _sgfm("kmeans", "unconditional", "table 1, ImageNet-100", "FID 35.8 < 45.1"),
    _sgfm("online", "unconditional", "table 1, ImageNet-100", "FID 36.0 < 45.1"),
    _sgfm("kmeans", "online", "table 3, ImageNet", "FID 29.8 < 30.9"),
    _sgfm("patch", "online", "table 1, ImageNet-100", "FID 33.4 < 36.0"),
    _sgfm("patch", "class", "table 1, ImageNet-100", "FID 33.4 < 34.4"),
    _sgfm("class", "online", "table 3, ImageNet", "FID 19.1 < 30.9"),
    Ordering(
        better="kmeans",
        worse="class",
        paper=_SGDM,
        where="table 2, ImageNet at 32 px",
        published="FID 7.3 < 9.2",
    ),
    Ordering(
        better="class",
        worse="unconditional",
        paper=_SGDM,
        where="table 2, ImageNet at 32 px",
        published="FID 9.2 < 14.3",
    ),
    Ordering(
        better="temi",
        worse="kmeans",
        paper=_CEDM,
        where="table 1, CIFAR-10",
        published="FID 1.67 < 1.69",
    ),
    _ddaepp(
        "self-conditioned", "unconditional", "fd", "table 2, RF on CIFAR-10", "FID 2.42 < 2.54"
    ),
    _ddaepp(
        "self-conditioned", "unconditional", "probe", "table 5, ImageNet-100", "84.86 > 83.78 %"
    ),
    _ddaepp(
        "contrastive",
        "self-conditioned",
        "probe",
        "table 3, EDM on CIFAR-100",
        "69.50 > 68.65 %",
        _AUGMENTED,
    ),
    _ddaepp(
        "self-conditioned",
        "contrastive",
        "fd",
        "table 3, EDM on CIFAR-100",
        "FID 5.13 < 5.25",
        _AUGMENTED,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An ordering, and what the study's runs say of it."""

    ordering: Ordering
    # the better arm's score less the worse one's; of distances those without guidance
    difference: Paired
    # and with each arm's best guidance, for most papers guide; None of accuracies
    guided: Paired | None = None

    def verdict(self, of: Paired) -> Literal["holds", "does not hold", "not distinguishable"]:
        """What one of the two differences says of the ordering."""
        holds = "lower" if self.ordering.metric == "fd" else "higher"
        if of.verdict == "not distinguishable":
            return "not distinguishable"
        return "holds" if of.verdict == holds else "does not hold"


def askable(names: Sequence[str]) -> list[Ordering]:
    """Those whose both arms are there."""
    return [each for each in ORDERINGS if {each.better, each.worse} <= set(names)]
