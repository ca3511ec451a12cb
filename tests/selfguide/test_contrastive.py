"""Contrastive self-distillation: MoCo v3's loss as its paper and code have it, over all ranks; what learns by it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from launcher.compose import compose
from selfguide.data.batch import Batch
from selfguide.data.crop_flip import mirrored
from selfguide.diffusion.conditions import NULL, UNCONDITIONAL, Condition
from selfguide.diffusion.paths import build_path
from selfguide.distributed import RankInfo
from selfguide.networks.contrastive_head import ContrastiveHead
from selfguide.networks.student import Student, build_student
from selfguide.randomness import normal
from selfguide.representation.contrastive import Contrastive, contrast
from selfguide.spec.config import (
    AugmentConfig,
    Config,
    ContrastiveConfig,
    LabelGuidance,
    NoGuidance,
)
from selfguide.spec.data_fit import check_fit
from selfguide.spec.identity import digest, identity
from selfguide.spec.initial_weights import SCRATCH
from selfguide.spec.run import RunFolder
from selfguide.spec.sizes import footprint
from selfguide.spec.validate import validate
from selfguide.training.flops import count_flops
from selfguide.training.initialise import transplant
from selfguide.training.job import build_state
from selfguide.training.loop import advance
from selfguide.training.teacher import Teacher
from selfguide.training.work import Training
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.host_reads import HostReads
from tests.selfguide.test_loop import BATCH, average, begun, taught
from tests.selfguide.test_online import online_config
from tests.selfguide.test_training import IMAGES, assert_same, attempt, config, weights

SMALL: dict[str, Any] = {"weight": 0.5, "layer": "2", "hidden": 24, "width": 12}


def settled(**settings: Any) -> Config:
    """The digits' DiT without guidance, and the loss."""
    base = replace(online_config(), guidance=NoGuidance())
    return replace(base, contrastive=ContrastiveConfig(**SMALL | settings))


def pair(cfg: Config) -> tuple[Student, Teacher]:
    """A student with weights that all count, and the teacher of another one."""
    made = []
    for seed in (1, 2):
        student, generator = build_student(cfg, 0), torch.Generator().manual_seed(seed)
        for parameter in student.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        made.append(student)
    return made[0], Teacher(made[1])


def batch(count: int = 24) -> Batch:
    x0, eps = torch.randn(2, count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tau = torch.linspace(0.01, 0.99, count)
    t = tau.view(-1, 1, 1, 1)
    at = torch.arange(count)
    return Batch(x0, eps, tau, (1 - t) * x0 + t * eps, at, at, None, 0)


def part(whole: Batch, rank: int, world: int) -> Batch:
    """What one rank has of a micro-batch."""
    each = len(whole.x0) // world
    mine = slice(rank * each, (rank + 1) * each)
    names = ("x0", "eps", "tau", "x", "position", "ordinal")
    return replace(whole, **{name: getattr(whole, name)[mine] for name in names})


def backward(cfg: Config, mine: Batch) -> tuple[float, dict[str, Tensor], Student, Teacher]:
    student, teacher = pair(cfg)
    outputs = student(mine.x, mine.tau, Condition.unconditional(len(mine.x)))
    loss = Contrastive(cfg).own_loss(outputs, mine, teacher.module)
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return loss.item(), gradients, student, teacher


def test_the_loss_is_moco_v3s_written_out(agree: Any) -> None:
    """Eq. 1 of Chen et al. 2021 times 2 T, as their `contrastive_loss`, one query at a time."""
    torch.manual_seed(0)
    queries, keys, T = torch.randn(9, 5), torch.randn(9, 5), 0.3
    total = 0.0
    for n in range(9):
        q = queries[n].double() / queries[n].double().norm()
        cosines = [float(q @ (k.double() / k.double().norm())) for k in keys]
        total += math.log(sum(math.exp(c / T) for c in cosines)) - cosines[n] / T
    loss, _ = contrast(queries, keys, T)
    agree(loss, 2 * T * total / 9, 1e-6)


def test_the_loss_at_perfect_alignment_and_without_any_is_a_closed_form() -> None:
    T, n = 0.2, 8
    alike, hits = contrast(torch.eye(n) * 3, torch.eye(n), T)
    assert alike.item() == pytest.approx(2 * T * math.log1p((n - 1) * math.exp(-1 / T)), rel=1e-5)
    assert hits.all()
    same, _ = contrast(torch.randn(n, 4), torch.ones(n, 4), T)
    assert same.item() == pytest.approx(2 * T * math.log(n), rel=1e-5)
    _, swapped = contrast(torch.eye(n).roll(1, 0), torch.eye(n), T)
    assert not swapped.any()


def moco(sizes: tuple[int, ...], affine: bool = False) -> nn.Sequential:
    """`_build_mlp` of MoCo v3's builder."""
    layers: list[nn.Module] = []
    for number, (fan_in, width) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(fan_in, width, bias=False))
        if number < len(sizes) - 2:
            layers += [nn.BatchNorm1d(width), nn.ReLU()]
        else:
            layers.append(nn.BatchNorm1d(width, affine=affine))
    return nn.Sequential(*layers)


