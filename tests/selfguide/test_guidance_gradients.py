"""What each loss of online guidance may move, at both levels and in both views; what runs when ids are asked for."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.conditions import CONDITIONED, NULL, UNCONDITIONAL, Condition
from selfguide.diffusion.objectives import build_objective
from selfguide.guidance.component import Inputs
from selfguide.guidance.online import OnlineSource
from selfguide.guidance.prototypes import assign
from selfguide.networks.student import Outputs, Student, build_student
from selfguide.sampling.groups import patch_layout
from selfguide.sinkhorn import sinkhorn
from selfguide.snapshot import Snapshot
from selfguide.spec.config import Config, ModelConfig, OnlineGuidance
from selfguide.spec.sizes import architecture
from selfguide.training.teacher import Teacher
from tests.selfguide.test_online import inputs, make, online_config

PATCHES = 16
BOTH = pytest.mark.parametrize("level", ["image", "patch"])


def leveled(level: str, **guidance: Any) -> Config:
    pooling = {"pooling": "cls"} if level == "patch" else {}
    return online_config(level=level, **(pooling | guidance))


def stepped(config: Config, images: int = 600) -> tuple[Student, Teacher, OnlineSource, Batch, Any]:
    student, teacher, source, batch = make(config, images)
    outputs = forward(student, batch, inputs(source, batch, teacher))
    return student, teacher, source, batch, outputs


def forward(student: Student, batch: Batch, read: Inputs) -> Outputs:
    return student(batch.x, batch.tau, read.condition, read.features)


@BOTH
@pytest.mark.parametrize("setting", ["unconditional", "as_trained"])
@pytest.mark.parametrize("view", ["extraction", "training"])
def test_each_loss_moves_its_own_parameters_only(level: str, view: str, setting: str) -> None:
    if view == "extraction" and setting == "as_trained":
        setting = "unconditional"  # read with view training only
    config = leveled(level, view=view, view_condition=setting, mask=(0.2, 0.8))
    student, _, source, batch, outputs = stepped(config)
    guidance = source.loss(outputs, batch, None)
    assert student.head is not None
    flow = build_objective(config.path).losses(outputs.prediction, batch.x0, batch.eps, batch.tau)
    backbone, head = list(student.backbone.parameters()), list(student.head.parameters())
    by_guidance = torch.autograd.grad(
        guidance, backbone + head, retain_graph=True, allow_unused=True
    )
    assert all(g is None or not g.any() for g in by_guidance[: len(backbone)])
    assert all(g is not None and g.any() for g in by_guidance[len(backbone) :])
    by_flow = torch.autograd.grad(flow.mean(), backbone + head, allow_unused=True)
    assert all(g is None or not g.any() for g in by_flow[len(backbone) :])
    assert sum(g is not None and bool(g.any()) for g in by_flow[: len(backbone)]) > 40


@BOTH
def test_ids_are_each_image_s_own_and_blocks_behind_the_layer_never_run(level: str) -> None:
    config = leveled(level)
    _, teacher, source, batch = make(config, images=600)
    head = teacher.module.head
    assert head is not None
    head.norm.momentum = 1.0  # fresh statistics give every image one group
    head.train()(source.extract(batch, teacher.module))
    head.eval()
    ran: list[int] = []
    for number, block in enumerate(teacher.module.backbone.blocks, 1):  # type: ignore[arg-type]
        block.register_forward_hook(lambda *_, n=number: ran.append(n))  # type: ignore[misc]
    together = assign(teacher.module, source.extract(batch, teacher.module))
    assert ran == [1, 2, 3]
    each = len(together) // len(batch.x0)
    assert each == (PATCHES if level == "patch" else 1) and len(together.unique()) > 1
    alone = []
    for i in range(8):
        parts = {n: getattr(batch, n)[i : i + 1] for n in ("x0", "eps", "tau", "x", "position")}
        alone.append(
            assign(teacher.module, source.extract(replace(batch, **parts), teacher.module))
        )
    assert torch.equal(torch.cat(alone), together[: 8 * each])


def test_the_prototypes_length_changes_no_score_and_no_score_changes_the_prototypes() -> None:
    student, _, _, _ = make(online_config(), images=0)
    assert student.head is not None
    features = torch.randn(8, student.head.hidden.in_features)
    student.head.eval()
    before = student.head(features)
    with torch.no_grad():
        student.head.prototypes.mul_(3.0)
    held = student.head.prototypes.clone()
    torch.testing.assert_close(student.head(features), before)
    assert torch.equal(student.head.prototypes, held) and before.abs().max() <= 1 + 1e-6


# --- patches


def test_patches_are_conditioned_on_their_own_rows_and_dropped_one_by_one() -> None:
    config = leveled("patch", drop=0.25)
    _, teacher, source, batch = make(config, images=448)
    assert (inputs(source, batch, teacher).condition.state == UNCONDITIONAL).all()
    batch.images = 600
    condition = inputs(source, batch, teacher).condition
    assert condition.patch is not None and condition.patch.shape == (64, PATCHES, 32)
    ids = assign(teacher.module, source.extract(batch, teacher.module)).view(64, PATCHES)
    rows = teacher.module.head.rows()  # type: ignore[union-attr]
    for image in (0, 17, 63):
        for patch in (0, 5, 15):
            assert torch.equal(condition.patch[image, patch], rows[ids[image, patch]])
    assert condition.state.shape == (64, PATCHES)
    nulls = condition.state == NULL
    share, sigma = nulls.float().mean().item(), math.sqrt(0.25 * 0.75 / nulls.numel())
    assert abs(share - 0.25) < 4 * sigma
    mixed = nulls.any(1) & ~nulls.all(1)  # not by image
    assert mixed.sum() > 55
    again = inputs(source, batch, teacher).condition
    assert torch.equal(again.state, condition.state), "the same images drop the same patches"


@pytest.mark.parametrize("name", ["dit_digits", "uvit_digits"])
def test_a_dropped_patch_gets_the_null_row_whatever_it_held(name: str) -> None:
    config = replace(leveled("patch", prototype_width=None), model=ModelConfig(name=name))
    student = build_student(config, 0)
    patches = student.backbone.patches
    state = torch.zeros(2, PATCHES, dtype=torch.int64)
    state[0, 3], state[1, 7] = NULL, UNCONDITIONAL
    values = torch.randn(2, PATCHES, 64)
    values[0, 3] = float("nan")
    embedded = patches(Condition(state, patch=values), PATCHES)  # type: ignore[operator]
    assert torch.equal(embedded[0, 3], patches.one.null)  # type: ignore[union-attr]
    assert torch.equal(embedded[1, 7], patches.one.unconditional)  # type: ignore[union-attr]
    condition = patches(Condition.of(patch=values), PATCHES)  # type: ignore[operator]
    kept = state == CONDITIONED
    assert torch.equal(embedded[kept], condition[kept]) and embedded.isfinite().all()
    # all patches dropped is what guidance compares with, and has no row that training never saw
    whole = Condition.of(patch=values).drop(torch.ones(2, dtype=torch.bool))
    single = Condition.of(patch=values).drop(torch.ones(2, PATCHES, dtype=torch.bool))
    x, tau = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert torch.equal(student.predict(x, tau, whole), student.predict(x, tau, single))


def test_the_parameters_of_patch_nets_are_those_of_their_formula() -> None:
    for name in ("dit_digits", "uvit_digits"):
        config = replace(leveled("patch", prototype_width=None), model=ModelConfig(name=name))
        net, student = architecture(config), build_student(config, 0)
        assert sum(p.numel() for p in student.backbone.parameters()) == net.parameters()
        assert student.head is not None and isinstance(config.guidance, OnlineGuidance)
        held = sum(p.numel() for p in student.head.parameters())
        assert held == config.guidance.head(net).parameters


@pytest.mark.parametrize("over", ["counted", "all"])
def test_the_patches_mask_repeats_each_images_time_and_is_not_tiled(over: str) -> None:
    """Against a loop over images and patches; the published code tiles times, which meets other images' patches."""
    low, high = 0.3, 0.6
    config = leveled("patch", view="training", mask=(low, high), codes_over=over, weight=1.0)
    _, _, source, batch, outputs = stepped(config)
    scores = outputs.scores.detach()
    inside = [
        i * PATCHES + p for i in range(64) if low <= batch.tau[i] <= high for p in range(PATCHES)
    ]
    assert 0 < len(inside) < len(scores)
    if over == "all":
        codes = sinkhorn(scores)[inside]
    else:
        codes = sinkhorn(scores[inside])
    expected = 0.0
    for row, code in zip(inside, codes, strict=True):
        expected -= float((code * F.log_softmax(scores[row] / 0.1, dim=0)).sum())
    loss = source.loss(outputs, batch, None)
    assert loss.item() == pytest.approx(expected / len(inside), rel=1e-5)


