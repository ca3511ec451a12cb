"""`evaluation=`: which protocol scores the snapshots, and how many jobs may do so at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.config.laws import AtLeast


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """No part of it is identity: scores are records beside the run."""

    protocol: Literal["none", "fd_digits"] = "none"
    samples: Annotated[int, AtLeast(1)] = 5000
    batch: Annotated[int, AtLeast(1)] = 500
    seed: Annotated[int, AtLeast(0)] = 0
    # how often groups are drawn: as in training, or evenly, C-EDM's control
    prior: Literal["empirical", "uniform"] = "empirical"
    in_flight: Annotated[int, AtLeast(1)] = 1
    attempts: Annotated[int, AtLeast(1)] = 3
