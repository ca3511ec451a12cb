"""The kit passes this project's trainer, on real ranks that are killed."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from selfguide.spec.config import EngineConfig, ModelConfig, NoGuidance
from tests.conftest import HEAVY
from tests.resume_kit.kit import CHECKS, Kill, Seen, Whole, check_twice, check_worlds, whole_of
from tests.resume_kit.real import Real
from tests.selfguide.test_training import config

pytestmark = pytest.mark.slow


def trainer(digits: Path, writer: Literal["process", "here"] = "here", **changes: object) -> Real:
    """A step a report, two a checkpoint, four a picture, and averages of two kinds that warm up.

    A kill in a save is a kill at a line of it where the rank itself writes. The process that writes beside it kills the
    rank at a point of it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)
    base = config(digits, "deepspeed")
    train = replace(
        base.train,
        log_every=64,
        preview=2,
        ema_halflife=(200,),
        ema_width=(0.1,),
        checkpoint_writer=writer,
    )
    sampler = replace(base.sampler, steps=2)
    return Real(replace(base, train=train, sampler=sampler, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def guided(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Real, Whole]:
    """Its teacher, its statistics and its groups are state as well."""
    real = trainer(digits)
    return real, whole_of(real, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "check_worlds"])
def test_a_self_guided_run_that_is_killed_anywhere_ends_with_the_same_bits(
    guided: tuple[Real, Whole], tmp_path: Path, check: str
) -> None:
    CHECKS[check](*guided, tmp_path)


@pytest.mark.parametrize("check", ["check_steps", "check_saves", "check_twice", "check_newest"])
def test_a_run_whose_checkpoints_are_written_beside_it_ends_with_the_same_bits(
    guided: tuple[Real, Whole], digits: Path, tmp_path: Path, check: str
) -> None:
    """What a kill leaves of them is whole or none: processes that outlive their rank may still finish one."""
    CHECKS[check](trainer(digits, "process"), guided[1], tmp_path)


def test_a_run_on_two_ranks_then_one_then_four_ends_alike(digits: Path, tmp_path: Path) -> None:
    """A U-ViT: all its gradients are more than rounding, of which AdamW would make whole steps."""
    uvit = trainer(digits, model=ModelConfig(name="uvit_digits"), guidance=NoGuidance())
    check_worlds(uvit, whole_of(uvit, tmp_path / "whole"), tmp_path / "moved")


ENGINES = {
    "zero-2": EngineConfig(zero_stage=2),
    "zero-3": EngineConfig(zero_stage=3),
    "zero-1-bf16": EngineConfig(zero_stage=1, dtype="bf16"),
    "zero-2-bf16": EngineConfig(zero_stage=2, dtype="bf16"),
    "zero-3-bf16": EngineConfig(zero_stage=3, dtype="bf16"),
    "torch-bf16": EngineConfig(backend="torch", dtype="bf16"),
    "torch-muon": EngineConfig(backend="torch"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_any_engine_that_is_killed_twice_ends_with_the_same_bits(
    digits: Path, tmp_path: Path, engine: str
) -> None:
    """What its checkpoints hold is laid out as each stage owns it."""
    real = trainer(digits, "process", engine=ENGINES[engine])
    if engine.endswith("muon"):
        train = replace(real.config.train, optimiser="muon")
        real = Real(replace(real.config, train=train))
    check_twice(real, whole_of(real, tmp_path / "whole"), tmp_path / "killed")


class Moved(Real):
    """A run that another engine goes on with on each number of ranks."""

    def attempt(self, folder: Path, world: int = 2, kill: Kill | None = None) -> Seen:
        engine = {2: ENGINES["zero-3"], 1: EngineConfig(backend="torch"), 4: EngineConfig()}[world]
        return Real(replace(self.config, engine=engine)).attempt(folder, world, kill)


def test_a_run_of_stage_3_then_bare_torch_then_stage_1_ends_alike(
    digits: Path, tmp_path: Path
) -> None:
    uvit = trainer(digits, model=ModelConfig(name="uvit_digits"), guidance=NoGuidance())
    moved = Moved(uvit.config)
    check_worlds(moved, whole_of(moved, tmp_path / "whole"), tmp_path / "moved")
