"""Self-representation alignment: whose features are compared, in how much noise, and whom the distance teaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from launcher.compose import compose
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.guidance.component import Inputs, Stepped
from selfguide.networks.projector import NAME
from selfguide.networks.student import Outputs, Student, build_student
from selfguide.representation.align import Align
from selfguide.spec.config import Config, NoGuidance
from selfguide.spec.config.align import AlignConfig
from selfguide.spec.config.auxiliary import AuxiliaryConfig
from selfguide.spec.run import RunFolder
from selfguide.spec.sizes import architecture, footprint
from selfguide.spec.validate import validate
from selfguide.training.flops import count_flops
from shards.errors import UserError
from tests.selfguide.test_auxiliary import COUNT, batch_of, moved
from tests.selfguide.test_training import IMAGES, assert_same, attempt, weights
from tests.selfguide.test_training import config as training_config

WORDS = [
    "experiment=digits_class", "cluster=local", "align.weight=0.2", "align.layer=1", "align.teacher_layer=3",
]  # fmt: skip
IDS = Condition.of(id=torch.arange(COUNT))


def config_of(*words: str) -> Config:
    return compose([*WORDS, *words])


def students(config: Config) -> tuple[Student, Student]:
    """A student, and a teacher of other weights."""
    teacher = moved(build_student(config, 1)).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.data *= 1.1
    return moved(build_student(config, 0)), teacher


def distance(
    config: Config, student: Student, teacher: Student, condition: Condition = IDS
) -> tuple[Tensor, Outputs, Align]:
    component, batch = Align(config), batch_of(config)
    inputs = component.condition(batch, teacher, Inputs(condition))
    assert inputs.condition is condition
    outputs = student(batch.x, batch.tau, inputs.condition)
    return component.own_loss(outputs, batch, teacher), outputs, component


def test_the_teacher_sees_the_same_noise_at_a_lower_time_that_is_never_below_0() -> None:
    config = config_of("align.noise_gap=0.5")
    component, batch = Align(config), batch_of(config)
    lower = component.lower(batch)
    assert (lower >= 0).all() and (lower <= batch.tau).all() and (batch.tau - lower <= 0.5).all()
    assert torch.equal(lower, component.lower(replace(batch)))
    alike = replace(batch, tau=torch.zeros(COUNT))
    assert not component.lower(alike).any()
    other = component.lower(replace(batch, position=batch.position + 1))
    assert not torch.equal(lower, other)


@pytest.mark.parametrize(
    ("path", "end"), [("edm", 0.002 / 1.002), ("ddpm", 0.001), ("vp", 1e-4), ("sgfm", 0.0)]
)
def test_the_teacher_sees_no_noise_that_its_path_does_not_have(path: str, end: float) -> None:
    config = config_of(f"path={path}", "align.noise_gap=1")
    tau = torch.tensor([end / 2, end, 0.5, 0.9])
    lower = Align(config).lower(replace(batch_of(config), tau=tau))
    assert (lower <= tau).all() and (lower[2:] >= end - 1e-9).all()
    # of less than that there is none
    torch.testing.assert_close(lower[:2], tau[:2])
    assert lower[2] < 0.5


def test_the_distance_is_the_smooth_l1_to_the_teachers_later_layer() -> None:
    config = config_of()
    student, teacher = students(config)
    loss, outputs, component = distance(config, student, teacher)
    batch = batch_of(config)
    lower = component.lower(batch)
    x = build_preconditioning(config.path).noised(batch.x0, batch.eps, lower)
    wanted = teacher.backbone.features(x, lower, IDS, 3)
    gap = (outputs.branches[NAME] - wanted).abs()
    expected = torch.where(gap < 0.05, gap.square() / 0.1, gap - 0.025).mean()
    torch.testing.assert_close(loss, 0.2 * expected)


def test_without_a_gap_and_a_projector_that_copies_a_network_agrees_with_itself() -> None:
    config = config_of("align.noise_gap=0", "align.layer=1", "align.teacher_layer=2")
    student, teacher = students(config)
    teacher.load_state_dict(student.state_dict())
    loss, outputs, component = distance(config, student, teacher)
    batch = batch_of(config)
    component.condition(batch, teacher, Inputs(IDS))
    same = teacher.backbone.features(batch.x, batch.tau, IDS, 2)
    exact = outputs._replace(branches={NAME: same})
    assert not component.own_loss(exact, batch, teacher).any() and loss > 0


def test_the_teacher_reads_the_condition_of_the_step() -> None:
    config = config_of()
    student, teacher = students(config)
    batch, component = batch_of(config), Align(config)
    told, untold = (component.target(batch, each, teacher) for each in (IDS, IDS.null()))
    assert (told - untold).abs().max() > 1e-3
    for condition in (IDS, IDS.null()):
        loss, outputs, _ = distance(config, student, teacher, condition)
        gap = outputs.branches[NAME] - component.target(batch, condition, teacher)
        assert loss == 0.2 * torch.nn.functional.smooth_l1_loss(gap, 0 * gap, beta=0.05)


def test_gradients_reach_the_student_up_to_its_layer_and_never_the_teacher() -> None:
    config = config_of()
    student, teacher = students(config)
    distance(config, student, teacher.requires_grad_(True))[0].backward()
    backbone = student.backbone
    for module in (backbone.blocks[0], student.branches):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    for module in (*backbone.blocks[1:], backbone.final):
        assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_each_micro_batch_of_a_step_meets_its_own_condition() -> None:
    config = config_of()
    student, teacher = students(config)
    component = Align(config)
    batches = [batch_of(config), replace(batch_of(config), x0=batch_of(config).x0 + 1)]
    for batch, condition in zip(batches, (IDS, IDS.null()), strict=True):
        component.condition(batch, teacher, Inputs(condition))
    for batch, condition in zip(batches, (IDS, IDS.null()), strict=True):
        outputs = student(batch.x, batch.tau, condition)
        own = distance(config, student, teacher, condition)[2]
        own.condition(batch, teacher, Inputs(condition))
        assert component.own_loss(outputs, batch, teacher) == own.own_loss(outputs, batch, teacher)


class Refreshed:
    """Notes what a component asks of the weights."""

    def __init__(self) -> None:
        self.at: list[bool] = []

    def refresh_teacher(self, *, buffers: bool) -> None:
        self.at.append(buffers)


@pytest.mark.parametrize(("experiment", "times"), [("digits_class", 2), ("digits_dit", 0)])
def test_it_refreshes_a_teacher_that_nobody_else_keeps(experiment: str, times: int) -> None:
    config = compose([f"experiment={experiment}", *WORDS[1:]])
    component, weights = Align(config), Refreshed()
    for images in range(128, 2048 + 1, 128):
        weighed: Any = weights
        component.after_average(weighed, Stepped(torch.tensor(True), images, 128))
    assert weights.at == [True] * times


def test_its_parameters_are_counted_exactly() -> None:
    config = config_of()
    counted = sum(p.numel() for p in build_student(config, 0).branches[NAME].parameters())
    assert config.align.parameters(architecture(config)) == counted
    without = compose(WORDS[:2])
    more = footprint(config)
    assert more.parameters - footprint(without).parameters == counted
    assert more.teacher == 4 * more.parameters and footprint(without).teacher == 0


def test_flops_count_what_the_teacher_reads_as_well() -> None:
    config = config_of()
    student, teacher = students(config)
    x, tau, condition = torch.zeros(1, 1, 8, 8), torch.zeros(1), Condition.unconditional(1)
    tokens = student.backbone.features(x, tau, condition, 1)
    found = []
    for work in (
        lambda: teacher.backbone.features(x, tau, condition, 3),
        lambda: student.branches[NAME](tokens, tau, condition),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        found.append(counter.get_total_flops())
    more = count_flops(config).training - count_flops(compose(WORDS[:2])).training
    # the projector learns, the teacher does not
    assert more == found[0] + 3 * found[1] > 0


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [pytest.param("torch", "bf16", marks=pytest.mark.slow), ("deepspeed", "fp32")],
)
def test_a_resumed_run_on_two_ranks_ends_with_the_same_bits(
    ranks: Any, digits: Path, tmp_path: Path, backend: str, dtype: str
) -> None:
    """Beside a head and self-conditioning; between two refreshes of the teacher."""
    cfg = training_config(digits, backend, dtype)
    cfg = replace(
        cfg,
        guidance=NoGuidance(),
        model=replace(cfg.model, self_condition="2"),
        align=AlignConfig(weight=0.2, layer=1, teacher_layer=3, teacher_refresh=192),
        auxiliary=AuxiliaryConfig(weight=0.5, layer=2),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for root in (whole, parts):
        ranks(2, attempt, cfg, str(root))
    for folder in [*(parts / "checkpoints").glob("img-*"), *(parts / "snapshots").glob("img-*")]:
        if int(folder.name[4:]) > IMAGES // 2:
            (folder / "MANIFEST.json").unlink()
    assert RunFolder(parts).saved()[-1] == IMAGES // 2
    assert ranks(2, attempt, cfg, str(parts)) == [2, 2]
    assert_same(weights(parts), weights(whole))
    names = weights(whole)
    for part in ("branches.align.", "branches.auxiliary.", "backbone.self_condition."):
        assert any(name.startswith(part) for name in names), part


REFUSED = [
    (["align.layer=5"], "align.layer=5.*take align.layer=1$"),
    (["align.layer=4", "align.teacher_layer=4"], "align.layer=4.*take align.layer=1$"),
    (["align.teacher_layer=9"], "align.teacher_layer=9"),
    (["align.layer=3", "align.teacher_layer=3"], "no later than align.layer=3.*teacher_layer=4"),
    (["align.noise_gap=2"], "align.noise_gap=2"),
    (["align.teacher_refresh=100"], "align.teacher_refresh=100.*=128"),
    (["align.weight=null"], "is read with"),
]


@pytest.mark.parametrize(("words", "names"), REFUSED)
def test_an_alignment_that_cannot_be_is_refused_with_a_cure(words: list[str], names: str) -> None:
    with pytest.raises(UserError, match=names):
        validate(config_of(*words))


def test_a_network_of_one_layer_is_refused_with_a_depth_that_works() -> None:
    words = [*WORDS[:3], "model.depth=1"]
    with pytest.raises(UserError, match=r"align\.weight=0\.2 needs a layer.*take model\.depth=3$"):
        validate(compose(words))
    validate(compose([*words, "model.depth=3"]))
