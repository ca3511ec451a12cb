"""Sets of samples: conditions, their frequency, and that image i is a function of seed + i."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from selfguide.diffusion.conditions import CONDITIONED, NULL, UNCONDITIONAL, Condition
from selfguide.guidance.labels import drop_images
from selfguide.networks.student import build_student
from selfguide.randomness import normal
from selfguide.sampling.condition_sampler import condition_sampler
from selfguide.sampling.generate import generate, generate_each
from selfguide.sampling.groups import sample_group_ids
from selfguide.sampling.weak import build_denoiser
from selfguide.snapshot import Snapshot
from selfguide.spec.averages import AverageSpec
from selfguide.spec.config import LabelGuidance, PathConfig, SamplerConfig
from tests.selfguide.test_online import online_config

P = [0.0, 0.5, 0.2, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]


def snapshot(
    path: PathConfig | None = None, *, conditioned: bool = True, still: bool = False
) -> Snapshot:
    """A student of labels with random weights, or `still`: as it is initialised, predicting zero."""
    config = replace(online_config(), guidance=LabelGuidance(), path=path or PathConfig())
    student, generator = build_student(config, 0), torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        if not still:
            nn.init.normal_(parameter, std=0.05, generator=generator)
    student.eval().requires_grad_(False)
    state = {
        "source": "labels" if conditioned else "none",
        "told": conditioned,
        "p": P if conditioned else None,
    }
    return Snapshot(
        student=student,
        config=config,
        images=0,
        guidance=state,
        data={},
        sha256="",
        average=AverageSpec(halflife=1),
        saw_labels=conditioned,
        origin={},
    )


def made(source: Snapshot, sampler: SamplerConfig, **options: Any) -> Tensor:
    return torch.cat([x for x, _ in generate(source, sampler, **options)])


SAMPLERS = [
    (SamplerConfig(steps=3), PathConfig()),
    (SamplerConfig(steps=3, g=2.0, shift=2.0, guided_channels=1), PathConfig()),
    (SamplerConfig(name="ddim", steps=3, eta=1.0), PathConfig(name="ddpm", prediction="eps")),
    (SamplerConfig(name="euler_maruyama", steps=3, diffusion="repa"), PathConfig()),
    (SamplerConfig(name="heun", steps=3, churn=1.0), PathConfig(name="edm", prediction="edm")),
]


@pytest.mark.parametrize(("sampler", "path"), SAMPLERS)
def test_image_i_is_a_function_of_seed_plus_i(sampler: SamplerConfig, path: PathConfig) -> None:
    source = snapshot(path)
    whole = made(source, sampler, seed=0, count=7, batch=7)
    pieces = made(source, sampler, seed=0, count=7, batch=3)
    later = made(source, sampler, seed=4, count=3, batch=2)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 7 and whole.isfinite().all()
    scale = whole.abs().max().item()
    torch.testing.assert_close(pieces, whole, atol=1e-4 * scale, rtol=0)
    torch.testing.assert_close(later, whole[4:], atol=1e-4 * scale, rtol=0)


def test_noise_of_seed_zero_is_a_function_of_the_index_alone() -> None:
    # a student as it is initialised predicts v = 0: what comes out is the noise that went in
    found = made(snapshot(still=True), SamplerConfig(steps=2), seed=0, count=5, batch=2)
    assert torch.equal(found, normal(0, "sample-noise", torch.arange(5), (1, 8, 8)))


def test_groups_of_seed_zero_are_those_of_the_index_and_can_be_fixed() -> None:
    source, seeds = snapshot(), torch.arange(64)
    condition = condition_sampler(source)(seeds)
    assert torch.equal(condition.given["id"], sample_group_ids(P, 0, seeds))
    assert torch.equal(
        condition_sampler(source)(seeds + 5).given["id"][:-5], condition.given["id"][5:]
    )
    sampler, groups = SamplerConfig(steps=2), torch.tensor([4, 1, 1])
    fixed = made(source, sampler, seed=0, count=3, batch=2, groups=groups)
    drawn = torch.cat(
        [x for x, _ in generate_each(source, sampler, Condition.of(id=groups), seeds[:3], batch=3)]
    )
    torch.testing.assert_close(fixed, drawn, atol=1e-5, rtol=0)
    assert condition_sampler(snapshot(conditioned=False))(seeds).state.unique().tolist() == [
        UNCONDITIONAL
    ]


def test_the_denoiser_is_what_run_and_sampler_say() -> None:
    path = PathConfig(name="edm", prediction="edm", sigma_data=0.7)
    sampler = SamplerConfig(name="heun", g=1.5, interval=(0.1, 0.8), guided_channels=1)
    denoiser = build_denoiser(snapshot(path), Condition.unconditional(2), sampler, torch.arange(2))
    assert (denoiser.prediction, denoiser.sigma_data) == ("edm", 0.7)
    assert (denoiser.g, denoiser.interval, denoiser.guided_channels) == (1.5, (0.1, 0.8), 1)
    assert type(denoiser.path).__name__ == "VarianceExploding"


def test_every_batch_has_its_evaluations_and_calls_back_its_steps() -> None:
    seen: list[int] = []
    sampler = SamplerConfig(name="heun", steps=4)
    batches = generate_each(
        snapshot(),
        sampler,
        Condition.unconditional(5),
        torch.arange(5),
        batch=2,
        callback=lambda step, tau, x: seen.append(len(x)),
    )
    assert [(len(x), count) for x, count in batches] == [(2, 7), (2, 7), (1, 7)]
    assert seen == [2] * 8 + [1] * 4


@given(st.floats(0.02, 0.5), st.integers(0, 5))
def test_conditions_are_dropped_at_their_rate(rate: float, seed: int) -> None:
    n = 20_000
    share = drop_images(seed, torch.arange(n), rate).double().mean().item()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / n)


def test_dropping_changes_conditioned_images_only() -> None:
    condition = Condition(torch.tensor([CONDITIONED, NULL, UNCONDITIONAL, CONDITIONED]))
    assert condition.drop(torch.tensor([True, True, True, False])).state.tolist() == [
        NULL,
        NULL,
        UNCONDITIONAL,
        CONDITIONED,
    ]
    assert condition.null().state.tolist() == [NULL, NULL, UNCONDITIONAL, NULL]


def test_groups_are_drawn_at_their_frequency() -> None:
    counts = torch.bincount(sample_group_ids(P, 0, torch.arange(50_000)), minlength=len(P)) / 50_000
    torch.testing.assert_close(
        counts.double(), torch.tensor(P, dtype=torch.float64), atol=0.01, rtol=0
    )
