"""How many images each group has, drawn and in numbers: whether an assignment has collapsed (SGFM, figure 16)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfguide.sampling.condition_sampler import TrainingImages, conditions_each_patch
from selfguide.sampling.groups import nearest_prototypes
from selfguide.snapshot import Snapshot
from shards import sidecar
from shards.cli import track
from tools import drawing
from tools.atlas.grouping import check_ids, prototypes_of

_BARS = "#4c78a8"


@dataclass(frozen=True)
class Sizes:
    """How many images, or patches, each group has."""

    counts: NDArray[np.int64]  # (K,) by group
    what: str = "images"

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def used(self) -> int:
        """Groups with an image."""
        return int((self.counts > 0).sum())

    @property
    def utilisation(self) -> float:
        """The share of groups with an image."""
        return self.used / len(self.counts)

    @property
    def entropy(self) -> float:
        """Of an image's group, in nats; ln K where all groups have equally many."""
        share = self.counts[self.counts > 0] / self.total
        return float((share * np.log(1 / share)).sum())

    def facts(self) -> dict[str, Any]:
        return {
            self.what: self.total,
            "groups": len(self.counts),
            "used": self.used,
            "utilisation": self.utilisation,
            "entropy": self.entropy,
            "counts": self.counts.tolist(),
        }

    def text(self) -> str:
        """All of this but the counts on a line."""
        groups, perplexity = len(self.counts), math.exp(self.entropy)
        share = f"{self.used:,} of {groups:,} groups used ({100 * self.utilisation:.1f} %)"
        even = f"entropy {self.entropy:.3f} of {math.log(groups):.3f} nats, perplexity {perplexity:,.1f}"
        largest = f"the largest has {self.counts.max():,}, an even one {self.total / groups:,.1f}"
        return f"{self.total:,} {self.what}; {share}; {even}; {largest}"


def sizes_of(snapshot: Snapshot | None, found: sidecar.Sidecar | None, batch: int = 256) -> Sizes:
    """By the ids of an annotation. Of a snapshot by the labels that it was trained on, or by the prototype nearest to
    each training image or patch, in noise that depends on the image's ordinal alone.

    Raises:
        UserError: an annotation of another kind; or a snapshot that has no groups, or whose images are gone.
    """
    if found is not None:
        check_ids(found)
        return Sizes(np.bincount(np.asarray(found.rows()), minlength=found.groups or 0))
    assert snapshot is not None
    images, by_label = TrainingImages(snapshot), snapshot.guidance["source"] == "labels"
    groups = len(snapshot.guidance["p"] if by_label else prototypes_of(snapshot).prototypes)
    counts = np.zeros(groups, dtype=np.int64)
    starts = range(0, images.count, batch)
    for start in track(starts, len(starts), "counting images"):
        index = torch.arange(start, min(start + batch, images.count))
        if by_label:
            ids = images.labels(index)
        else:
            ids = nearest_prototypes(snapshot, images.x0(index), index).cpu()
        counts += np.bincount(ids.numpy(), minlength=groups)
    return Sizes(counts, "patches" if conditions_each_patch(snapshot) else "images")


def draw(file: Path, sizes: Sizes, title: str) -> None:
    """The images of each group, the largest group first, with a line where all groups would be even."""
    ordered, groups = np.sort(sizes.counts)[::-1], len(sizes.counts)
    with drawing.figure(file, 1, 1, size=(9, 3.8)) as (figure, [[axis]]):
        axis.stairs(ordered, np.arange(groups + 1) + 0.5, fill=True, color=_BARS)
        even = sizes.total / groups
        axis.axhline(even, color="black", linestyle="--", linewidth=1, label=f"even: {even:,.1f}")
        axis.set(xlabel="group, the largest first", ylabel=sizes.what)
        # the legend has its place above the highest bar
        axis.set(xlim=(0.5, groups + 0.5), ylim=(0, 1.2 * ordered[0]))
        axis.legend(frameon=False)
        drawing.open_frame(axis)
        figure.suptitle(title, fontsize=11)
        axis.set_title(sizes.text(), fontsize=8)
