"""Groups by tags, Adam and Muon in the torch engine, and the learning rate's schedules."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from selfguide.distributed import RankInfo
from selfguide.models import build
from selfguide.networks.student import build_student
from selfguide.spec.config import Config
from selfguide.spec.schedules import learning_rate
from selfguide.training.engine.build import build_engine, layout_of
from selfguide.training.engine.protocol import Engine, Moments
from selfguide.training.engine.tags import tags_of
from selfguide.training.engine.torch import judged, norm_of
from tests.selfguide.host_reads import HostReads
from tests.selfguide.test_engines import config, live, loss_of, perturbed, step

BATCH = 16


def trained_with(**train: Any) -> Config:
    cfg = config("torch")
    return replace(cfg, train=replace(cfg.train, **{"decayed": "matrices"} | train))


def alone(cfg: Config) -> tuple[Engine, RankInfo]:
    rank_info = RankInfo(0, 0, 1)
    return build_engine(cfg, perturbed(cfg), rank_info), rank_info


def test_every_parameter_of_every_family_has_the_tag_of_what_it_does() -> None:
    with torch.device("meta"):
        names = ("dit_digits", "lightningdit_b_1", "uvit_s_2", "unet_sgdm_released_64")
        found = {name: tags_of(build(name)) for name in names}
    assert found["dit_digits"]["blocks.0.attention.qkv.weight"] == "matrix"
    assert found["dit_digits"]["patchify.weight"] == "kernel"
    assert found["dit_digits"]["condition.labels.weight"] == "embedding"
    assert found["dit_digits"]["condition.null"] == "token"
    assert found["lightningdit_b_1"]["blocks.0.norm1.weight"] == "norm"
    assert found["uvit_s_2"]["positions"] == "embedding"
    assert found["uvit_s_2"]["final_norm.weight"] == "norm"
    for tags in found.values():
        assert all((tag == "bias") == name.endswith("bias") for name, tag in tags.items())
    nulls = [n for n in found["unet_sgdm_released_64"] if n.endswith("null")]
    assert nulls and all(found["unet_sgdm_released_64"][n] == "token" for n in nulls)
    student = build_student(config("torch"), 0)
    assert tags_of(student)["head.prototypes"] == "embedding"
    assert Counter(tags_of(student).values()).keys() >= {"matrix", "norm", "bias", "token"}


@pytest.mark.parametrize(
    ("train", "groups"),
    [
        ({"decayed": "all"}, {"all": 0.5}),
        ({}, {"all": 0.5, "undecayed": 0.0}),
        ({"weight_decay": 0.0}, {"all": 0.0}),
        ({"optimiser": "muon", "decayed": "all"}, {"all": 0.5, "muon": 0.5}),
        ({"optimiser": "muon"}, {"all": 0.5, "muon": 0.5, "undecayed": 0.0}),
    ],
)
def test_groups_are_as_many_as_the_optimiser_treats_apart(
    train: dict[str, Any], groups: dict[str, float]
) -> None:
    cfg = trained_with(**{"weight_decay": 0.5} | train)
    student = build_student(cfg, 0)
    layout, tags = layout_of(cfg, student), tags_of(student)
    assert {g.name: g.weight_decay for g in layout.groups} == groups
    for group in layout.groups:
        held = {tags[name] for name in layout.names_of(group)}
        assert group.muon == (held == {"matrix"})
        if group.name == "undecayed":
            assert held.isdisjoint({"matrix", "kernel"})


def test_decay_of_matrices_alone_leaves_everything_else_as_without_decay() -> None:
    ends = {}
    for decay in (0.0, 50.0):
        engine, rank_info = alone(trained_with(weight_decay=decay))
        step(engine, rank_info, 0, BATCH)
        ends[decay] = engine.layout.split(engine.gather(engine.masters))
    tags = tags_of(engine.module)
    for name, tensor in ends[0.0].items():
        same = torch.allclose(tensor, ends[50.0][name], rtol=1e-6, atol=1e-8)
        assert same == (tags[name] not in ("matrix", "kernel")), name


def stepped(cfg: Config, count: int) -> dict[str, Tensor]:
    engine, rank_info = alone(cfg)
    for number in range(count):
        step(engine, rank_info, number, BATCH)
    return engine.layout.split(engine.gather(engine.masters))


def test_muon_steps_matrices_as_torchs_does_and_adamw_the_rest() -> None:
    """One step: in later ones a rounding of the fused AdamW may turn a gradient that is all but zero."""
    cfg = trained_with(optimiser="muon", weight_decay=0.1, decayed="all")
    ours = stepped(cfg, 1)
    student = perturbed(cfg)
    named, tags = dict(student.named_parameters()), tags_of(student)
    rank_info = RankInfo(0, 0, 1)
    loss_of(student, rank_info, 0, BATCH, 0).backward()
    matrices = [p for n, p in named.items() if tags[n] == "matrix"]
    rest = [p for n, p in named.items() if tags[n] != "matrix"]
    torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW(rest, lr=1e-2, betas=cfg.train.betas, weight_decay=0.1).step()
    for name, parameter in named.items():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def muon_on_ranks(rank_info: RankInfo, cfg: Config, steps: int = 2) -> tuple[list[float], ...]:
    """The weights after our engine's steps, and after torch's own data parallelism with torch's own optimisers.

    Few steps: Muon multiplies in bf16, for which a CPU without AVX512 has no fast kernels.
    """
    micro = BATCH // rank_info.world
    engine = build_engine(cfg, perturbed(cfg), rank_info)
    for number in range(steps):
        step(engine, rank_info, number, micro)
    student = perturbed(cfg)
    layout, tags = layout_of(cfg, student), tags_of(student)
    flat = layout.flatten_module(student)
    network = torch.nn.parallel.DistributedDataParallel(student)
    matrices = [p for name, p in student.named_parameters() if tags[name] == "matrix"]
    (rest,) = (group for group in layout.groups if not group.muon)
    vector = torch.nn.Parameter(flat[rest.start : rest.stop])
    decay = {"lr": 1e-2, "weight_decay": cfg.train.weight_decay}
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decay)
    adam = torch.optim.AdamW([vector], betas=cfg.train.betas, fused=True, **decay)
    named = dict(student.named_parameters())
    for number in range(steps):
        network.zero_grad()
        loss_of(network, rank_info, number, micro, 0).backward()
        grads = [named[name].grad for name in layout.names_of(rest)]
        vector.grad = torch.cat([grad.flatten() for grad in grads if grad is not None])
        muon.step()
        adam.step()
    return engine.gather(engine.masters).tolist(), flat.tolist()


@pytest.mark.slow
def test_muon_on_two_ranks_is_torchs_data_parallelism_with_it_bit_for_bit(ranks: Any) -> None:
    cfg = trained_with(optimiser="muon", weight_decay=0.1, decayed="all")
    (ours, torchs), other = ranks(2, muon_on_ranks, cfg)
    assert ours == torchs
    assert other == (ours, torchs)


def test_a_step_of_muon_that_is_skipped_changes_nothing_and_none_reads_on_the_host() -> None:
    engine, rank_info = alone(trained_with(optimiser="muon", weight_decay=0.1))
    step(engine, rank_info, 0, BATCH)

    def held() -> list[Tensor]:
        moments = engine.moments()
        shards = (engine.masters, moments.first, moments.second)
        return [*(engine.gather(shard).clone() for shard in shards), live(engine)]

    before, gradient = held(), engine._gradient  # type: ignore[attr-defined]
    gradient[-1] = math.inf
    with HostReads() as reads:
        done = step(engine, rank_info, 1, BATCH)
    assert reads.total == 0, reads.seen
    assert not done.applied
    assert all(torch.equal(one, other) for one, other in zip(before, held(), strict=True))
    assert step(engine, rank_info, 2, BATCH).applied
    assert not torch.equal(before[0], held()[0])


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "muon"])
def test_moments_that_were_loaded_go_on_bit_for_bit(optimiser: str) -> None:
    cfg = trained_with(optimiser=optimiser, weight_decay=0.1)
    engine, rank_info = alone(cfg)
    other, _ = alone(cfg)
    for number in range(2):
        step(engine, rank_info, number, BATCH)
    for mine, theirs in zip(other.masters, engine.masters, strict=True):
        mine.copy_(theirs)
    moments = engine.moments()
    first, second = (tuple(m.clone() for m in shard) for shard in (moments.first, moments.second))
    other.load_moments(Moments(first, second, moments.count))
    other.refresh()
    other.module.load_state_dict(dict(engine.module.named_buffers()), strict=False)
    assert other.moments().count == 2
    for each in (engine, other):
        step(each, rank_info, 2, BATCH)
    assert torch.equal(engine.gather(engine.masters), other.gather(other.masters))


def test_the_norm_of_a_long_gradient_is_right_to_a_millionth_and_copies_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(3 * 2**20 + 777, generator=generator)
    gradient[::7] *= 100
    exact = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = norm_of(gradient)
    assert found.dtype == torch.float64 and float(found) == pytest.approx(float(exact), rel=1e-6)
    most = max(event.cpu_memory_usage for event in seen.events())
    assert most < gradient.nbytes / 100
    # that of small networks has the bits that it always had
    short = gradient[: 2**20]
    assert torch.equal(norm_of(short), torch.linalg.vector_norm(short, dtype=torch.float64))


def test_a_gradient_whose_squares_are_not_finite_is_skipped() -> None:
    """Clipped by an infinite norm it would be one of zeros."""
    gradient = torch.zeros(2**20 + 1)
    assert judged(gradient, 1.0).applied
    gradient[7] = 1e30
    done = judged(gradient.clone(), 1.0)
    assert not done.applied and gradient.sum().isfinite()


def test_adam_without_decay_is_adamw_and_with_it_decays_by_its_gradient() -> None:
    ends = {
        (optimiser, decay): stepped(trained_with(optimiser=optimiser, weight_decay=decay), 2)
        for optimiser in ("adam", "adamw")
        for decay in (0.0, 0.5)
    }
    name = "backbone.final.weight"
    assert torch.equal(ends["adam", 0.0][name], ends["adamw", 0.0][name])
    assert not torch.allclose(ends["adam", 0.5][name], ends["adamw", 0.5][name])


def test_a_cosine_falls_from_warm_up_or_a_given_count_to_its_end() -> None:
    rates = {"learning_rate": 2.0, "batch": 10, "images": 1000}
    plain = trained_with(**rates, rate_decay="cosine", warmup_images=100, ramps_count="before")
    assert learning_rate(plain, 50) == 1.0 and learning_rate(plain, 100) == 2.0
    assert learning_rate(plain, 550) == pytest.approx(1.0)
    assert learning_rate(plain, 1000) == 0.0
    late = trained_with(**rates, rate_decay="cosine", decay_images=600, final_rate=0.1)
    assert [learning_rate(late, n) for n in (0, 300, 600)] == [2.0] * 3
    assert learning_rate(late, 800) == pytest.approx(2.0 * 0.55)
    assert learning_rate(late, 1000) == pytest.approx(0.2)
    # as torch's own schedule has it
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimiser = torch.optim.SGD([parameter], lr=2.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 100)
    whole = trained_with(**rates, rate_decay="cosine")
    for n in range(0, 1000, 10):
        assert learning_rate(whole, n) == pytest.approx(torchs.get_last_lr()[0], abs=1e-9)
        optimiser.step()
        torchs.step()
