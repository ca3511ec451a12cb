"""Which conditions a published student samples: groups as often as in training or evenly, or rows of training images.

C-EDM (Adaloglou et al. 2024, arXiv 2403.00570, section 4) draws groups at their empirical frequency and compares with
even draws; SGDM (Hu et al. 2023, arXiv 2210.06462) draws layouts, with their groups, from the training set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
from selfguide.spec.annotations import size_of
from selfguide.spec.config import SidecarGuidance
from selfguide.spec.config.sidecar import ROLES
from selfguide.spec.records import from_training_rows
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.read.reader import Reader

Prior = Literal["empirical", "uniform", "quota"]
ConditionSampler = Callable[[Tensor], Condition]  # of seeds or ordinals (B,)


@dataclass(frozen=True)
class OtherImages:
    """Shards of other images than those of training, such as validation images, and the sidecars that annotate them."""

    root: str
    # folders by field of guidance=sidecar: ids, layout, dense
    sidecars: Mapping[str, str] = field(default_factory=dict)


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


def training_rows(
    snapshot: Snapshot, others: OtherImages | None = None
) -> tuple[int, ConditionSampler]:
    """How many training images there are, and the conditions of those at ordinals (B,), as they lie in the shards.

    With `others` both are of those images.

    Raises:
        UserError: the sidecars, or the images whose patches are to be named, are gone, are not those of training, or
            do not fit the snapshot.
    """
    if conditions_each_patch(snapshot):
        images = TrainingImages(snapshot, others)
        return images.count, lambda ordinals: patch_layout(snapshot, images.x0(ordinals), ordinals)
    annotations = _published(snapshot) if others is None else _annotations(snapshot, others)
    edge = snapshot.student.backbone.net.size
    grid = annotations.image((edge, edge)) if snapshot.config.data.crop else (edge, edge)

    def rows(ordinals: Tensor) -> Condition:
        check_numbers(_of(others), ordinals, annotations.count)
        whole = CropFlip.centred(len(ordinals), grid, (edge, edge))
        return annotations.condition(ordinals, whole)

    return annotations.count, rows


def _published(snapshot: Snapshot) -> Annotations:
    """The sidecars of training, as the snapshot remembers them."""
    guidance = snapshot.config.guidance
    assert isinstance(guidance, SidecarGuidance)
    for name, was in snapshot.guidance["sidecars"].items():
        try:
            found = sidecar.read(was["folder"], manifest=snapshot.data["manifest"])
        except UserError as error:
            raise UserError(
                f"this snapshot is conditioned on the {was['kind']} of training images, and guidance.{name} is gone: "
                f"{error}, or put back what the run was trained with"
            ) from error
        if found.sha256 != was["sha256"]:
            raise UserError(
                f"this snapshot is conditioned on the {was['kind']} of training images, and {was['folder']} has "
                f"changed since (sha256 {found.sha256[:12]}, then {was['sha256'][:12]}); put back what the run was "
                "trained with"
            )
    return Annotations(guidance, snapshot.config.seed)


def _annotations(snapshot: Snapshot, others: OtherImages) -> Annotations:
    """The sidecars of other images, where they are of the kinds and sizes that the snapshot was trained with."""
    guidance = snapshot.config.guidance
    assert isinstance(guidance, SidecarGuidance)
    manifest = manifests.load(others.root).hash
    for name, was in snapshot.guidance["sidecars"].items():
        if name not in others.sidecars:
            raise UserError(
                f"this snapshot is conditioned on the {was['kind']} of an image: say where those of {others.root} are, "
                f"as {name}=FOLDER; `python -m tools.annotate {ROLES[name].made_by}` makes them"
            )
        found = sidecar.read(others.sidecars[name], manifest=manifest)
        wanted, size = getattr(guidance, ROLES[name].size), size_of(found)
        if (found.kind, size) != (was["kind"], wanted):
            raise UserError(
                f"{name}={found.folder} is of kind {found.kind} and size {size}, and this snapshot was trained with "
                f"kind {was['kind']} and size {wanted}; give annotations made as those of training"
            )
    if unread := sorted({*others.sidecars} - {*snapshot.guidance["sidecars"]}):
        raise UserError(f"{unread[0]}=FOLDER: this snapshot is not conditioned on it; leave it out")
    folders: dict[str, Any] = {
        name: others.sidecars[name] for name in snapshot.guidance["sidecars"]
    }
    # nothing is shuffled: that was a control of training
    return Annotations(replace(guidance, **folders, shuffle=0.0), snapshot.config.seed)


def _of(others: OtherImages | None) -> str:
    return "training image" if others is None else f"image of {others.root}"


class TrainingImages:
    """The shards that a snapshot was trained on, by ordinal; or `others`, as the snapshot sees them.

    Raises:
        UserError: they are gone, hold other data now, or are not stored as those of training.
    """

    def __init__(self, snapshot: Snapshot, others: OtherImages | None = None) -> None:
        self.snapshot, self._others = snapshot, others
        root = snapshot.data["root"] if others is None else others.root
        found = manifests.load(root)
        if others is not None:
            _check_stored(snapshot, found, root)
        elif found.hash != snapshot.data["manifest"]:
            raise UserError(
                f"{root} holds manifest {found.hash[:12]}, and this snapshot was trained on "
                f"{snapshot.data['manifest'][:12]}; put those shards back"
            )
        self.count, self.classes = found.count, found.classes
        self._reader = Reader(root, found)
        self._normaliser = Normaliser.of(found.header)

    def x0(self, ordinals: Tensor) -> Tensor:
        """(B, C, H, W) in model space, as they lie there; of larger images than the model's the middle."""
        check_numbers(_of(self._others), ordinals, self.count)
        stored = torch.as_tensor(self._reader.gather(ordinals.numpy())["x"])
        x0 = self._normaliser.encode(stored)
        edge = self.snapshot.student.backbone.net.size
        shape = (x0.shape[-2], x0.shape[-1])
        return CropFlip.centred(len(x0), shape, (edge, edge)).images(x0)

    def labels(self, ordinals: Tensor) -> Tensor:
        """(B,) int64."""
        check_numbers(_of(self._others), ordinals, self.count)
        return torch.as_tensor(self._reader.gather(ordinals.numpy(), fields=("y",))["y"]).long()


def _check_stored(snapshot: Snapshot, found: manifests.Manifest, root: str) -> None:
    """Returns where a snapshot sees what is stored as it saw its training images, and knows it by the same labels."""
    ours, theirs = Header.of(snapshot.data["header"]), Header.of(found.header)
    for name in ("kind", "encoder", "encoder_sha256", "shift", "scale"):
        was, given = getattr(ours, name), getattr(theirs, name)
        if was != given:
            raise UserError(
                f"{root}: its header has {name}={given}, and this snapshot was trained on {name}={was}; give shards "
                "made as those of training"
            )
    if snapshot.guidance["source"] == "labels" and found.classes != len(snapshot.guidance["p"]):
        raise UserError(
            f"{root} has {found.classes} classes, and this snapshot knows {len(snapshot.guidance['p'])}; give shards "
            "labelled as those of training"
        )