def test_queries_and_keys_are_those_of_moco_v3s_own_heads(agree: Any) -> None:
    cfg = settled(head="plain")
    student, _ = pair(cfg)
    head = cast(ContrastiveHead, student.branches["contrastive"])
    projector, predictor = moco((64, 24, 24, 12)), moco((12, 24, 12))
    for theirs, ours in (
        (projector, (head.first, *head.projector)),
        (predictor, tuple(head.predictor)),
    ):
        own = [p for layer in ours for p in layer.parameters()]
        for mine, other in zip(own, theirs.parameters(), strict=True):
            other.data.copy_(mine.data)
    data = batch()
    nothing = Condition.unconditional(24)
    tokens = student.backbone.features(data.x, data.tau, nothing, 2)
    pooled = tokens.mean(1)
    agree(head(tokens, data.tau, nothing), predictor(projector(pooled)), 1e-5)
    # a key is made in eval mode, and yet normalised by its batch; nothing of it is kept
    student.eval()
    kept = {n: b.clone() for n, b in head.named_buffers()}
    keys = head.target(student.backbone, data.x, data.tau, nothing)
    agree(keys, projector(pooled), 1e-5)
    assert all(torch.equal(b, kept[n]) for n, b in head.named_buffers())


def test_the_projector_begins_without_the_time_and_then_reads_it() -> None:
    cfg = settled()
    head = cast(ContrastiveHead, build_student(cfg, 0).branches["contrastive"]).eval()
    tokens, nothing = torch.randn(6, 16, 64), Condition.unconditional(6)
    early, late = (torch.full((6,), tau) for tau in (0.1, 0.9))
    assert torch.equal(head(tokens, early, nothing), head(tokens, late, nothing))
    assert head.time is not None
    nn.init.normal_(head.time.out.weight)
    assert not torch.allclose(head(tokens, early, nothing), head(tokens, late, nothing))


def test_gradients_reach_the_heads_and_the_backbone_up_to_its_layer_and_nothing_else() -> None:
    _, gradients, student, teacher = backward(settled(), batch())
    reached = {n for n, g in gradients.items() if g.abs().sum() > 0}
    heads = {n for n, _ in student.named_parameters() if n.startswith("branches.")}
    assert heads <= reached
    blocks = {n.split(".")[2] for n in reached if n.startswith("backbone.blocks.")}
    assert blocks == {"0", "1"} and not any(n.startswith("backbone.final") for n in reached)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.module.parameters())


