"""Components beside guidance: they plug in without the loop, compose into one condition and one loss, and resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.conditions import UNCONDITIONAL, Condition
from selfguide.distributed import RankInfo
from selfguide.guidance.build import build_components
from selfguide.guidance.component import Component, Inputs, Stepped, Weights
from selfguide.guidance.online import PROTOTYPES, OnlineSource
from selfguide.networks.student import Outputs, Student
from selfguide.spec.config import LabelGuidance, NoGuidance, OnlineGuidance
from selfguide.spec.run import Lease, RunFolder
from selfguide.spec.schedules import due, learning_rate
from selfguide.training import checkpoint
from selfguide.training.components import Components
from selfguide.training.loop import advance
from selfguide.training.work import prepare_batch
from tests.selfguide.test_health import alone
from tests.selfguide.test_loop import BATCH, average, begun, masters, taught
from tests.selfguide.test_online import make, online_config


class Nudge(Component):
    """Draws predictions towards one, counts steps, and drops conditions on top of whoever conditioned."""

    name = "nudge"
    wants_teacher: ClassVar[bool] = False

    def __init__(self, weight: float = 0.1) -> None:
        self.weight, self.steps = weight, torch.zeros((), dtype=torch.int64)
        self.hooks: list[str] = []

    def condition(self, batch: Batch, teacher: Student | None, inputs: Inputs) -> Inputs:
        self.hooks.append("condition")
        return replace(inputs, condition=inputs.condition.drop(batch.position % 2 == 0))

    def loss(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> Tensor:
        self.hooks.append("loss")
        return self.weight * (outputs.prediction - 1).square().mean()

    def after_step(self, weights: Weights, step: Stepped) -> None:
        self.hooks.append("after_step")

    def after_average(self, weights: Weights, step: Stepped) -> None:
        self.hooks.append("after_average")
        self.steps += step.applied

    def report(self, images: int, teacher: Student | None) -> dict[str, float]:
        return {"nudged": float(self.steps)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps": self.steps.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor], rank: int) -> None:
        self.steps = state["steps"].clone()

    def metadata(self) -> dict[str, Any]:
        return {"nudge": self.weight, "label_free": False}


def test_a_second_component_trains_beside_guidance_without_the_loop_knowing_it(
    tmp_path: Path,
) -> None:
    plain, job = begun(tmp_path / "plain", 0), begun(tmp_path / "both", 0)
    nudge = Nudge()
    job.state.components = Components((*job.state.components, nudge))
    for each in (plain, job):
        advance(each)
    assert nudge.hooks == ["condition", "loss", "after_step", "after_average"]
    assert not torch.equal(masters(plain), masters(job)), "its loss moved the weights"
    line = job.telemetry.report(
        job.state.images, **job.state.components.report(BATCH, job.state.teaching)
    )
    assert line["nudge_loss"] > 0 and line["guidance_loss"] >= 0 and line["nudged"] == 1
    metadata = job.state.components.metadata()
    assert metadata["source"] == "online" and metadata["nudge"] == 0.1
    assert metadata["label_free"] is False, "one component that saw labels is enough"


class Darken(Component):
    """Halves the images at even positions."""

    name = "darken"

    def augment(self, x0: Tensor, position: Tensor) -> Tensor:
        return torch.where((position % 2 == 0)[:, None, None, None], 0.5 * x0, x0)


def test_images_are_augmented_before_they_are_noised(tmp_path: Path) -> None:
    plain, job = begun(tmp_path / "plain", 0), begun(tmp_path / "dark", 0)
    job.state.components = Components((*job.state.components, Darken()))
    whole, dark = (prepare_batch(each, next(each.stream)) for each in (plain, job))
    even = dark.position % 2 == 0
    assert torch.equal(dark.x0[even], 0.5 * whole.x0[even])
    assert torch.equal(dark.x0[~even], whole.x0[~even]) and torch.equal(dark.eps, whole.eps)
    tau = dark.tau.view(-1, 1, 1, 1)
    torch.testing.assert_close(dark.x, (1 - tau) * dark.x0 + tau * dark.eps)


def test_inputs_pass_through_components_in_their_order() -> None:
    _, teacher, source, batch = make(online_config(drop=0.0), images=600)
    both = Components((source, Nudge())).inputs(batch, teacher.module)
    swapped = Components((Nudge(), source)).inputs(batch, teacher.module)
    dropped = both.condition.state != 0
    assert torch.equal(dropped, batch.position % 2 == 0)
    assert not (swapped.condition.state != 0).any(), "guidance came last and conditioned anew"
    assert both.features is not None and swapped.features is not None
    assert torch.equal(both.features, swapped.features)


def test_no_component_is_unconditional_training() -> None:
    components = Components(build_components(replace(online_config(), guidance=NoGuidance()), []))
    _, _, _, batch = make(online_config(), images=0)
    inputs = components.inputs(batch, None)
    assert (inputs.condition.state == UNCONDITIONAL).all() and inputs.features is None
    assert not components and not components.want_teacher
    assert components.losses(Outputs(batch.x0, None, None), batch, None) == {}
    assert components.metadata() == {
        "source": "none", "told": False, "p": None, "label_free": True,
    }  # fmt: skip


def test_a_teacher_exists_where_a_component_asks_for_one() -> None:
    assert alone(online_config()).teaching is not None
    labels = replace(online_config(), guidance=LabelGuidance())
    assert alone(labels).teaching is None and alone(labels).teacher is None


def test_every_component_finds_its_own_state_in_a_checkpoint(
    single: RankInfo, tmp_path: Path
) -> None:
    """Guidance under the prefix that it has had since the first checkpoint."""
    job = begun(tmp_path, 0)
    job.state.components = Components((*job.state.components, Nudge()))
    advance(job)
    run = RunFolder(tmp_path)
    lease = Lease(run, run.open_attempt())
    assert job.state.components.state_dict().keys() == {"source.counters", "component.nudge.steps"}
    checkpoint.save(run.checkpoint(BATCH), job.state, single, lease)
    other, nudge = begun(tmp_path / "other", 0), Nudge()
    other.state.components = Components((*other.state.components, nudge))
    checkpoint.load(run.checkpoint(BATCH), other.state, single)
    assert nudge.steps == 1 and other.state.images == BATCH
    counters = [each.state.components.state_dict()["source.counters"] for each in (job, other)]
    assert counters[0].sum() == BATCH and torch.equal(counters[0], counters[1])


@pytest.mark.parametrize(
    "guidance",
    [
        {},
        {"condition_rows": "averaged", "revive": 0.9},
        {"prototype_gradient": "plain", "id_rows": "averaged", "teacher_rate": 0.5},
    ],
)
def test_a_step_that_is_not_applied_leaves_weights_averages_and_teacher(
    tmp_path: Path, guidance: dict[str, Any]
) -> None:
    """What is due by the count of images is done all the same: here, nothing is."""
    job = begun(tmp_path, 0, broken=(BATCH,), window=2 * BATCH, **guidance)
    advance(job)
    before = masters(job).clone(), average(job).clone(), taught(job)
    advance(job)
    assert job.state.images == 2 * BATCH
    assert torch.equal(masters(job), before[0]) and torch.equal(average(job), before[1])
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in taught(job).items())


def test_rows_are_normalised_where_the_step_was_applied_and_left_where_not() -> None:
    state = alone(online_config(condition_rows="averaged"))
    engine = state.engine
    rows = engine.layout.split(engine.gather(engine.masters))[PROTOTYPES]
    rows.mul_(3.0)
    long = rows.clone()
    (source,) = state.components
    source.after_step(state, Stepped(torch.tensor(False), 664, 64))
    assert torch.equal(rows, long)
    source.after_step(state, Stepped(torch.tensor(True), 664, 64))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(12))
    assert engine.module.head is not None and torch.equal(engine.module.head.prototypes, rows)


def test_hooks_of_the_base_do_nothing() -> None:
    component, state = Component(), alone(online_config())
    before = state.engine.gather(state.engine.masters).clone()
    inputs = Inputs(Condition.unconditional(2))
    _, _, _, batch = make(online_config(), images=0)
    assert component.condition(batch, None, inputs) is inputs
    assert component.augment(batch.x0, batch.position) is batch.x0
    assert component.loss(Outputs(batch.x0, None, None), batch, None) is None
    component.after_step(state, Stepped(torch.tensor(True), 64, 64))
    component.after_average(state, Stepped(torch.tensor(True), 64, 64))
    component.load_state_dict({}, 0)
    assert component.state_dict() == component.metadata() == component.report(64, None) == {}
    assert torch.equal(state.engine.gather(state.engine.masters), before)


def test_schedules_are_functions_of_the_images_seen() -> None:
    config = online_config(switch=0.5)
    assert (
        isinstance(config.guidance, OnlineGuidance)
        and config.guidance.switch_images(config.train) == 512
    )
    assert LabelGuidance().switch_images(config.train) == 0
    warm = replace(config, train=replace(config.train, warmup_images=256, learning_rate=1.0))
    assert [learning_rate(warm, n) for n in (0, 64, 192, 256)] == [0.25, 0.5, 1.0, 1.0]
    assert [due(100, images, 64) for images in (64, 128, 192, 256)] == [False, True, False, True]
    (source,) = build_components(config, [])
    assert isinstance(source, OnlineSource) and source.switch == 512