def test_a_layout_query_asks_each_image_alone_and_conditions_every_patch() -> None:
    config = leveled("patch")
    student, _, _, _ = make(config, images=0)
    student.eval()
    snapshot = Snapshot(student, config, 0, {"told": True}, {}, "", 0, False, {})
    x0 = torch.randn(3, 1, 8, 8)
    layout = patch_layout(snapshot, x0)
    assert layout.patch is not None and layout.patch.shape == (3, PATCHES, 32)
    assert layout.state.shape == (3,) and (layout.state == CONDITIONED).all()
    alone = patch_layout(snapshot, x0[1:2])
    torch.testing.assert_close(alone.patch, layout.patch[1:2])
    assert len(layout.patch.flatten(0, 1).unique(dim=0)) > 1


# --- switches: each changes what it says and nothing else


def loss_of(changes: dict[str, Any]) -> tuple[float, Tensor, Batch, Outputs]:
    config = online_config(view="training", mask=(0.3, 0.6), **changes)
    _, _, source, batch, outputs = stepped(config)
    loss = source.loss(outputs, batch, None)
    return loss.item(), outputs.scores.detach(), batch, outputs


def test_the_mean_over_all_is_the_mean_over_the_counted_times_their_share() -> None:
    counted, _, batch, _ = loss_of({})
    everything, _, _, _ = loss_of({"mean_over": "all"})
    share = ((batch.tau >= 0.3) & (batch.tau <= 0.6)).float().mean().item()
    assert everything == pytest.approx(counted * share, rel=1e-5) and 0.2 < share < 0.4


