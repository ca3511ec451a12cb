"""`train.`: optimisation, in images seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.averages import WIDEST
from selfguide.spec.config.laws import AtLeast, Images, Neutral, NotIdentity, Positive, Within
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which batches, by which optimiser and averages, and how often the run speaks."""

    images: Annotated[int, Images()]
    # global
    batch: Annotated[int, AtLeast(1)]
    # of a rank and forward; None takes batch / ranks
    micro_batch: Annotated[int | None, AtLeast(1), NotIdentity()] = None
    learning_rate: Annotated[float, Positive()] = 1e-4
    warmup_images: Annotated[int, AtLeast(0)] = 0
    betas: Annotated[tuple[float, float], Within(0.0, 1.0, below=True)] = (0.9, 0.999)
    weight_decay: Annotated[float, Within(0.0)] = 0.0
    clip: Annotated[float, Positive()] = 1.0
    # in images; 0.9999 a step at batch 1024
    ema_halflife: Annotated[tuple[int, ...], AtLeast(1)] = (7_100_000,)
    # averages by EDM2's power function, each by its relative width, after those with a half-life
    ema_width: Annotated[tuple[float, ...], Within(0.0, WIDEST), Neutral(())] = ()
    # a half-life is never longer than this share of the images seen (EDM); 0: it is constant
    ema_ramp: Annotated[float, Within(0.0)] = 0.05
    log_every: Annotated[int, Images(), NotIdentity()] = 10_000
    snapshot_every: Annotated[int, Images(), NotIdentity()] = 1_000_000
    checkpoint_every: Annotated[int, Images(), NotIdentity()] = 1_000_000
    keep_checkpoints: Annotated[int, AtLeast(1), NotIdentity()] = 2
    # where the newest checkpoint is damaged: go on from the newest that is not, or stop and ask
    resume: Annotated[Literal["newest", "strict"], NotIdentity()] = "newest"


def check_train(train: TrainConfig, *, averaged: bool = False) -> None:
    """Raises UserError where warm-up is longer than training, or averages are missing or named twice.

    `averaged` says that the guidance keeps an average of its own.
    """
    if train.warmup_images > train.images:
        raise UserError(
            f"train.warmup_images={train.warmup_images} is longer than train.images={train.images}; shorten it"
        )
    if not train.ema_halflife and not train.ema_width and not averaged:
        raise UserError(
            "train.ema_halflife=[] is empty: snapshots are EMA weights, give at least one half-life"
        )
    if 0.0 in train.ema_width:
        raise UserError("train.ema_width=[0] is the live weights; take more than 0")
    for name in ("ema_halflife", "ema_width"):
        values = list(getattr(train, name))
        if len(set(values)) != len(values):
            raise UserError(f"train.{name}={values} names one average twice; drop one")
