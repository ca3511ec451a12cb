"""The kit passes this project's trainer, on real ranks that are killed."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from selfguide.spec.config import ModelConfig, NoGuidance
from tests.conftest import HEAVY
from tests.resume_kit.kit import CHECKS, failures
from tests.resume_kit.real import Real
from tests.selfguide.test_training import config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def imported_once() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)


def trainer(digits: Path, **changes: object) -> Real:
    """A step a report, two a checkpoint, four a picture, and averages of two kinds that warm up."""
    base = config(digits, "deepspeed")
    train = replace(base.train, log_every=64, preview=2, ema_halflife=(200,), ema_width=(0.1,))
    sampler = replace(base.sampler, steps=2)
    return Real(replace(base, train=train, sampler=sampler, **changes))  # type: ignore[arg-type]


def test_a_self_guided_run_that_is_killed_anywhere_ends_with_the_same_bits(
    digits: Path, tmp_path: Path
) -> None:
    """Its teacher, its statistics and its queue of features are state as well."""
    checks = [name for name in CHECKS if name != "check_worlds"]
    assert failures(trainer(digits), tmp_path, checks) == {}


def test_a_run_on_two_ranks_then_one_then_four_ends_alike(digits: Path, tmp_path: Path) -> None:
    """A U-ViT: all its gradients are more than rounding, of which AdamW would make whole steps."""
    uvit = trainer(digits, model=ModelConfig(name="uvit_digits"), guidance=NoGuidance())
    assert failures(uvit, tmp_path, ["check_worlds"]) == {}
