"""The optimisers of docs/diffusion.md, source by source, beside plain loops with the sources' own hyper-parameters.

What is typed is read from the page. Ours are the engine and the averages that train; theirs torch's optimiser, the
source's rate of each step, its clip where it has one, and its moving average.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from launcher.compose import compose
from selfguide.distributed import RankInfo
from selfguide.networks.student import Student, build_student
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config
from selfguide.spec.schedules import learning_rate
from selfguide.training.ema import Averages
from selfguide.training.engine.build import build_engine

PAGE = Path(__file__).parents[2] / "docs" / "diffusion.md"
ROWS: dict[str, str] = dict(
    re.findall(r"^\| ([^|`]+) \| `(batch=[^`]+)` \|$", PAGE.read_text(), re.MULTILINE)
)
# in these steps decay moves a weight of 0.02 by more than the comparison allows, in every source that has one
STEPS, BEGIN = 20, 20_000


class Source(NamedTuple):
    """What a published loop does."""

    optimiser: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    # of the step that is taken after n steps
    rate: Callable[[int], float]
    # what the average keeps of itself at the step that makes n
    keeps: Callable[[int], float]
    clip: float | None = None
    # whether a parameter of that name is decayed
    decays: Callable[[str], bool] = lambda name: True


def constant(decay: float) -> Callable[[int], float]:
    return lambda n: decay


def warm(rate: float, steps: int) -> Callable[[int], float]:
    """LambdaLR of min(step / steps, 1), from step 0."""
    return lambda n: rate * min(n / steps, 1)


def adamw(rate: float, betas: tuple[float, float] = (0.9, 0.999), decay: float = 0.0) -> Any:
    def made(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            group["weight_decay"] = decay if group.pop("decays") else 0.0
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8)

    return made


def adam(rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> Any:
    def made(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        parameters = [p for group in groups for p in group["params"]]
        return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=1e-8)

    return made


def edm_keeps(n: int) -> float:
    """Karras et al. 2022, their code: the images before the step, and 0 of them keep nothing."""
    halflife = min(500_000, 0.05 * 512 * (n - 1))
    return 0.5 ** (512 / max(halflife, 1e-8))


def edm2_rate(n: int) -> float:
    images = 2048 * n
    rate = 1e-2 / math.sqrt(max(images / (70_000 * 2048), 1))
    return rate * min(images / 10e6, 1)


def edm2_keeps(n: int) -> float:
    """Karras et al. 2024, eq. 126 and 127: the exponent of relative width 0.05 is a root of their cubic."""
    t = 0.05**-2
    exponent = np.roots([1, 7, 16 - t, 12 - t]).real.max()
    return float((1 - 1 / n) ** (exponent + 1))


def ldm_keeps(n: int) -> float:
    """Latent diffusion's LitEma, which SGDM keeps: n is counted up before it is read."""
    return min(0.9999, (1 + n) / (10 + n))


SOURCES: dict[str, Source] = {
    "DiT, SiT": Source(adamw(1e-4), constant(1e-4), constant(0.9999)),
    "REPA": Source(adamw(1e-4), constant(1e-4), constant(0.9999), clip=1.0),
    "LightningDiT": Source(adamw(2e-4, (0.9, 0.95)), constant(2e-4), constant(0.9999)),
    "U-ViT-L": Source(adamw(2e-4, (0.99, 0.99), 0.03), warm(2e-4, 5000), constant(0.9999)),
    "SGFM": Source(adamw(5e-5), warm(5e-5, 5000), constant(0.9999)),
    "SGDM": Source(adamw(3e-4, decay=0.01), warm(3e-4, 500), ldm_keeps),
    "EDM, C-EDM": Source(adam(1e-3), lambda n: 1e-3 * min(512 * n / 10e6, 1), edm_keeps),
    "EDM2": Source(adam(1e-2, (0.9, 0.99)), edm2_rate, edm2_keeps),
    "DDAE++ (U-ViT)": Source(
        adamw(4e-4, decay=0.03), constant(4e-4), constant(0.9999), 1.0,
        decays=lambda name: not name.endswith(".bias") and name != "backbone.positions",
    ),
}  # fmt: skip