@pytest.mark.parametrize("target", ["probe", "minimal"])
def test_the_teacher_sees_another_view_in_noise_of_its_own(target: str) -> None:
    noise = {"noise_time": 0.3} if target == "probe" else {}
    cfg = settled(target=target, **noise)
    _, teacher = pair(cfg)
    source, data = Contrastive(cfg), batch()
    tau = 0.3 if target == "probe" else build_path(cfg.path).last
    eps = normal(cfg.seed, "contrastive-noise", data.position, (1, 8, 8))
    x = (1 - tau) * source.view(data.x0, data.position) + tau * eps
    head = cast(ContrastiveHead, teacher.module.branches["contrastive"])
    times, nothing = torch.full((24,), tau), Condition.unconditional(24)
    expected = head.target(teacher.module.backbone, x, times, nothing)
    torch.testing.assert_close(source.keys(data, teacher.module), expected)


def test_the_teacher_sees_images_as_they_were_before_they_were_augmented() -> None:
    cfg = replace(settled(), augment=AugmentConfig(probability=0.5))
    _, teacher = pair(cfg)
    source, plain = Contrastive(cfg), batch()
    augmented = replace(plain, x0=plain.x0.rot90(dims=(2, 3)), unaugmented=plain.x0)
    keys = source.keys(augmented, teacher.module)
    assert torch.equal(keys, source.keys(plain, teacher.module))
    # every second one is mirrored, as it is in training, and the network is told which are
    assert source.mirrors and not Contrastive(settled()).mirrors
    branch, told = cast(Any, teacher.module.branches["contrastive"]), []
    target = branch.target
    branch.target = lambda *given: (told.append(given[-1].augment), target(*given))[1]
    source.keys(plain, teacher.module)
    (labels,) = told
    turned = mirrored(source.view_seed, plain.position)
    assert torch.equal(labels[:, 0], turned.float()) and 0 < turned.sum() < len(turned)
    assert not labels[:, 1:].any()


def test_a_view_is_moved_by_a_cell_at_most_and_mirrored_where_training_mirrors() -> None:
    cfg = settled()
    x0, at = torch.randn(64, 1, 8, 8), torch.arange(64)
    assert torch.equal(Contrastive(settled(view="same")).view(x0, at), x0)
    source = Contrastive(cfg)
    moved = source.view(x0, at)
    assert torch.equal(source.view(x0[9:12], at[9:12]), moved[9:12]), "by position alone"
    padded = nn.functional.pad(x0, (1,) * 4, mode="reflect")
    places = [padded[..., r : r + 8, c : c + 8] for r in range(3) for c in range(3)]

    def found(view: Tensor, of: list[Tensor]) -> Tensor:
        return torch.stack([(view == each).flatten(1).all(1) for each in of])

    plain = found(moved, places)
    assert plain.any(0).all() and (plain.sum(1) > 0).all(), "all places, and only these"
    both = Contrastive(replace(cfg, data=replace(cfg.data, flip=True))).view(x0, at)
    turned = [each.flip(-1) for each in places]
    mirrored = found(both, turned).any(0)
    assert (found(both, places).any(0) | mirrored).all() and 16 < mirrored.sum() < 48


@pytest.mark.parametrize(("guidance", "state"), [(NoGuidance(), UNCONDITIONAL), (LabelGuidance(), NULL)])  # fmt: skip
def test_the_teacher_is_asked_without_a_condition_in_the_state_that_is_trained(
    guidance: Any, state: int
) -> None:
    assert Contrastive(replace(settled(), guidance=guidance)).state == state


def on_ranks(rank_info: RankInfo, cfg: Config) -> tuple[float, dict[str, Any]]:
    mine = part(batch(), rank_info.rank, rank_info.world)
    loss, gradients, student, _ = backward(cfg, mine)
    return loss, {n: g.tolist() for n, g in gradients.items()} | {
        n: b.tolist() for n, b in student.named_buffers() if n.startswith("branches.")
    }


