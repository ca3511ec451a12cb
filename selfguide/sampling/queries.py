"""Conditions that a user asks for: a group, that of a training image, the group of a query image, or the way between
two groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.diffusion.conditions import NULL, UNCONDITIONAL, Condition, check_numbers
from selfguide.sampling.condition_sampler import (
    OtherImages,
    TrainingImages,
    samples_training_rows,
    training_rows,
)
from selfguide.sampling.groups import head_of, queried_prototypes, sampling_condition
from selfguide.snapshot import Snapshot
from selfguide.spec.unet import UNetArchitecture
from shards.errors import UserError
from shards.format.classes import label_of


def groups(snapshot: Snapshot) -> int:
    """How many groups or labels the student can be conditioned on.

    Raises:
        UserError: it is unconditional, or conditioned on more than one group.
    """
    state = snapshot.guidance
    if not snapshot.conditioned:
        why = "it was trained without guidance"
        if state["source"] == "online":
            why = "its second stage, in which it is conditioned on its groups, had not begun"
        raise UserError(f"this snapshot at {snapshot.images:,} images is unconditional: {why}")
    if samples_training_rows(snapshot):
        kinds = ", ".join(s["kind"] for s in state.get("sidecars", {}).values())
        raise UserError(
            f"this snapshot is conditioned on {kinds or 'a group for each patch'} of an image, not on one group alone; "
            "give --row ORDINAL, the number of a training image, to take the condition of that"
        )
    return len(state["p"])


def without_condition(snapshot: Snapshot, count: int) -> Condition:
    """The student's condition without information: its null row, or the unconditional one where it knew no other.

    Raises:
        UserError: it was never trained without a condition.
    """
    if snapshot.never_null:
        raise UserError(
            "this snapshot was trained with guidance.drop=0, so it never learned to draw without a condition; train "
            "with guidance.drop=0.1"
        )
    return Condition(torch.full((count,), NULL if snapshot.conditioned else UNCONDITIONAL))


def of_groups(snapshot: Snapshot, ids: Tensor) -> Condition:
    """The condition of groups or labels `ids` (B,)."""
    check_numbers("group", ids, groups(snapshot))
    return sampling_condition(snapshot.guidance, snapshot.student, ids)


def labels(snapshot: Snapshot, texts: Sequence[str]) -> Tensor:
    """(B,) the labels that a user means by numbers or by names of classes; see `shards.format.classes.label_of`.

    Raises:
        UserError: the student was not conditioned on labels, or there is no such class.
    """
    known = groups(snapshot)
    if snapshot.guidance["source"] != "labels":
        raise UserError("--label: this snapshot knows groups that it found itself; give --group")
    return torch.tensor([label_of(text, snapshot.class_names, known) for text in texts])


def rows(snapshot: Snapshot, ordinals: Tensor, others: OtherImages | None = None) -> Condition:
    """The conditions of training images, or of `others`, at `ordinals` (B,): their annotations, labels, or groups now.

    Raises:
        UserError: the snapshot knows no condition, there are no such images, or annotations that do not fit it.
    """
    if snapshot.conditioned and (
        samples_training_rows(snapshot) or snapshot.guidance["source"] == "sidecar"
    ):
        return training_rows(snapshot, others)[1](ordinals)
    groups(snapshot)  # it may know nothing at all
    images = TrainingImages(snapshot, others)
    if snapshot.guidance["source"] == "labels":
        return of_groups(snapshot, images.labels(ordinals))
    return of_groups(snapshot, nearest_groups(snapshot, images.x0(ordinals), ordinals))


def nearest_groups(snapshot: Snapshot, x0: Tensor, numbers: Tensor | None = None) -> Tensor:
    """(B,) prototypes nearest to query images in model space (B, C, H, W): SGFM's image query.

    `numbers` (B,) as in `queried_prototypes`; by default the images are numbered from 0.
    """
    if head_of(snapshot).pooling == "patch":
        groups(snapshot)  # each patch has one of its own, where it has one
    numbers = torch.arange(len(x0)) if numbers is None else numbers
    return queried_prototypes(snapshot, x0, numbers).cpu()


def between(snapshot: Snapshot, first: int, second: int, count: int) -> Condition:
    """`count` conditions from one group to another, ends included.

    Prototypes lie on a sphere and are joined along its great circle, and so are the one-hot vectors of groups where the
    network multiplies these. Where it reads the mean of rows, a vector's length says nothing: groups are mixed in
    proportion.
    """
    ends = of_groups(snapshot, torch.tensor([first, second]))
    way = torch.linspace(0, 1, count)
    if ends.dense is not None:
        return Condition.of(dense=arc(ends.dense[0], ends.dense[1], way))
    from_, to = F.one_hot(torch.tensor([first, second]), groups(snapshot)).float()
    if isinstance(snapshot.student.backbone.net, UNetArchitecture):
        return Condition.of(multi_hot=slerp(from_, to, way))
    return Condition.of(multi_hot=torch.lerp(from_, to, way[:, None]))


def conditioned_on_features(snapshot: Snapshot) -> bool:
    """Whether the student is conditioned on a vector for each image, and on nothing else."""
    kinds = {each["kind"] for each in snapshot.guidance.get("sidecars", {}).values()}
    return snapshot.conditioned and kinds == {"dense"}


def between_images(
    snapshot: Snapshot, ends: Tensor, count: int, others: OtherImages | None = None
) -> Condition:
    """`count` conditions on the way from the feature of one image to that of another, by ordinals `ends` (2,).

    Features lie on no sphere of their own: their directions are joined along the great circle, their lengths evenly.
    """
    vectors = rows(snapshot, ends, others).dense
    assert vectors is not None
    return Condition.of(dense=arc(vectors[0], vectors[1], torch.linspace(0, 1, count)))


def arc(first: Tensor, second: Tensor, way: Tensor) -> Tensor:
    """Vectors (P,) joined at the shares `way` (N,): directions along the great circle, lengths evenly; (N, P)."""
    lengths = torch.lerp(first.norm(), second.norm(), way)
    return lengths[:, None] * slerp(F.normalize(first, dim=0), F.normalize(second, dim=0), way)


def slerp(first: Tensor, second: Tensor, way: Tensor) -> Tensor:
    """Unit vectors (P,) joined along the great circle at the shares `way` (N,) of their angle, (N, P)."""
    angle = torch.acos((first @ second).clamp(-1, 1))
    if angle > torch.pi - 1e-4:
        raise UserError(
            "these two vectors are opposite: no great circle between them is the shortest"
        )
    if angle < 1e-4:  # the sines cancel, and the chord is the arc
        return torch.lerp(first, second, way[:, None])
    near, far = torch.sin((1 - way) * angle), torch.sin(way * angle)
    return (near[:, None] * first + far[:, None] * second) / torch.sin(angle)
