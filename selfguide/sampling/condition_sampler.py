"""Which conditions a published student samples: groups as often as in training or evenly, or rows of training images.

C-EDM (Adaloglou et al. 2024, arXiv 2403.00570, section 4) draws groups at their empirical frequency and compares with
even draws; SGDM (Hu et al. 2023, arXiv 2210.06462) draws layouts, with their groups, from the training set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from selfguide.data.crop_flip import CropFlip
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.conditions import Condition, check_numbers
from selfguide.guidance.sidecar import Annotations
from selfguide.randomness import uniform
from selfguide.sampling.groups import (
    nearest_prototypes,
    patch_layout,
    sample_group_ids,
    sampling_condition,
)
from selfguide.snapshot import Snapshot
from selfguide.spec.config import SidecarGuidance
from selfguide.spec.records import from_training_rows
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.read.reader import Reader

Prior = Literal["empirical", "uniform", "quota"]
ConditionSampler = Callable[[Tensor], Condition]  # of seeds or ordinals (B,)


def conditions_each_patch(snapshot: Snapshot) -> bool:
    """Whether each patch of an image is conditioned on a group of its own."""
    head = snapshot.config.guidance.head(snapshot.student.backbone.net)
    return head is not None and head.pooling == "patch"


def samples_training_rows(snapshot: Snapshot) -> bool:
    """Whether conditions are those of training images, rather than one group: layouts, features, several groups."""
    return conditions_each_patch(snapshot) or from_training_rows(snapshot.guidance)


def condition_sampler(snapshot: Snapshot, prior: Prior = "empirical") -> ConditionSampler:
    """Conditions of seeds (N,): each a pure function of its seed; unconditional ones, if the student knows no others.

    Evenly drawn are the groups that occur: the student was never conditioned on others. With `quota` they take turns,
    so that consecutive seeds have each group equally often.
    """
    state = snapshot.guidance
    if not snapshot.conditioned:
        return lambda seeds: Condition.unconditional(len(seeds))
    if samples_training_rows(snapshot):
        if prior != "empirical":
            raise UserError(
                f"prior={prior}: this snapshot is conditioned on rows of training images, not on one group alone; "
                "leave it out"
            )
        count, rows = training_rows(snapshot)
        return lambda seeds: rows(sample_ordinals(count, seeds))
    return lambda seeds: sampling_condition(
        state, snapshot.student, drawn_groups(state["p"], prior, seeds)
    )


def drawn_groups(p: list[float], prior: Prior, seeds: Tensor) -> Tensor:
    """(B,) groups of seeds (B,), of groups that occur with probabilities `p`."""
    if prior == "quota":
        occur = torch.tensor(p).nonzero()[:, 0]
        return occur.to(seeds.device)[seeds % len(occur)]
    even = [float(share > 0) for share in p]
    return sample_group_ids(p if prior == "empirical" else even, 0, seeds)


def clusters_of(snapshot: Snapshot, ordinals: Tensor) -> Tensor:
    """(B,) the group that a snapshot knows each training image by, at ordinals (B,).

    Raises:
        UserError: it knows images by no single group, or the images or sidecars are gone.
    """
    guidance = snapshot.config.guidance
    if not snapshot.conditioned or samples_training_rows(snapshot):
        raise UserError(
            f"guidance.source={guidance.source}: this snapshot is conditioned on no single group of an image, so that "
            "images have no clusters; leave cluster_fd and agreement out of evaluation.metrics"
        )
    if snapshot.guidance["source"] == "sidecar":
        ids = training_rows(snapshot)[1](ordinals).id
        assert ids is not None
        return ids
    images = TrainingImages(snapshot)
    if snapshot.guidance["source"] == "labels":
        return images.labels(ordinals)
    return nearest_prototypes(snapshot, images.x0(ordinals), ordinals).cpu()


def sample_ordinals(count: int, seeds: Tensor) -> Tensor:
    """(B,) ordinals of training images, each as likely as any other."""
    u = uniform(
        0, "row", seeds, 2
    ).double()  # one word of 23 bits would leave out most of 10 million
    return ((u[:, 0] + u[:, 1] * 2.0**-23).clamp_max(1 - 2.0**-53) * count).long()


def training_rows(snapshot: Snapshot) -> tuple[int, ConditionSampler]:
    """How many training images there are, and the conditions of those at ordinals (B,), as they lie in the shards.

    Raises:
        UserError: the sidecars, or the images whose patches are to be named, are gone or are not those of training.
    """
    if conditions_each_patch(snapshot):
        images = TrainingImages(snapshot)
        return images.count, lambda ordinals: patch_layout(snapshot, images.x0(ordinals), ordinals)
    annotations = _published(snapshot)
    edge = snapshot.student.backbone.net.size
    grid = annotations.image((edge, edge)) if snapshot.config.data.crop else (edge, edge)

    def rows(ordinals: Tensor) -> Condition:
        check_numbers("training image", ordinals, annotations.count)
        whole = CropFlip.centred(len(ordinals), grid, (edge, edge))
        return annotations.condition(ordinals, whole)

    return annotations.count, rows


def _published(snapshot: Snapshot) -> Annotations:
    """The sidecars of training, as the snapshot remembers them."""
    guidance = snapshot.config.guidance
    assert isinstance(guidance, SidecarGuidance)
    for field, was in snapshot.guidance["sidecars"].items():
        try:
            found = sidecar.read(was["folder"], manifest=snapshot.data["manifest"])
        except UserError as error:
            raise UserError(
                f"this snapshot is conditioned on the {was['kind']} of training images, and guidance.{field} is gone: "
                f"{error}, or put back what the run was trained with"
            ) from error
        if found.sha256 != was["sha256"]:
            raise UserError(
                f"this snapshot is conditioned on the {was['kind']} of training images, and {was['folder']} has "
                f"changed since (sha256 {found.sha256[:12]}, then {was['sha256'][:12]}); put back what the run was "
                "trained with"
            )
    return Annotations(guidance, snapshot.config.seed)


class TrainingImages:
    """The shards that a snapshot was trained on, by ordinal.

    Raises:
        UserError: they are gone, or hold other data now.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        root, self.snapshot = snapshot.data["root"], snapshot
        found = manifests.load(root)
        if found.hash != snapshot.data["manifest"]:
            raise UserError(
                f"{root} holds manifest {found.hash[:12]}, and this snapshot was trained on "
                f"{snapshot.data['manifest'][:12]}; put those shards back"
            )
        self.count, self._reader = found.count, Reader(root, found)

    def x0(self, ordinals: Tensor) -> Tensor:
        """(B, C, H, W) in model space, as they lie there; of larger images than the model's the middle."""
        check_numbers("training image", ordinals, self.count)
        stored = torch.as_tensor(self._reader.gather(ordinals.numpy())["x"])
        x0 = Normaliser.of(self.snapshot.data["header"]).encode(stored)
        edge = self.snapshot.student.backbone.net.size
        shape = (x0.shape[-2], x0.shape[-1])
        return CropFlip.centred(len(x0), shape, (edge, edge)).images(x0)

    def labels(self, ordinals: Tensor) -> Tensor:
        """(B,) int64."""
        check_numbers("training image", ordinals, self.count)
        return torch.as_tensor(self._reader.gather(ordinals.numpy(), fields=("y",))["y"]).long()
