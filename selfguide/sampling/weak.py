"""The weak model of a published snapshot, as `sampler.weak` names it: what guidance leads away from.

An average and an earlier snapshot are read from beside the snapshot, once; a head and a way with fewer tokens are
parts of its own student.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.denoiser import DROPPED, Denoiser, Head, Mixed, Other, Routed, Weak
from selfguide.diffusion.paths import build_path
from selfguide.networks.auxiliary import NAME as AUXILIARY
from selfguide.networks.branch import Branch
from selfguide.snapshot import CONFIG, Snapshot, load
from selfguide.spec.averages import AverageSpec, averages_of
from selfguide.spec.config import Config, SamplerConfig
from selfguide.spec.files import read_config
from selfguide.spec.retention import deletion
from selfguide.spec.run import complete, image_folder
from selfguide.spec.weak import CONDITION, WeakModel, check_snapshots, weak_models
from shards import storage
from shards.errors import UserError


def build_denoiser(
    snapshot: Snapshot, condition: Condition, sampler: SamplerConfig, seeds: Tensor
) -> Denoiser:
    """The snapshot's student on its path, guided as the sampler says; `seeds` (B,) are those of the images.

    Raises:
        UserError: there is no such weak model.
    """
    weak = DROPPED if sampler.g == 1 else weak_of(snapshot, condition, sampler, seeds)
    return _denoiser(snapshot, condition, sampler, g=sampler.g, weak=weak)


def _denoiser(
    snapshot: Snapshot,
    condition: Condition,
    sampler: SamplerConfig,
    *,
    g: float = 1.0,
    weak: Weak = DROPPED,
) -> Denoiser:
    path = snapshot.config.path
    return Denoiser(
        snapshot.student.backbone,
        build_path(path),
        condition,
        g,
        sampler.interval,
        prediction=path.prediction,
        sigma_data=path.sigma_data,
        guided_channels=sampler.guided_channels,
        weak=weak,
    )


def weak_of(
    snapshot: Snapshot, condition: Condition, sampler: SamplerConfig, seeds: Tensor
) -> Weak:
    """What stands for f_weak of images under `condition` (B) with `seeds` (B,).

    Raises:
        UserError: the snapshot has no such weak model, names what it has.
    """
    check(snapshot, sampler)
    # a head is of the same forward as the network, where it comes first
    asked = sorted(weak_models(sampler.weak).items(), key=lambda each: each[0].kind != "head")
    parts = [(_made(snapshot, condition, sampler, seeds, model), share) for model, share in asked]
    return parts[0][0] if len(parts) == 1 else Mixed(parts)


def _made(
    snapshot: Snapshot,
    condition: Condition,
    sampler: SamplerConfig,
    seeds: Tensor,
    asked: WeakModel,
) -> Weak:
    if asked.kind == "head":
        branch = cast(Branch, snapshot.student.branches[AUXILIARY])
        return Head(branch.layer, branch)
    if asked.kind == "routed":
        return Routed(seeds)
    if asked.kind == CONDITION:
        return DROPPED
    other = other_snapshot(snapshot, asked)
    return Other(_denoiser(other, same_groups(snapshot, other, condition), sampler))


def check(snapshot: Snapshot, sampler: SamplerConfig) -> None:
    """Returns when the snapshot has the weak models that the sampler names.

    Raises:
        UserError: it has not.
    """
    models = weak_models(sampler.weak)
    here, asked = snapshot.folder, [each.images for each in models if each.images is not None]
    if here is not None and not all(
        images < snapshot.images
        and (here.parent / image_folder(images) / storage.MANIFEST).is_file()
        for images in asked
    ):
        for images in asked:
            if gone := deletion(here.parent / image_folder(images)):
                raise UserError(f"sampler.weak={sampler.weak}: {gone}; take another weak model")
        check_snapshots(sampler.weak, snapshot.images, complete(here.parent))
    for each in models:
        _check_one(snapshot, each)


def _check_one(snapshot: Snapshot, asked: WeakModel) -> None:
    if asked.kind == CONDITION and snapshot.never_null:
        raise UserError(
            "sampler.weak=condition: this snapshot was trained with guidance.drop=0, and never learned to read images "
            "without their condition; take sampler.g=1, or another weak model"
        )
    if asked.kind == "head" and AUXILIARY not in snapshot.student.branches:
        raise UserError(
            "sampler.weak=head: this snapshot has no auxiliary head, which is trained beside the network with "
            "auxiliary.weight=0.5; take another weak model"
        )
    if asked.kind == "routed" and not getattr(snapshot.student.backbone.net, "route", 0.0):
        raise UserError(
            "sampler.weak=routed: this snapshot was trained without model.route, so no way skips tokens; take another "
            "weak model"
        )
    if asked.kind in ("average", "snapshot"):
        other_snapshot(snapshot, asked)


def other_snapshot(snapshot: Snapshot, asked: WeakModel) -> Snapshot:
    """The other average, or the earlier snapshot of the same run, where the student is.

    Raises:
        UserError: there is none, or it is of another network or other data.
    """
    here, field = snapshot.folder, f"sampler.weak={asked.word}"
    if here is None:
        raise UserError(f"{field}: this snapshot lies in no folder beside which another would be")
    if asked.average is not None:
        folder, average = here, asked.average
        if average == snapshot.average:
            raise UserError(
                f"{field} is the average that is guided itself, and leads nowhere; take another weak model"
            )
    else:
        assert asked.images is not None
        folder, average = here.parent / image_folder(asked.images), snapshot.average
    config = read_config(folder / CONFIG)
    first = next(snapshot.student.parameters())
    number = _index(config, average, field, snapshot.average)
    try:
        found = _read(folder, number, first.device, first.dtype)
    except FileNotFoundError as error:
        raise UserError(
            f"{field}: {error}, for it was damaged since it was published; take another weak model"
        ) from error
    if found.data.get("manifest") != snapshot.data.get("manifest"):
        raise UserError(f"{field} was trained on other data; take a snapshot of the same run")
    if found.student.backbone.net != snapshot.student.backbone.net:
        raise UserError(f"{field} is another network; take a snapshot of the same run")
    return found


def same_groups(snapshot: Snapshot, other: Snapshot, condition: Condition) -> Condition:
    """The condition that stands for the same groups in another snapshot of the run, with prototypes of its own.

    Prototypes drift while they are learned, so that those of one snapshot say nothing to another. What was not
    conditioned yet gets no condition; between two prototypes the nearer one counts.
    """
    if not other.conditioned:
        return Condition.unconditional(len(condition), condition.state.device)
    ours, theirs = snapshot.student.head, other.student.head
    if ours is None or theirs is None:
        return condition
    rows, its = ours.condition_rows(), theirs.condition_rows()

    def moved(values: Tensor | None) -> Tensor | None:
        # averaged rows are not of one length
        near = F.normalize(rows, dim=1).T
        return None if values is None else its[(values.to(rows.dtype) @ near).argmax(-1)]

    return replace(condition, dense=moved(condition.dense), patch=moved(condition.patch))


def _index(config: Config, average: AverageSpec, field: str, guided: AverageSpec) -> int:
    kept = averages_of(config)
    if average not in kept:
        others = " or ".join(f"average-{each.key}" for each in kept if each != guided)
        raise UserError(
            f"{field}: the snapshot holds no average {average.key}; take {others or 'another weak model'}"
        )
    return kept.index(average)


@functools.lru_cache(maxsize=4)
def _read(folder: Path, index: int, device: torch.device, dtype: torch.dtype) -> Snapshot:
    """A snapshot never changes; each batch of samples asks for it."""
    found = load(folder, index)
    found.student.to(device, dtype)
    return found
