"""The condition that the command line of `python -m tools.sample` asks for."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder
from selfguide.diffusion.conditions import Condition
from selfguide.discovery.agreement import matched
from selfguide.sampling import queries
from selfguide.sampling.condition_sampler import (
    TrainingImages,
    clusters_of,
    condition_sampler,
    conditions_each_patch,
)
from selfguide.sampling.group_names import Naming, without_banned
from selfguide.sampling.groups import patch_layout
from selfguide.snapshot import Snapshot
from selfguide.spec.weak import CONDITION, weak_models
from shards import cli
from shards.errors import UserError
from shards.format.classes import label_of
from tools.sample_queries import others_of, query_images

# conditions that are named, rather than sampled
NAMED = ("group", "label", "matched", "row", "like", "between", "uncond")
# training images whose groups and labels are compared at once
_PART = 512


def condition_of(
    snapshot: Snapshot, naming: Naming, codec: Autoencoder | None, options: argparse.Namespace
) -> Condition:
    """The condition that the command line asks for, one an image."""
    named = [f"--{name}" for name in NAMED if getattr(options, name)]
    if options.prior and named:
        raise UserError(
            f"--prior {options.prior} sets how groups are sampled, and {named[0]} names the condition; drop one of them"
        )
    others = others_of(options)
    if options.row is not None:
        each = -(-options.count // len(options.row))
        return queries.rows(snapshot, torch.tensor(options.row).repeat_interleave(each), others)
    if options.between and queries.conditioned_on_features(snapshot):
        return queries.between_images(snapshot, _ordinals(options.between), options.count, others)
    if options.between:
        first, second = (naming.number(text) for text in options.between)
        naming.refuse_banned((first, second))
        return queries.between(snapshot, first, second, options.count)
    if options.uncond:
        by_condition = all(
            each.kind == CONDITION
            for each in weak_models(options.weak or snapshot.config.sampler.weak)
        )
        if options.g not in (None, 1) and by_condition:
            raise UserError(
                f"--uncond --g {options.g:g}: without a condition there is none to be guided by; leave out --g, or "
                "give --weak another model"
            )
        return queries.without_condition(snapshot, options.count)
    if options.label is not None:
        ids = queries.labels(snapshot, options.label)
    elif options.matched is not None:
        ids = matched_groups(snapshot, options.matched)
    elif options.group is not None:
        ids = torch.tensor([naming.number(text) for text in options.group])
    elif options.like:
        images = query_images(snapshot, codec, options.like, others)
        if conditions_each_patch(snapshot) and snapshot.conditioned:
            each = -(-options.count // len(images))
            numbers = torch.arange(len(images)).repeat_interleave(each)
            return patch_layout(snapshot, images.repeat_interleave(each, 0), numbers)
        ids = queries.nearest_groups(snapshot, images)
        for text, group in zip(options.like, ids.tolist(), strict=True):
            _say(f"{text} is nearest to group {naming.called(group)}")
    else:
        seeds = options.seed + torch.arange(options.count)
        allowed = without_banned(snapshot, naming)
        return condition_sampler(allowed, options.prior or "empirical")(seeds)
    naming.refuse_banned(ids.tolist())
    each = -(-options.count // len(ids))
    return queries.of_groups(snapshot, ids.repeat_interleave(each))


def matched_groups(snapshot: Snapshot, texts: list[str]) -> Tensor:
    """(B,) for each human label, by number or name, the group that the training images match it with, one to one.

    The match is the one of all that keeps most images (Kuhn 1955, the Hungarian method), after training: a group that
    stands for a class was not conditioned on it. Of a snapshot that is conditioned on labels these are the labels
    themselves.

    Raises:
        UserError: the images have no labels, or no group is left for a label.
    """
    if snapshot.guidance["source"] == "labels":
        return queries.labels(snapshot, texts)
    groups = queries.groups(snapshot)
    images = TrainingImages(snapshot)
    if not images.classes:
        raise UserError(
            f"--matched: {snapshot.data['root']} has no labels to match groups with; name groups by --group"
        )
    wanted = [label_of(text, snapshot.class_names, images.classes) for text in texts]
    parts = torch.arange(images.count).split(_PART)
    shown = cli.track(parts, len(parts), "groups and labels of the training images")
    both = [(clusters_of(snapshot, part), images.labels(part)) for part in shown]
    ids, labels = (torch.cat([each[n].cpu() for each in both]).numpy() for n in (0, 1))
    found = matched(labels, ids)
    group_of = {label: group for group, label in found.one_to_one.items()}
    for text, label in zip(texts, wanted, strict=True):
        if label not in group_of:
            raise UserError(
                f"--matched {text}: {groups} groups leave none for this one of {images.classes} labels; name a group "
                "by --group"
            )
        _say(f"label {text} is matched with group {group_of[label]}")
    _say(
        f"matched one to one, groups tell the labels of {found.accuracy:.1%} of the training images"
    )
    return torch.tensor([group_of[label] for label in wanted])


def _ordinals(texts: list[str]) -> Tensor:
    for text in texts:
        if not text.isdigit():
            raise UserError(
                f"--between {' '.join(texts)}: this snapshot is conditioned on features of images; give the ordinals "
                "of two"
            )
    return torch.tensor([int(text) for text in texts])


def _say(text: str) -> None:
    # however long a file's name in it is
    cli.console(stderr=True).print(text, soft_wrap=True)
