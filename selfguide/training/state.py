"""What a training step changes, in one place: engine, averages, guidance source and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfguide.guidance.source import Source
from selfguide.training.ema import Averages
from selfguide.training.engine.protocol import Engine
from selfguide.training.teacher import Teacher


@dataclass
class State:
    """Everything that a step changes."""

    engine: Engine
    averages: Averages
    source: Source
    teacher: Teacher | None
    origin: Mapping[str, Any]  # of the weights, as `selfguide.training.initialise` records it
    images: int = 0
    # of the epochs under way at the last checkpoint, see `training.epochs`; None where that checkpoint kept none
    accounts: tuple[Mapping[str, int], ...] | None = ()
