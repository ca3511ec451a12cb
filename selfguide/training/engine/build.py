"""The configured engine."""

from __future__ import annotations

from selfguide.distributed import Place
from selfguide.models.execution import prepare
from selfguide.spec.config import Config
from selfguide.student import Student
from selfguide.training.engine.deepspeed import DeepSpeedEngine
from selfguide.training.engine.protocol import DTYPES, Engine
from selfguide.training.engine.torch import TorchEngine


def accumulation(config: Config, world: int) -> int:
    """Micro-batches per step and rank."""
    return config.train.batch // (world * micro_batch(config, world))


def micro_batch(config: Config, world: int) -> int:
    return config.train.micro_batch or config.train.batch // world


def build_engine(config: Config, student: Student, place: Place) -> Engine:
    """An engine over `student`, which it takes over, moves to the rank's device and prepares to run as asked.

    Raises:
        UserError: engine.compile where nothing can be compiled.
    """
    student = student.to(place.device)
    prepare(student.backbone, config.engine, place.device)
    micro, accumulate = micro_batch(config, place.world), accumulation(config, place.world)
    if config.engine.backend == "torch":
        dtype = DTYPES[config.engine.dtype]
        return TorchEngine(student, config.train, dtype=dtype, accumulation=accumulate)
    return DeepSpeedEngine(
        student, config.train, config.engine, place, micro_batch=micro, accumulation=accumulate
    )
