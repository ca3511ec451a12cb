"""The training loop, top to bottom: data, condition, loss, step, average, publish. Images seen is the clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from selfguide.data.autoencoders import Normaliser
from selfguide.data.crop_flip import Placement, draw_placement
from selfguide.diffusion.objectives import Objective, draw_times
from selfguide.distributed import Place
from selfguide.networks.student import Batch
from selfguide.randomness import normal, stream_seed
from selfguide.spec.config import Config, OnlineGuidance
from selfguide.spec.run import Lease
from selfguide.training import checkpoint, prototypes, publish
from selfguide.training.engine.protocol import DTYPES
from selfguide.training.epochs import Epochs
from selfguide.training.health import Health
from selfguide.training.state import State
from selfguide.training.telemetry import Telemetry
from shards.format.header import Header
from shards.read.stream import Stream


@dataclass
class Training:
    """All that the loop works with."""

    config: Config
    place: Place
    state: State
    stream: Stream  # this rank's micro-batches
    objective: Objective
    normaliser: Normaliser
    data: dict[str, Any]  # manifest hash and header, for snapshots
    telemetry: Telemetry
    lease: Lease
    health: Health = field(default_factory=Health)


def switch_images(config: Config) -> int:
    """The image count, a whole number of batches, from which an online source tells its groups."""
    if not isinstance(config.guidance, OnlineGuidance):
        return 0
    steps = config.train.images // config.train.batch
    return max(1, round(config.guidance.switch * steps)) * config.train.batch


def train(job: Training) -> None:
    """Runs to `train.images`; publishes snapshots and checkpoints at their cadence and at the end."""
    config, state, total = job.config, job.state, job.config.train.images
    epochs = Epochs(job.stream, job.place, state.accounts, config.data.damaged)
    job.telemetry.restart(state.images)
    while state.images < total:
        advance(job)
        epochs.settle()
        if due(config.train.log_every, state.images, config) or state.images >= total:
            job.telemetry.report(state.images, **job.health.measure(state, config))
        publish_what_is_due(job, epochs)


def advance(job: Training) -> None:
    """One step, and all that follows from it for averages, prototypes and the teacher."""
    config, state = job.config, job.state
    waited, substituted = job.stream.waited, job.stream.substituted
    applied = step(job)
    job.telemetry.read(job.stream.waited - waited, job.stream.substituted - substituted)
    seen = state.images + config.train.batch
    keep_rows_unit(job, applied)
    state.averages.update(config.train.batch, seen, applied)
    state.images = seen
    prototypes.revive(state, config, applied)
    turn_stage(job)
    refresh_teacher(job)


def step(job: Training) -> torch.Tensor:
    """One optimiser step over the global batch; a scalar on the device, false where gradients were not finite."""
    config, engine, source = job.config, job.state.engine, job.state.source
    teacher = job.state.teacher.module if job.state.teacher else None
    done = None
    while done is None:
        batch = prepare(job, next(job.stream))
        job.health.see(batch)
        condition = source.condition(batch, teacher)
        outputs = engine.forward(batch.x, batch.tau, condition, batch.features)
        flow = job.objective.losses(
            outputs.prediction, batch.x0, batch.eps, batch.tau, outputs.log_variance
        ).mean()
        guidance = source.loss(outputs, batch)
        engine.backward(flow if guidance is None else flow + guidance)
        losses = {"loss": flow} if guidance is None else {"loss": flow, "guidance_loss": guidance}
        done = engine.step(learning_rate(config, job.state.images))
        job.telemetry.add(**losses)
    job.telemetry.stepped(done)
    return done.applied


def prepare(job: Training, arrays: dict[str, np.ndarray]) -> Batch:
    """A micro-batch on the device: normalised images, and noise that is theirs wherever they are trained."""
    config, device = job.config, job.place.device
    # dropout draws by the images it works on: a resumed attempt draws what an uninterrupted one would have
    torch.manual_seed(stream_seed(config.seed, "dropout", int(arrays["position"][0])))
    position = torch.as_tensor(arrays["position"], device=device)
    x0 = job.normaliser.encode(torch.as_tensor(arrays["x"], device=device), config.seed, position)
    x0, placement = place(x0, config, job.normaliser.header, position)
    eps = normal(config.seed, "noise", position, tuple(x0.shape[1:]))
    preconditioning, share = job.objective.preconditioning, job.state.images / config.train.images
    tau = draw_times(config.path, preconditioning.path, config.seed, position, share)
    x = preconditioning.noised(x0, eps, tau).to(DTYPES[config.engine.dtype])
    ordinal = torch.as_tensor(arrays["ordinal"])  # on the CPU, where sidecars are looked up
    label = torch.as_tensor(arrays["y"], device=device) if "y" in arrays else None
    return Batch(x0, eps, tau, x, position, ordinal, label, job.state.images, placement=placement)


def place(
    x0: torch.Tensor, config: Config, header: Header, position: torch.Tensor
) -> tuple[torch.Tensor, Placement]:
    """What is shown of whole images (B, C, H, W), and how it was placed; one of a stored pair is mirrored already."""
    grid, data = (x0.shape[-2], x0.shape[-1]), config.data
    window = data.shape[1:] if data.crop else None
    flip = data.flip or header.flips
    placement = draw_placement(config.seed, position, grid, flip=flip, window=window)
    return placement.images(x0, mirrored=header.flips), placement


def learning_rate(config: Config, images: int) -> float:
    """Linear warm-up, then constant: a pure function of the images seen, so a resumed run needs no scheduler."""
    warm = config.train.warmup_images
    return config.train.learning_rate * (
        min(1.0, (images + config.train.batch) / warm) if warm else 1.0
    )


def due(every: int, images: int, config: Config) -> bool:
    """A multiple of `every` was reached or passed by the step that ended at `images`."""
    return images // every > (images - config.train.batch) // every


def turn_stage(job: Training) -> None:
    """At the switch the averages and the teacher become the live student, buffers included (SGFM)."""
    if job.state.teacher is None or job.state.images != switch_images(job.config):
        return
    job.state.averages.reset(job.state.images)
    job.state.teacher.refresh(job.state.averages.weights(), job.state.engine.module)


def refresh_teacher(job: Training) -> None:
    guidance = job.config.guidance
    if job.state.teacher is None or not isinstance(guidance, OnlineGuidance):
        return
    if due(guidance.teacher_refresh, job.state.images, job.config):
        follows = guidance.teacher_buffers == "student"
        job.state.teacher.refresh(
            job.state.averages.weights(),
            job.state.engine.module,
            buffers=follows or job.state.images <= switch_images(job.config),
        )


def keep_rows_unit(job: Training, applied: torch.Tensor) -> None:
    """Only where the average of unit rows is told as it is: else rows are normalised when they are read."""
    guidance = job.config.guidance
    if isinstance(guidance, OnlineGuidance) and guidance.condition_rows == "averaged":
        prototypes.normalise(job.state.engine, applied)


def publish_what_is_due(job: Training, epochs: Epochs) -> None:
    """Snapshots and checkpoints; the final one of each is always written.

    The snapshot goes first: an attempt that dies between the two resumes before it and comes by again, while one
    that resumed behind an unpublished snapshot would never publish it.
    """
    config, state, run = job.config, job.state, job.lease.run
    last = state.images >= config.train.images
    if last or due(config.train.snapshot_every, state.images, config):
        job.telemetry.say("snapshot", state.images)
        publish.publish(run.snapshot(state.images), state, config, job.data, job.place, job.lease)
    if last or due(config.train.checkpoint_every, state.images, config):
        job.telemetry.say("checkpoint", state.images)
        state.accounts = epochs.carried()
        checkpoint.save(run.checkpoint(state.images), state, job.place, job.lease)
        if job.place.rank == 0:
            checkpoint.prune(run.checkpoints, config.train.keep_checkpoints)
