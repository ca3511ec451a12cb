"""`train.`: optimisation, in images seen."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.averages import WIDEST, Count, Rise
from selfguide.spec.config.laws import (
    AtLeast,
    Images,
    Neutral,
    NotIdentity,
    Positive,
    ReadWith,
    Within,
)
from shards import storage
from shards.errors import UserError

# of trackers that are no extra of ours
_PACKAGES = {"tensorboard": "tensorboard>=2.18"}


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
    # from here on the rate falls; EDM2's is 70,000 batches. Null is never, or with a cosine from the end of warm-up on
    decay_images: Annotated[int | None, AtLeast(1), Neutral(None)] = None
    # as 1 / sqrt(images) (EDM2), or along half a cosine to its end at train.images (Loshchilov & Hutter 2017, eq. 5)
    rate_decay: Annotated[Literal["inverse_sqrt", "cosine"], Neutral("inverse_sqrt")] = (
        "inverse_sqrt"
    )
    # where the cosine ends, as a share of the learning rate; nanoGPT's is 0.1
    final_rate: Annotated[float, Within(0.0, 1.0), ReadWith("rate_decay=cosine"), Neutral(0.0)] = (
        0.0
    )
    betas: Annotated[tuple[float, float], Within(0.0, 1.0, below=True)] = (0.9, 0.999)
    weight_decay: Annotated[float, Within(0.0)] = 0.0
    # what weight decay acts on: matrices and kernels alone, no biases, norms, embeddings and tokens (minGPT's rule);
    # all but biases and position embeddings (DDAE++); or everything, as U-ViT and SGDM have it
    decayed: Annotated[Literal["all", "weights", "matrices"], Neutral("all")] = "matrices"
    # muon is for matrices, and AdamW for the rest (Jordan et al. 2024); adam has weight decay in the gradient
    optimiser: Annotated[Literal["adamw", "adam", "muon"], Neutral("adamw")] = "adamw"
    # of the gradient's norm; null is none, as DiT, SiT, U-ViT, EDM and SGFM have it
    clip: Annotated[float | None, Positive("must be a positive number, or null for none")] = 1.0
    # in images; 0.9999 a step at batch 1024
    ema_halflife: Annotated[tuple[int, ...], AtLeast(1)] = (7_100_000,)
    # averages by EDM2's power function, each by its relative width, after those with a half-life
    ema_width: Annotated[tuple[float, ...], Within(0.0, WIDEST), Neutral(())] = ()
    # a half-life is never longer than this share of the images seen (EDM); 0 is no ramp, as DiT, SiT and U-ViT have it
    ema_ramp: Annotated[float, Within(0.0), ReadWith("ema_rise=share")] = 0.05
    # how an average forgets its beginning: by that share, or it keeps at most (1 + n) / (10 + n) after n steps (Rombach
    # et al. 2022, SGDM)
    ema_rise: Annotated[Rise, Neutral("share")] = "share"
    # the images of warm-up and of the half-life's ramp: with those of the step, or before it (EDM, EDM2, U-ViT, SGFM)
    ramps_count: Annotated[Count, Neutral("after")] = "after"
    log_every: Annotated[int, Images(), NotIdentity()] = 10_000
    snapshot_every: Annotated[int, Images(), NotIdentity()] = 1_000_000
    # samples of the main average that are drawn and shown beside each snapshot; 0 is none
    preview: Annotated[int, AtLeast(0), NotIdentity()] = 0
    checkpoint_every: Annotated[int, Images(), NotIdentity()] = 1_000_000
    keep_checkpoints: Annotated[int, AtLeast(1), NotIdentity()] = 2
    # and the first checkpoint of each so many images, for good; null keeps none besides. Pins are kept in any case
    keep_every: Annotated[int | None, AtLeast(1), NotIdentity()] = None
    # so many of the newest snapshots are kept, and what is still of use, once they have their scores; null keeps all
    keep_snapshots: Annotated[int | None, AtLeast(1), NotIdentity()] = None
    # and the first snapshot of each so many images, for good
    keep_snapshots_every: Annotated[
        int | None, AtLeast(1), ReadWith("keep_snapshots=NUMBER"), NotIdentity()
    ] = None
    # a process beside each rank writes them from a snapshot in host memory, or the rank itself does and waits
    checkpoint_writer: Annotated[Literal["process", "here"], NotIdentity()] = "process"
    # s3://BUCKET/FOLDER that each checkpoint is copied to, for the day on which the run's folder is gone; null for none
    checkpoint_store: Annotated[str | None, NotIdentity()] = None
    # where one cannot be written, as on a full disk: the run stops, or says so and goes on; and so for snapshots and
    # metrics. The last checkpoint of an attempt and the last snapshot of a run must be written in any case
    save_failed: Annotated[
        Literal["stop", "go_on"], ReadWith("checkpoint_writer=process"), NotIdentity()
    ] = "stop"
    # where the newest checkpoint is damaged: go on from the newest that is not, or stop and ask
    resume: Annotated[Literal["newest", "strict"], NotIdentity()] = "newest"
    # a step whose gradients are not finite is skipped; so many in a row break the run. Null allows any number
    skips: Annotated[int | None, AtLeast(1), NotIdentity()] = 100
    # and so does more than this share of the last 100 steps, or of all where training ends earlier
    skipped_share: Annotated[float | None, Within(0.0, 1.0), NotIdentity()] = 0.5
    # and so does a report's loss above so many times the median of the ten before; null allows any. A loss that may be
    # negative may rise above their median by as much less one, times the median of their sizes
    loss_spike: Annotated[float | None, Within(1.0, above=True), NotIdentity()] = None
    # what becomes of a broken run: it stops with class `numeric`, says so in its log and goes on, or goes back to the
    # newest checkpoint from before and passes over the images that broke it (PaLM, arXiv 2204.02311, section 5.1)
    unstable: Annotated[Literal["stop", "go_on", "roll_back"], NotIdentity()] = "stop"
    # how often a run goes back before it stops
    roll_backs: Annotated[int, AtLeast(1), ReadWith("unstable=roll_back"), NotIdentity()] = 3
    # TFLOP/s of one device that MFU is a share of; null takes what is known of GPUs, for dense bf16
    peak_tflops: Annotated[float | None, Positive(), NotIdentity()] = None
    # where lines of telemetry go beside the run's own metrics
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], NotIdentity()
    ] = ("tensorboard",)

    @property
    def cosine_from(self) -> int | None:
        """The images from which the rate falls along a cosine; None without one."""
        if self.rate_decay != "cosine":
            return None
        return self.warmup_images if self.decay_images is None else self.decay_images


def check_train(train: TrainConfig, *, averaged: bool = False) -> None:
    """Raises UserError where warm-up is longer than training, a tracker is not installed, or averages are missing or
    named twice.

    `averaged` says that the guidance keeps an average of its own.
    """
    if train.warmup_images > train.images:
        raise UserError(
            f"train.warmup_images={train.warmup_images} is longer than train.images={train.images}; take "
            f"train.warmup_images={train.images} or less"
        )
    begin = train.cosine_from
    if begin is not None and begin >= train.images:
        name = "warmup_images" if train.decay_images is None else "decay_images"
        raise UserError(
            f"train.{name}={begin} leaves train.rate_decay=cosine no images before train.images={train.images}; take "
            f"train.{name}={train.images // 2}"
        )
    if train.checkpoint_store is not None and not storage.is_remote(train.checkpoint_store):
        raise UserError(
            f"train.checkpoint_store={train.checkpoint_store!r} is no address in S3: give s3://BUCKET/FOLDER; a file "
            "system has the run's own folder (runs=FOLDER)"
        )
    for tracker in train.trackers:
        found = importlib.util.find_spec(tracker)
        # one without an origin is a mere folder of that name, such as W&B leaves where it ran
        if found is None or found.origin is None:
            raise UserError(
                f"train.trackers={list(train.trackers)}: {tracker} is not installed; pip install "
                f"'{_PACKAGES.get(tracker, f'selfguide[{tracker}]')}', or drop it"
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