def test_codes_over_all_are_sinkhorns_of_every_noise_time() -> None:
    counted, scores, batch, _ = loss_of({})
    everything, same, _, _ = loss_of({"codes_over": "all"})
    assert torch.equal(scores, same) and counted != everything
    inside = (batch.tau >= 0.3) & (batch.tau <= 0.6)
    logs = F.log_softmax(scores[inside] / 0.1, dim=1)
    for loss, codes in (
        (counted, sinkhorn(scores[inside])),
        (everything, sinkhorn(scores)[inside]),
    ):
        assert loss == pytest.approx(-(codes * logs).sum(1).mean().item(), rel=1e-5)


def test_the_heads_view_is_unconditional_or_as_trained() -> None:
    for setting in ("unconditional", "as_trained"):
        config = online_config(view="training", view_condition=setting, drop=0.0)
        student, teacher, source, batch, outputs = stepped(config)
        read = inputs(source, batch, teacher)
        if setting == "unconditional":
            nothing = Condition.unconditional(64)
            features = teacher.module.features(batch.x, batch.tau, nothing)
            assert read.features is not None and torch.equal(read.features, features)
        else:
            assert read.features is None
            other = student(batch.x, batch.tau, Condition.unconditional(64), None)
            assert not torch.allclose(outputs.scores, other.scores, atol=1e-4)


def test_ids_are_extracted_in_noise_of_their_own_or_the_steps() -> None:
    for noise in ("own", "training"):
        config = online_config(extraction_noise=noise)
        _, teacher, source, batch = make(config, images=600)
        before = source.extract(batch, teacher.module)
        other = replace(batch, eps=torch.randn_like(batch.eps))
        moved = not torch.equal(source.extract(other, teacher.module), before)
        assert moved == (noise == "training")


