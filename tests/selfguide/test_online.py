"""The online head and source: what L_SK may move, what it may not, and statistics over all ranks."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from selfguide.data.batch import Batch
from selfguide.diffusion import conditions
from selfguide.diffusion.conditions import UNCONDITIONAL
from selfguide.distributed import RankInfo, sum_over_ranks
from selfguide.guidance.component import Component, Inputs
from selfguide.guidance.health import PROBE
from selfguide.guidance.online import OnlineSource
from selfguide.guidance.prototype_counts import CONDITIONED
from selfguide.networks.head import GlobalBatchNorm
from selfguide.networks.student import Student, build_student
from selfguide.spec.config import (
    ClusterConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OnlineGuidance,
    PathConfig,
    SamplerConfig,
    TrainConfig,
)
from selfguide.training.components import Components
from selfguide.training.teacher import Teacher

SIZES = (5, 0, 11)


def online_config(**guidance: Any) -> Config:
    return Config(
        experiment="test",
        model=ModelConfig(name="dit_digits"),
        path=PathConfig(),
        sampler=SamplerConfig(),
        guidance=OnlineGuidance(
            groups=12, layer=3, **({"pooling": "flat", "prototype_width": 32} | guidance)
        ),
        data=DataConfig(root="", shape=(1, 8, 8), classes=10),
        train=TrainConfig(images=1024, batch=64),
        engine=EngineConfig(),
        evaluation=EvaluationConfig(),
        cluster=ClusterConfig(kind="local", gpus_per_node=2),
    )


def make(
    config: Config, images: int, switch: int = 512
) -> tuple[Student, Teacher, OnlineSource, Batch]:
    student, generator = build_student(config, 0), torch.Generator().manual_seed(1)
    for parameter in student.backbone.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    teacher = Teacher(build_student(config, 0))
    teacher.refresh(dict(student.named_parameters()), student)  # type: ignore[arg-type]
    source = OnlineSource(config.guidance, config.path, 0, switch)  # type: ignore[arg-type]
    x0, eps = torch.randn(2, 64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tau = torch.linspace(0.01, 0.99, 64)
    batch = Batch(x0, eps, tau, (1 - tau.view(-1, 1, 1, 1)) * x0 + tau.view(-1, 1, 1, 1) * eps,
                  torch.arange(64), torch.arange(64), None, images)  # fmt: skip
    return student, teacher, source, batch


def inputs(source: Component, batch: Batch, teacher: Teacher) -> Inputs:
    """What a step reads with `source` as its only component."""
    return Components((source,)).inputs(batch, teacher.module)


def test_health_asks_again_for_images_as_they_were_before_they_were_augmented() -> None:
    """Of a micro-batch that is larger than what it keeps."""
    _, teacher, source, batch = make(online_config(), images=448)
    several = replace(
        batch,
        **{
            name: getattr(batch, name).repeat(6, *[1] * (getattr(batch, name).dim() - 1))
            for name in ("x0", "eps", "tau", "x", "position", "ordinal")
        },
    )
    several = replace(several, unaugmented=several.x0.flip(-1))
    source.health.see(several)
    assert source.health.probe is not None and len(source.health.probe.x0) == PROBE < len(
        several.x0
    )
    assert torch.equal(source.health.probe.original, several.original[:PROBE])
    assert len(source.extract(source.health.probe, teacher.module)) == PROBE


def test_conditions_begin_at_the_switch_for_all_but_the_dropped() -> None:
    config = online_config(drop=0.25)
    _, teacher, source, batch = make(config, images=448)
    assert (inputs(source, batch, teacher).condition.state == UNCONDITIONAL).all()
    assert source.metadata()["told"] is False
    batch.images = 512
    condition = inputs(source, batch, teacher).condition
    assert 0 < (condition.state != conditions.CONDITIONED).sum() < 32
    state = source.metadata()
    assert state["told"] and state["label_free"] and abs(sum(state["p"]) - 1) < 1e-9


def test_the_teacher_names_ids_in_eval_mode_and_learns_nothing_by_it() -> None:
    _, teacher, source, batch = make(online_config(drop=0.0), images=600)
    before = {n: t.clone() for n, t in teacher.module.state_dict().items()}
    condition = inputs(source, batch, teacher).condition
    assert not any(module.training for module in teacher.module.modules())
    assert all(torch.equal(t, before[n]) for n, t in teacher.module.state_dict().items())
    assert condition.dense is not None and not condition.dense.requires_grad
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_the_weight_rises_linearly_to_the_switch() -> None:
    config = online_config(weight=2.0)
    values = []
    for images in (128, 256, 512, 1024):
        student, teacher, source, batch = make(config, images=256)
        read = inputs(source, batch, teacher)
        outputs = student(batch.x, batch.tau, read.condition, read.features)
        batch.images = images
        loss = source.loss(outputs, batch, None)
        values.append(loss.item())
    assert [round(v / values[2], 6) for v in values] == [0.25, 0.5, 1.0, 1.0]


def test_the_paper_view_counts_only_the_masked_noise_times() -> None:
    config = online_config(view="training", mask=(0.4, 0.6))
    student, teacher, source, batch = make(config, images=512)
    read = inputs(source, batch, teacher)
    outputs = student(batch.x, batch.tau, read.condition, read.features)
    assert outputs.scores is not None
    outputs.scores.retain_grad()
    source.loss(outputs, batch, None).backward()
    moved = outputs.scores.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert torch.equal(moved, (batch.tau >= 0.4) & (batch.tau <= 0.6))


def normed(rank_info: RankInfo, sizes: tuple[int, ...]) -> tuple[list, list, list]:
    torch.manual_seed(0)
    norm = GlobalBatchNorm(6)
    whole = torch.randn(sum(sizes), 6) * 3 + 5
    x = whole.split(sizes)[rank_info.rank].clone().requires_grad_()
    loss = (norm(x) ** 3).sum()
    loss.backward()
    assert x.grad is not None
    return x.grad.tolist(), norm.running_mean.tolist(), norm.running_var.tolist()


def test_batch_norm_is_torchs_over_the_global_batch_gradients_included(ranks: Any) -> None:
    answers = ranks(3, normed, SIZES)
    torch.manual_seed(0)
    oracle = nn.BatchNorm1d(6)
    whole = (torch.randn(sum(SIZES), 6) * 3 + 5).requires_grad_()
    (oracle(whole) ** 3).sum().backward()
    together = torch.tensor([row for rows, _, _ in answers for row in rows])
    torch.testing.assert_close(together, whole.grad, atol=1e-4, rtol=1e-4)
    for _, mean, var in answers:
        torch.testing.assert_close(torch.tensor(mean), oracle.running_mean)
        torch.testing.assert_close(torch.tensor(var), oracle.running_var)


def summed(rank_info: RankInfo) -> float:
    x = torch.tensor(float(rank_info.rank + 1), requires_grad=True)
    (sum_over_ranks(x) * (rank_info.rank + 1)).backward()
    assert x.grad is not None
    return x.grad.item()


def test_the_gradient_of_a_sum_over_ranks_is_summed_over_their_losses(ranks: Any) -> None:
    assert ranks(3, summed) == [6.0, 6.0, 6.0]


def test_p_of_k_forgets_old_windows_and_resumes_exactly() -> None:
    config = online_config(window=128)
    _, teacher, source, batch = make(config, images=0)
    totals = []
    for images in range(512, 1024, 64):
        batch.images = images
        for _ in range(2):  # two micro-batches of a step
            inputs(source, batch, teacher)
        totals.append(int(source.prototype_counts.totals()[CONDITIONED].sum()))
    # 128 conditioned images a step here: windows turn after two steps, and two windows are the most that is held
    assert totals == [128, 256, 384, 512, 384, 512, 384, 512]
    resumed = OnlineSource(config.guidance, config.path, 0, 512)  # type: ignore[arg-type]
    resumed.load_state_dict(source.state_dict(), rank=0)
    for each in (source, resumed):
        batch.images = 1024
        inputs(each, batch, teacher)
    assert torch.equal(source.prototype_counts.totals(), resumed.prototype_counts.totals())
