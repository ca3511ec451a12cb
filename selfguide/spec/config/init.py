"""`init=`: where the weights begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.config.laws import NotIdentity, ReadWith

_WEIGHTS = ReadWith("source=snapshot", "source=official")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """From scratch, from a published snapshot, or from weights that others published.

    The weights' sha256 belongs to a run's identity, and `path` does not.
    """

    source: Literal["scratch", "snapshot", "official"] = "scratch"
    # of a published snapshot's folder, or of a checkpoint's file
    path: Annotated[str | None, _WEIGHTS, NotIdentity()] = None
    # whose names the file has; a snapshot says what it is
    form: Annotated[Literal["dit", "sit", "uvit"] | None, ReadWith("source=official")] = None
    # the label table, less its null row
    labels: Annotated[Literal["drop", "keep"], _WEIGHTS] = "drop"
    # whether time, path and prediction must be those of the weights; SGFM gives U-ViT others and lets it learn anew
    time: Annotated[Literal["as_trained", "relearn"], _WEIGHTS, NotIdentity()] = "as_trained"