def test_what_stands_for_nothing_is_a_learned_row_or_zeros() -> None:
    for unconditional in ("embedding", "zero"):
        student, _, _, _ = make(online_config(unconditional=unconditional), images=0)
        embedding = student.backbone.condition
        row = embedding(Condition.unconditional(1))  # type: ignore[operator]
        null = embedding(Condition.unconditional(1).drop(torch.ones(1, dtype=torch.bool)))  # type: ignore[operator]
        assert torch.equal(row, null), "unconditional images are never dropped"
        assert bool(row.any()) == (unconditional == "embedding")
        nulled = embedding(Condition(torch.tensor([NULL])))  # type: ignore[operator]
        assert torch.equal(nulled[0], embedding.null)  # type: ignore[union-attr]
        row.sum().backward()
        moved = embedding.unconditional.grad.any()  # type: ignore[union-attr]
        assert bool(moved) == (unconditional == "embedding")


def test_condition_rows_are_unit_or_the_average_as_it_is() -> None:
    for setting in ("unit", "averaged"):
        config = online_config(condition_rows=setting, drop=0.0)
        _, teacher, source, batch = make(config, images=600)
        assert teacher.module.head is not None
        teacher.module.head.prototypes.data.mul_(0.9)
        lengths = inputs(source, batch, teacher).condition.dense.norm(dim=1)  # type: ignore[union-attr]
        wanted = (
            1.0 if setting == "unit" else teacher.module.head.prototypes.norm(dim=1).max().item()
        )
        assert lengths.max().item() == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(1.0, abs=0.01)


def test_queues_of_another_number_of_ranks_are_said_to_be_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, _, source, _ = make(online_config(queue=48), 512)
    state = {"counters": source.state_dict()["counters"], "queue-0": torch.rand(48, 32)}
    source.load_state_dict(state, 0)
    assert not caplog.records
    source.load_state_dict(state | {"queue-1": torch.rand(48, 32)}, 0)
    (said,) = caplog.messages
    assert "goes on with 1 ranks, and 2 had a queue" in said


def test_a_queue_joins_sinkhorn_and_gets_no_loss() -> None:
    config = online_config(queue=48)
    student, teacher, source, batch, first = stepped(config)
    losses = [source.loss(first, batch, None)]
    recent = first.embedding[-48:]
    outputs = forward(student, batch, inputs(source, batch, teacher))
    losses.append(source.loss(outputs, batch, None))
    rows = torch.cat((outputs.scores.detach(), recent @ outputs.prototypes.T))
    codes = sinkhorn(rows)[:64]
    expected = -(codes * F.log_softmax(outputs.scores / 0.1, dim=1)).sum(1).mean()
    assert losses[1].item() == pytest.approx(expected.item(), rel=1e-5)
    alone = -(sinkhorn(outputs.scores) * F.log_softmax(outputs.scores / 0.1, dim=1)).sum(1).mean()
    assert losses[1].item() != pytest.approx(alone.item(), rel=1e-5)
    resumed = OnlineSource(config.guidance, config.path, 0, 512)  # type: ignore[arg-type]
    resumed.load_state_dict(source.state_dict(), rank=0)
    again = [s.loss(outputs, batch, None) for s in (source, resumed)]
    assert torch.equal(again[0], again[1])  # type: ignore[arg-type]
    # a run that goes back forgets what came later
    kept = resumed.state_dict()
    resumed.loss(outputs._replace(embedding=-outputs.embedding), batch, None)
    assert not torch.equal(resumed.state_dict()["queue-0"], kept["queue-0"])
    resumed.load_state_dict(kept, rank=0)
    assert torch.equal(resumed.state_dict()["queue-0"], kept["queue-0"])


def test_an_epsilon_below_fp32s_range_still_separates_prototypes() -> None:
    config = online_config(epsilon=0.005)
    _, _, source, batch, outputs = stepped(config)
    loss = source.loss(outputs, batch, None)
    assert loss.isfinite() and loss > 0