@pytest.mark.parametrize("world", [2, 3])
def test_value_and_gradients_over_ranks_are_those_of_one_process(
    ranks: Any, agree: Any, world: int
) -> None:
    """Engines take the mean of gradients over ranks. Statistics that are kept are alike everywhere."""
    cfg = settled()
    answers = ranks(world, on_ranks, cfg)
    loss, gradients, student, _ = backward(cfg, batch())
    agree(sum(each for each, _ in answers) / world, loss, 1e-5)
    for name, expected in gradients.items():
        mean = sum(torch.tensor(found[name]) for _, found in answers) / world
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=2e-3, msg=name)
    for name, buffer in student.named_buffers():
        for _, found in answers:
            if name in found:
                torch.testing.assert_close(torch.tensor(found[name]), buffer)


def started(folder: Path, cfg: Config, broken: tuple[int, ...] = ()) -> Training:
    """The real loop on one process, about to take its first step; batches at `broken` hold a NaN."""
    job = begun(folder, 0, broken)
    cfg = replace(cfg, engine=job.config.engine, train=job.config.train)
    state = build_state(cfg, job.rank_info, build_student(cfg, 0), [], SCRATCH)
    return replace(job, config=cfg, state=state)


def test_parameters_and_flops_are_counted_exactly(tmp_path: Path) -> None:
    for settings in ({}, {"head": "plain"}, {"feature": "cls"}):
        cfg = settled(**settings)
        cfg = replace(cfg, model=replace(cfg.model, cls_token="feature" in settings))
        student = build_student(cfg, 0)
        assert footprint(cfg).parameters == sum(p.numel() for p in student.parameters())
    job = started(tmp_path, settled())
    job.telemetry.begin(job.config, job.state.teaching, 0)
    job.telemetry.restart(0)
    with FlopCounterMode(display=False) as counter:
        advance(job)
    line = job.telemetry.report(BATCH, **job.state.components.report(BATCH, job.state.teaching))
    assert line["flops"] == pytest.approx(counter.get_total_flops(), rel=0.04)
    assert line["contrastive_loss"] > 0 and 0 <= line["contrastive_accuracy"] <= 1
    plain = replace(job.config, contrastive=ContrastiveConfig())
    assert count_flops(job.config).training > count_flops(plain).training


def test_the_teacher_is_the_average_after_every_step(tmp_path: Path) -> None:
    job = started(tmp_path, settled())
    for _ in range(2):
        advance(job)
    held = taught(job)
    flat = job.state.engine.layout.flatten({n: held[n] for n in job.state.engine.layout.names})
    torch.testing.assert_close(flat, average(job))
    live = dict(job.state.engine.module.named_buffers())
    running = [n for n in live if n.endswith("running_mean")]
    assert running and all(torch.equal(held[n], live[n]) for n in running)


def test_a_step_with_the_loss_never_waits_for_the_device_and_a_skipped_one_leaves_nothing(
    tmp_path: Path,
) -> None:
    job = started(tmp_path, settled(), broken=(BATCH,))
    advance(job)
    before = taught(job)
    with HostReads() as reads:
        advance(job)
    assert reads.total == 0, reads.seen
    after = taught(job)
    assert all(torch.equal(before[n], after[n]) for n in before)
    advance(job)
    assert all(tensor.isfinite().all() for tensor in taught(job).values())


def test_an_online_source_keeps_the_teacher_that_both_read(tmp_path: Path) -> None:
    guidance = replace(online_config().guidance, teacher_refresh=1 << 20)
    job = started(tmp_path, replace(settled(), guidance=guidance))
    before = taught(job)
    advance(job)
    after = taught(job)
    assert all(torch.equal(before[n], after[n]) for n in before), "teacher_refresh is far away"


def test_a_run_begins_with_the_heads_of_a_snapshot_that_has_them() -> None:
    theirs, ours = pair(settled())[0], build_student(settled(), 3)
    assert "branches.contrastive" in transplant(theirs, ours, keep_labels=False)
    plain = build_student(replace(settled(), contrastive=ContrastiveConfig()), 0)
    assert "branches.contrastive" not in transplant(plain, ours, keep_labels=False)
    assert torch.equal(
        theirs.branches["contrastive"].first.map.weight,
        ours.branches["contrastive"].first.map.weight,
    )


