"""DINO's loss, centre and teacher are their closed forms, and a fit learns what its images have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from selfguide.discovery.dino import DinoConfig, Fit, Judge, Views, centred, cosine, loss_of
from selfguide.randomness import stream_seed

SMALL = DinoConfig(
    epochs=4, batch=4, prototypes=16, hidden=32, bottleneck=8, small_crops=2,
    learning_rate=0.02, frozen=0,
)  # fmt: skip


def logits(views: int, seed: int) -> Tensor:
    return torch.randn(views, 3, 5, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_a_plain_sum_over_pairs_of_different_crops() -> None:
    student, teacher, centre = logits(4, 0), logits(2, 1), logits(1, 2)[0, 0]
    total, pairs = 0.0, 0
    for t in range(2):
        for v in range(4):
            if t == v:
                continue
            pairs += 1
            for b in range(3):
                raw = (teacher[t, b] - centre).double().numpy() / 0.04
                target = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
                said = student[v, b].double().numpy() / 0.1
                log = said - said.max() - np.log(np.exp(said - said.max()).sum())
                total -= float((target * log).sum()) / 3
    found = loss_of(student, teacher, centre, DinoConfig())
    assert float(found) == pytest.approx(total / pairs, rel=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = logits(3, 0).requires_grad_(), logits(2, 1).requires_grad_()
    loss_of(student, teacher, torch.zeros(5), DinoConfig()).backward()
    assert teacher.grad is None and student.grad is not None


def test_the_centre_is_the_weighted_sum_of_all_steps() -> None:
    said = [logits(2, seed) for seed in range(6)]
    centre = torch.zeros(5)
    for each in said:
        centre = centred(centre, each, 0.9)
    means = [each.reshape(-1, 5).mean(0) for each in said]
    closed = sum(0.1 * 0.9 ** (5 - i) * mean for i, mean in enumerate(means))
    torch.testing.assert_close(centre, closed)


def test_a_schedule_is_half_a_wave() -> None:
    assert [cosine(2.0, 1.0, share) for share in (0, 0.5, 1)] == pytest.approx([2, 1.5, 1])


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, img_size=32).eval()


def pictures() -> Tensor:
    """Eight colours with noise, uint8 (8, 3, 40, 40)."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(40, 216, (8, 3, 1, 1), generator=generator)
    noise = torch.randint(-30, 31, (8, 3, 40, 40), generator=generator)
    return (colours + noise).byte()


class Crops:
    """A step's crops as a function of the step; keeps what was asked for."""

    def __init__(self, config: DinoConfig) -> None:
        self.views, self.config, self.images = Views(32, 16, config), config, pictures()

    def __call__(self, step: int) -> Iterable[list[Tensor]]:
        for number in range(step, self.config.steps(8)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream_seed(0, "test", number))
                chosen = torch.randperm(8)[: self.config.batch]
                cut = [self.views(self.images[i]) for i in chosen]
            yield [torch.stack(crops) for crops in zip(*cut, strict=True)]


def fit_of(vit: nn.Module, config: DinoConfig) -> Fit:
    return Fit(vit, lambda x: x.float() / 127.5 - 1, Crops(config), 8, config, seed=3)


def plain(module: Judge) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_parameters()}


def test_crops_are_large_before_small_and_of_whole_patches() -> None:
    cut = Views(224, 16, DinoConfig())(pictures()[0])
    assert [tuple(crop.shape) for crop in cut] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
    assert all(crop.dtype == torch.uint8 for crop in cut)
    assert tuple(Views(32, 16, SMALL)(pictures()[0])[-1].shape) == (3, 16, 16)


def test_the_teacher_is_the_average_of_its_students(vit: nn.Module) -> None:
    fit = fit_of(vit, SMALL)
    assert not any(p.requires_grad for p in fit.teacher.parameters())
    average, moved = plain(fit.student), False
    for step, _ in enumerate(fit.run()):
        momentum = 1 - (1 - SMALL.momentum) * (1 + np.cos(np.pi * step / fit.steps)) / 2
        for name, value in fit.student.named_parameters():
            average[name] = momentum * average[name] + (1 - momentum) * value.detach()
        for name, value in fit.teacher.named_parameters():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
        moved = moved or not torch.equal(
            fit.teacher.vit.patch_embed.proj.weight, vit.patch_embed.proj.weight
        )
    assert moved and fit.step == fit.steps == 8


def test_the_loss_falls_to_what_a_teacher_that_stands_still_says(vit: nn.Module) -> None:
    """One that moves is another target at every step."""
    config = replace(SMALL, epochs=24, momentum=1.0, small_crops=1)
    losses = list(fit_of(vit, config).run())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-16:]) < 0.8 * np.mean(losses[:8])
    # what a student loses that tells no images apart
    assert np.mean(losses[-16:]) < np.log(config.prototypes) - 0.2


def test_a_fit_that_was_saved_goes_on_to_the_same_weights(vit: nn.Module) -> None:
    whole = fit_of(vit, SMALL)
    list(whole.run())
    begun, went_on = fit_of(vit, SMALL), fit_of(vit, SMALL)
    for _ in begun.run():
        if begun.step == 3:
            break
    went_on.load_state_dict(copy.deepcopy(begun.state_dict()))
    list(went_on.run())
    for name, value in whole.state_dict().items():
        same(value, went_on.state_dict()[name])


def same(first: Any, second: Any) -> None:
    if isinstance(first, Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    else:
        assert first == second


def test_prototypes_stay_while_they_are_frozen(vit: nn.Module) -> None:
    fit = fit_of(vit, replace(SMALL, frozen=1))
    drawn = fit.student.head.last.weight.clone()
    for _ in fit.run():
        still = torch.equal(fit.student.head.last.weight, drawn)
        assert still == (fit.step <= fit.epoch)
    lengths = fit.student.head.last.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_rates_are_warmed_up_and_end_where_they_should(vit: nn.Module) -> None:
    fit = fit_of(vit, replace(SMALL, epochs=10, warmup=2.0))  # 20 steps, 4 of them warm
    highest = SMALL.learning_rate * SMALL.batch / 256
    found = [fit.rates(step)[0] for step in range(4)]
    assert found == pytest.approx([highest * n / 4 for n in (1, 2, 3, 4)])
    assert fit.rates(20) == pytest.approx((SMALL.final_rate, SMALL.final_decay, 1.0))
    assert fit.rates(0)[1:] == pytest.approx((SMALL.weight_decay, SMALL.momentum))