def test_every_row_of_the_page_has_a_source_here() -> None:
    assert list(ROWS) == list(SOURCES)


def typed(source: str) -> Config:
    """The digits' U-ViT, a small one, trained as the page says."""
    settings = [f"train.{word}" for word in ROWS[source].split()]
    batch = next(word for word in settings if word.startswith("train.batch="))
    images = int(batch.partition("=")[2]) * 200_000
    cadences = ("images", "log_every", "snapshot_every", "checkpoint_every")
    every = [f"train.{name}={images}" for name in cadences]
    model = ["model=uvit_digits", "model.width=24", "model.depth=2", "model.heads=2"]
    where = ["experiment=digits_uncond", "cluster=local", "cluster.gpus_per_node=1", "engine=torch"]
    return compose([*where, *model, "train.warmup_images=0", *every, *settings])


def gradients(student: Student, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        name: 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in student.named_parameters()
    }


@pytest.mark.parametrize("source", SOURCES)
def test_weights_and_averages_are_those_of_the_published_loop(
    source: str, agree: Callable[[Tensor, Tensor, float], None]
) -> None:
    """From a step behind all warm-ups."""
    config, theirs = typed(source), SOURCES[source]
    batch = config.train.batch
    student = build_student(config, 0)
    plain, average = copy.deepcopy(student), copy.deepcopy(student)
    groups = [
        {"params": [p for n, p in plain.named_parameters() if theirs.decays(n) == decays], "decays": decays}
        for decays in (True, False)
    ]  # fmt: skip
    optimiser = theirs.optimiser(groups)
    engine = build_engine(config, student, RankInfo(0, 0, 1))
    train = config.train
    averages = Averages(
        engine, averages_of(config), train.ema_ramp, train.ema_rise, train.ramps_count
    )
    for number in range(BEGIN, BEGIN + STEPS):
        given = gradients(plain, number)
        for name, parameter in engine.module.named_parameters():
            assert parameter.grad is not None
            parameter.grad.copy_(given[name])
        for name, parameter in plain.named_parameters():
            parameter.grad = given[name].clone()
        done = engine.step(learning_rate(config, batch * number))
        assert done is not None
        averages.update(batch, batch * (number + 1), done.applied)
        if theirs.clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), theirs.clip)
        for group in optimiser.param_groups:
            group["lr"] = theirs.rate(number)
        optimiser.step()
        with torch.no_grad():
            for mine, live in zip(average.parameters(), plain.parameters(), strict=True):
                mine.lerp_(live, 1 - theirs.keeps(number + 1))
    ours, held = dict(engine.module.named_parameters()), averages.weights()
    for found, wanted in ((ours, plain), (held, average)):
        theirs_all = dict(wanted.named_parameters())
        flat = [torch.cat([each[n].flatten() for n in theirs_all]) for each in (found, theirs_all)]
        # the largest weight is 1
        agree(flat[0], flat[1], 2e-7)


@pytest.mark.parametrize("source", SOURCES)
def test_rates_and_averages_keep_to_the_published_schedule_all_along(source: str) -> None:
    config, theirs = typed(source), SOURCES[source]
    train, average = config.train, averages_of(config)[0]
    for n in (0, 1, 2, 9, 100, 499, 500, 501, 4999, 5000, 5001, 19_531, 19_532, 70_000, 150_000):
        assert learning_rate(config, n * train.batch) == pytest.approx(theirs.rate(n), rel=1e-9)
        kept = average.decay(
            train.batch, (n + 1) * train.batch, train.ema_ramp, train.ema_rise, train.ramps_count
        )
        assert 1 - kept == pytest.approx(1 - theirs.keeps(n + 1), rel=1e-6)


def test_ramps_that_count_before_a_step_begin_at_nothing() -> None:
    config = typed("EDM, C-EDM")
    assert learning_rate(config, 0) == 0.0
    counted_after = replace(config, train=replace(config.train, ramps_count="after"))
    assert learning_rate(counted_after, 0) == pytest.approx(1e-3 * 512 / 10e6)