DIGITS = ["experiment=digits_uncond", "cluster=local"]
ON = ["contrastive.weight=0.01", "contrastive.hidden=32", "contrastive.width=16"]


def named(*words: str) -> str:
    return digest(identity(compose([*DIGITS, *words]), "manifest"))


def test_a_run_without_the_loss_is_named_as_before_and_its_settings_as_they_are_meant() -> None:
    assert named() == named("contrastive.weight=0", "contrastive.hidden=32")
    assert "contrastive" not in identity(compose(DIGITS), "manifest")
    one = named(*ON)
    assert one not in (named(), named(*ON, "contrastive.temperature=0.3"))
    middle = named(*ON, "contrastive.layer=block_2")
    assert one == middle == named(*ON, "contrastive.layer=2")
    # so many images are told from each other at once
    assert one != named(*ON, "train.micro_batch=16")


@pytest.mark.parametrize(
    ("words", "field", "cure"),
    [
        (["contrastive.layer=block_9"], "contrastive.layer='block_9'", None),
        (["contrastive.layer=7"], "contrastive.layer=7", ["contrastive.layer=4"]),
        (["contrastive.feature=cls"], "contrastive.feature=cls", ["model.cls_token=true"]),
        (["train.micro_batch=2"], "micro-batches of 4 images", ["train.micro_batch=8"]),
        (
            ["train.batch=8", "train.images=8000", "train.snapshot_every=800", "train.checkpoint_every=800",
             "train.warmup_images=800", "train.log_every=800"],
            "micro-batches of 8 images", ["train.batch=16"],
        ),
        (["cluster=slurm", "cluster.gpus_per_node=1", "nodes=2", "min_nodes=1"], "min_nodes=1", ["min_nodes=2"]),
        (["contrastive.weight=-1"], "contrastive.weight=-1", ["contrastive.weight=0"]),
        (["contrastive.noise_time=1"], "contrastive.noise_time=1", ["contrastive.noise_time=0.5"]),
        (["contrastive.width=1"], "contrastive.width=1", ["contrastive.width=2"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_with_a_cure(
    words: list[str], field: str, cure: list[str] | None
) -> None:
    with pytest.raises(UserError) as refused:
        validate(compose([*DIGITS, *ON, *words]))
    assert field in str(refused.value)
    if cure is not None:
        validate(compose([*DIGITS, *ON, *words, *cure]))


def test_a_moved_view_of_latents_is_refused(digits: Path) -> None:
    manifest = manifests.load(digits)
    latents = replace(manifest, header=manifest.header | {"kind": "latent", "encoder": "sd_vae"})
    cfg = compose([*DIGITS, *ON, f"data.root={digits}", "evaluation=none"])
    with pytest.raises(UserError, match=r"contrastive\.view=moved"):
        check_fit(cfg, [latents])
    check_fit(replace(cfg, contrastive=replace(cfg.contrastive, view="same")), [latents])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [pytest.param("torch", "bf16", marks=pytest.mark.slow), ("deepspeed", "fp32")],
)
def test_a_resumed_run_on_two_ranks_ends_with_the_same_bits(
    ranks: Any, digits: Path, tmp_path: Path, backend: str, dtype: str
) -> None:
    with_loss = {"guidance": NoGuidance(), "contrastive": ContrastiveConfig(**SMALL)}
    cfg = replace(config(digits, backend, dtype), **with_loss)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for root in (whole, parts):
        ranks(2, attempt, cfg, str(root))
    for folder in [*(parts / "checkpoints").glob("img-*"), *(parts / "snapshots").glob("img-*")]:
        if int(folder.name[4:]) > IMAGES // 2:
            (folder / "MANIFEST.json").unlink()
    assert RunFolder(parts).saved()[-1] == IMAGES // 2
    assert ranks(2, attempt, cfg, str(parts)) == [2, 2]
    assert_same(weights(parts), weights(whole))
    assert any(name.startswith("branches.contrastive.") for name in weights(whole))
