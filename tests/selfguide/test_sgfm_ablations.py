"""SGFM's ablations (section 5.2) as settings: the gradient of L_SK, and the warm-up of its weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from selfguide.spec.config import Config
from selfguide.spec.identity import identity
from shards.errors import UserError
from tests.selfguide.test_online import inputs, make, online_config

TRAINED = {"view": "training", "view_condition": "as_trained", "mask": (0.2, 0.8)}


@pytest.mark.parametrize("level", ["image", "patch"])
@pytest.mark.parametrize("stopped", [True, False])
def test_the_gradient_of_the_code_loss_reaches_the_backbone_only_where_it_is_let(
    level: str, stopped: bool
) -> None:
    pooling = {"pooling": "cls"} if level == "patch" else {}
    config = online_config(level=level, stop_gradient=stopped, **pooling, **TRAINED)
    student, teacher, source, batch = make(config, images=600)
    read = inputs(source, batch, teacher)
    outputs = student(batch.x, batch.tau, read.condition, read.features)
    weights = list(student.backbone.parameters())
    found = torch.autograd.grad(source.loss(outputs, batch, None), weights, allow_unused=True)
    moved = sum(each is not None and bool(each.any()) for each in found)
    assert (moved == 0) if stopped else (moved > 20)


def test_values_of_scores_are_the_same_with_and_without_the_stop() -> None:
    scores = []
    for stopped in (True, False):
        config = online_config(stop_gradient=stopped, **TRAINED)
        student, teacher, source, batch = make(config, images=600)
        read = inputs(source, batch, teacher)
        scores.append(student(batch.x, batch.tau, read.condition, read.features).scores)
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    ("warmup", "wanted"), [("linear", [0.25, 0.5, 1.0]), ("none", [1.0, 1.0, 1.0])]
)
def test_the_weight_of_the_code_loss_rises_to_the_switch_or_is_whole_at_once(
    warmup: str, wanted: list[float]
) -> None:
    values = []
    for images in (128, 256, 512):
        student, teacher, source, batch = make(online_config(warmup=warmup), images=256)
        read = inputs(source, batch, teacher)
        outputs = student(batch.x, batch.tau, read.condition, read.features)
        batch.images = images
        values.append(source.loss(outputs, batch, None).item())
    assert [round(value / values[-1], 6) for value in values] == wanted


def test_the_settings_at_their_published_values_leave_no_trace_in_an_identity() -> None:
    plain = identity(online_config(), "m")["guidance"]
    assert not {"stop_gradient", "warmup"} & set(plain)
    changed = identity(online_config(stop_gradient=False, warmup="none", **TRAINED), "m")[
        "guidance"
    ]
    assert changed["stop_gradient"] is False and changed["warmup"] == "none"


@pytest.mark.parametrize(
    ("guidance", "train", "names"),
    [
        ({}, {}, "guidance.view=extraction"),
        ({"view": "training", "mask": (0.2, 0.8)}, {}, "view_condition=as_trained"),
        (TRAINED, {"micro_batch": 16}, "accumulates"),
    ],
)
def test_a_gradient_that_has_no_way_to_the_backbone_is_refused(
    guidance: dict[str, Any], train: dict[str, Any], names: str
) -> None:
    config: Config = online_config(stop_gradient=False, **guidance)
    config = replace(config, train=replace(config.train, **train))
    with pytest.raises(UserError, match=names):
        config.guidance.check(config)
