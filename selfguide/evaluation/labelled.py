"""Labelled shards in the three parts that a probe reads, and their batches.

Which part an image is in, how it is mirrored, and its noise are functions of a seed and its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.crop_flip import mirrored
from selfguide.data.normaliser import Normaliser
from selfguide.discovery.features import SnapshotFeatures
from selfguide.randomness import normal, uniform
from selfguide.spec.data_fit import check_labels, check_other_images
from selfguide.spec.rank_status import RankStatus
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read.reader import Reader

# rows in a row that are shuffled together: rows are read in runs, and were shuffled when they were written
WINDOW = 8192
# images of the run's own that are kept from training probes, for each of the two other parts
SHARE = 5

Part = Literal["train", "validation", "test"]


@dataclass(kw_only=True)
class Labelled:
    """Labelled shards in their three parts, which a seed splits."""

    root: str
    # labelled shards to test on; None takes a part of `root`
    test_root: str | None
    # the most images that a layer is chosen on, and tested on
    most: int
    seed: int
    manifest: Manifest = field(init=False)
    test_manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: shards without labels of two classes, or of other classes to test on.
        """
        self.manifest = manifests.load(self.root)
        self.test_manifest = manifests.load(self.test_root) if self.test_root else self.manifest
        check_labels(self.root, self.manifest)
        if self.test_root:
            check_labels(self.test_root, self.test_manifest)
            check_other_images(self.test_root, self.test_manifest, self.manifest)
            if self.test_manifest.classes != self.manifest.classes:
                raise UserError(
                    f"evaluation.shards={self.test_root} have {self.test_manifest.classes} classes, and the shards in "
                    f"{self.root} have {self.manifest.classes}; give a test part of the same classes"
                )

    @property
    def classes(self) -> int:
        return self.manifest.classes

    @cached_property
    def parts(self) -> dict[Part, NDArray[np.int64]]:
        """The ordinals of each part, ascending.

        Raises:
            UserError: too few images for three parts, or a training part of one class.
        """
        count = self.manifest.count
        order = shuffled(self.seed, "probe-parts", np.arange(count))
        held = min(count // SHARE, self.most)
        parts: dict[Part, NDArray[np.int64]] = {"validation": np.sort(order[:held])}
        if self.test_root:
            whole = np.arange(self.test_manifest.count)
            parts["test"] = np.sort(shuffled(self.seed, "probe-test", whole)[: self.most])
            parts["train"] = np.sort(order[held:])
        else:
            parts["test"] = np.sort(order[held : 2 * held])
            parts["train"] = np.sort(order[2 * held :])
        if not all(len(ordinals) for ordinals in parts.values()):
            raise UserError(
                f"the shards in {self.root} hold {count} images: a probe trains on some, chooses on others and is "
                f"tested on others; give {SHARE} or more, or evaluation=none"
            )
        with closing(Reader(self.root, self.manifest)) as reader:
            labels = reader.gather(parts["train"], fields=("y",))["y"]
        if (labels == labels[0]).all():
            raise UserError(
                f"the training part of the shards in {self.root} is all of class {labels[0]}: no label tells features "
                "apart; give labelled shards of two classes or more, or evaluation=none"
            )
        return parts


@dataclass(frozen=True)
class Batch:
    """Images x0 (B, C, H, W) as the model sees them, their noise, a place in each (B,) in [0, 1), and labels (B,).

    `mirrored` (B,) says which are, where the network is told; None where it never was.
    """

    x0: Tensor
    eps: Tensor
    place: Tensor
    labels: Tensor
    mirrored: Tensor | None = None


class Batches:
    """Batches of labelled shards; what is random about an image is a function of the seed and its place."""

    def __init__(
        self,
        data: Labelled,
        net: SnapshotFeatures,
        status: RankStatus,
        *,
        size: int,
    ) -> None:
        """
        Args:
            net: whose model sees the images.
            status: called with each batch.
            size: images of a batch.
        """
        self.data, self.net, self.status, self.size = data, net, status, size
        config = net.snapshot.config
        # augmentation mirrors as well, in place of data.flip
        self.augmented = config.augment.on
        self.seed, self.flip = data.seed, config.data.flip or self.augmented

    def shuffled(self, number: int) -> Iterator[Batch]:
        """The training part in the order of this pass, mirrored and noised anew."""
        ordinals = self.data.parts["train"]
        count = self.data.manifest.count
        starts = np.arange(0, len(ordinals), WINDOW)
        windows = shuffled(self.seed, f"probe-windows/{number}", starts)
        order = np.concatenate(
            [
                shuffled(self.seed, f"probe-order/{number}", ordinals[start : start + WINDOW])
                for start in windows
            ]
        )
        normaliser = Normaliser.of(self.data.manifest.header)
        for stored, labels, found in self._read(self.data.root, self.data.manifest, order):
            # places of no other pass
            position = torch.from_numpy(found) + number * count
            x0 = self.net.shown(normaliser.encode(stored, self.seed, position))
            turned = mirrored(self.seed, position) if self.flip else None
            if turned is not None:
                x0 = torch.where(turned[:, None, None, None], x0.flip(-1), x0)
            batch = self._noised(x0, "probe-noise", position, labels)
            yield replace(batch, mirrored=turned if self.augmented else None)

    def plain(self, part: Part) -> Iterator[Batch]:
        """A part as it is, each image with noise of its own."""
        data, ordinals = self.data, self.data.parts[part]
        other = part == "test" and data.test_root
        root, manifest = data.root, data.manifest
        if other:
            root, manifest = str(data.test_root), data.test_manifest
        normaliser = Normaliser.of(manifest.header)
        for stored, labels, found in self._read(root, manifest, ordinals):
            x0 = self.net.shown(normaliser.encode(stored))
            # two images of different shards must not look alike by their noise
            yield self._noised(x0, f"probe-noise-of-{part}", torch.from_numpy(found), labels)

    def _noised(self, x0: Tensor, purpose: str, position: Tensor, labels: Tensor) -> Batch:
        self.status.enter("evaluate")
        eps = normal(self.seed, purpose, position, tuple(x0.shape[1:]))
        place = uniform(self.seed, f"{purpose}-place", position, 1)[:, 0]
        return Batch(x0, eps, place, labels.to(self.net.snapshot.device))

    def _read(
        self, root: str, manifest: Manifest, ordinals: NDArray[np.int64]
    ) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        """Stored values, labels and ordinals of batches, of which the next one is on its way."""
        cut = [ordinals[start : start + self.size] for start in range(0, len(ordinals), self.size)]
        with closing(Reader(root, manifest)) as reader:
            reader.want(cut[0])
            for number in range(len(cut)):
                if number + 1 < len(cut):
                    reader.want(cut[number + 1])
                held, _ = reader.take(cut[number])
                labels = torch.from_numpy(held["y"].astype(np.int64))
                yield torch.from_numpy(held["x"]), labels, cut[number]


def shuffled(seed: int, purpose: str, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """`values` (N,) in the order that a seed and a purpose give them."""
    drawn = uniform(seed, purpose, torch.from_numpy(values), 1)[:, 0]
    return values[drawn.argsort(stable=True).numpy()]
