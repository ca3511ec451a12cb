"""Internal guidance's head: what it learns from, whom it teaches, and what it is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from launcher.compose import compose
from selfguide.data.batch import Batch
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import build_objective
from selfguide.networks.auxiliary import NAME
from selfguide.networks.student import Student, build_student
from selfguide.representation.auxiliary import Auxiliary
from selfguide.representation.build import build_representation
from selfguide.spec.config import Config
from selfguide.spec.identity import identity
from selfguide.spec.sizes import architecture, footprint
from selfguide.spec.validate import validate
from shards.errors import UserError

COUNT = 4
WORDS = ["experiment=digits_uncond", "cluster=local", "auxiliary.weight=0.5", "auxiliary.layer=2"]


def config_of(*words: str) -> Config:
    return compose([*WORDS, *words])


def batch_of(config: Config) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(COUNT, 1, 8, 8, generator=generator) for _ in range(2))
    tau = torch.rand(COUNT, generator=generator)
    x = build_objective(config.path).preconditioning.noised(x0, eps, tau)
    position = torch.arange(COUNT)
    return Batch(x0, eps, tau, x, position, position, None, 0)


def moved(student: Student) -> Student:
    """With weights that are drawn anew, none of them zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return student


def loss_of(config: Config, student: Student) -> Tensor:
    batch, condition = batch_of(config), Condition.unconditional(COUNT)
    outputs = student(batch.x, batch.tau, condition)
    return Auxiliary(config).own_loss(outputs, batch, None)


@pytest.mark.parametrize("model", ["dit_digits", "uvit_digits"])
def test_the_loss_is_the_weighted_denoising_loss_of_the_head(model: str) -> None:
    config = config_of(f"model={model}")
    student, batch = moved(build_student(config, 0)), batch_of(config)
    condition = Condition.unconditional(COUNT)
    tokens = student.backbone.features(batch.x, batch.tau, condition, 2)
    made = student.branches[NAME](tokens, batch.tau, condition)
    assert made.shape == batch.x0.shape
    velocity = batch.eps - batch.x0
    expected = 0.5 * (made - velocity).square().mean()
    torch.testing.assert_close(loss_of(config, student), expected)


def test_a_head_begins_at_zero() -> None:
    config = config_of()
    student, batch = build_student(config, 0), batch_of(config)
    made = student(batch.x, batch.tau, Condition.unconditional(COUNT)).branches[NAME]
    assert not made.any()
    expected = 0.5 * (batch.eps - batch.x0).square().mean()
    torch.testing.assert_close(loss_of(config, student), expected)


def test_gradients_reach_the_layers_up_to_the_head_and_nothing_behind_it() -> None:
    config = config_of()
    student = moved(build_student(config, 0))
    loss_of(config, student).backward()
    backbone = student.backbone
    reached = [backbone.patchify, *backbone.blocks[:2], student.branches]
    behind = [*backbone.blocks[2:], backbone.final, backbone.final_modulation]
    for module in reached:
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    for module in behind:
        assert all(p.grad is None for p in module.parameters())


def test_the_network_beside_a_head_begins_with_the_weights_that_it_has_without() -> None:
    plain = build_student(compose([*WORDS[:2]]), 3)
    with_head = build_student(config_of(), 3)
    ours, theirs = plain.state_dict(), with_head.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    more = theirs.keys() - ours.keys()
    assert more and all(name.startswith("branches.auxiliary.") for name in more)


@pytest.mark.parametrize("model", ["dit_digits", "uvit_digits"])
def test_its_parameters_are_counted_exactly(model: str) -> None:
    config = config_of(f"model={model}")
    head = build_student(config, 0).branches[NAME]
    counted = sum(parameter.numel() for parameter in head.parameters())
    assert config.auxiliary.parameters(architecture(config)) == counted
    without = replace(config, auxiliary=replace(config.auxiliary, weight=None, layer=None))
    assert footprint(config).parameters - footprint(without).parameters == counted


def test_a_run_without_a_head_is_the_run_that_it_was() -> None:
    without, with_head = compose(WORDS[:2]), config_of()
    assert NAME not in identity(without, None)
    assert identity(with_head, None)[NAME] == {"weight": 0.5, "layer": 2}
    assert build_representation(without) == ()
    assert [each.name for each in build_representation(with_head)] == [NAME]


def test_where_nothing_else_is_said_the_head_is_at_two_sevenths_of_the_depth() -> None:
    for depth, layer in ((28, 8), (12, 3), (4, 1)):
        net = architecture(config_of(f"model.depth={depth}"))
        assert replace(config_of().auxiliary, layer=None).layer_in(net) == layer


REFUSED = [
    (["auxiliary.layer=5"], "auxiliary.layer=5.*1 to 4; take auxiliary.layer=2$"),
    (["auxiliary.layer=4"], "last of 4 layers.*auxiliary.layer=2"),
    (["model=unet_digits", "path=edm", "sampler=heun_edm"], "a UNet"),
    (["model.depth=1"], "auxiliary.layer=2.*1 to 1; take model.depth=3$"),
    (["model.depth=1", "auxiliary.layer=null"], "last of 1 layers.*take model.depth=2$"),
    (["auxiliary.weight=-1"], "auxiliary.weight=-1"),
    (["auxiliary.weight=null"], "auxiliary.layer=2 is read with"),
]


@pytest.mark.parametrize(("words", "names"), REFUSED)
def test_a_head_that_cannot_be_is_refused_with_a_cure(words: list[str], names: str) -> None:
    with pytest.raises(UserError, match=names) as refused:
        validate(config_of(*words))
    cure = str(refused.value).rpartition("take ")[2]
    if "=" in cure and " " not in cure:
        validate(config_of(*words, cure))
