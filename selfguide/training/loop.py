"""The training loop, top to bottom: data, condition, loss, step, average, publish. Images seen is the clock."""

from __future__ import annotations

import signal
import time
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.data.batch import joined
from selfguide.guidance.component import Stepped
from selfguide.randomness import stream_seed
from selfguide.spec.accumulation import cut_batch
from selfguide.spec.rank_status import Preempted
from selfguide.spec.schedules import due, learning_rate
from selfguide.training import checkpoint, publish
from selfguide.training.engine.protocol import Step
from selfguide.training.epochs import Epochs
from selfguide.training.stop import StopVote
from selfguide.training.unstable import judge
from selfguide.training.work import Training, prepare_batch


def train(job: Training) -> None:
    """Runs to `train.images`; publishes snapshots and checkpoints at their cadence and at the end.

    Raises:
        Preempted: a rank was asked to stop; all ranks stopped at this step and saved it.
        Unstable: it no longer learns, and `train.unstable` is `stop`.
    """
    config, state, total = job.config, job.state, job.config.train.images
    epochs = Epochs(job.stream, state.audits, config.data.damaged)
    vote = StopVote(job.telemetry.status, job.stream)
    job.telemetry.status.start(state.images, compiles=config.engine.compile)
    job.telemetry.restart(state.images)
    while state.images < total:
        advance(job)
        epochs.settle()
        if state.images >= total or due(config.train.log_every, state.images, config.train.batch):
            measured = state.components.report(state.images, state.teaching)
            line = job.telemetry.report(state.images, **measured)
            judge(job, line.get("loss"))
        job.telemetry.wall.mark("other")
        published = publish_what_is_due(job, epochs)
        if published:
            job.telemetry.wall.mark("checkpoint")
        if state.images < total and (number := vote.stop(at_once=published)):
            stop_here(job, epochs, number)
        job.telemetry.wall.mark("data")
        if (
            published
        ):  # only now: a rank that waits in the vote for one that still publishes is not stuck
            job.telemetry.say("train", state.images)


def advance(job: Training) -> None:
    """One step, and all that follows from it for averages, components and the teacher."""
    state, batch = job.state, job.config.train.batch
    done = step(job)
    job.telemetry.stepped(done)
    state.stability.stepped(done.applied)
    job.telemetry.read(job.stream.waited, job.stream.substituted)
    stepped = Stepped(done.applied, state.images + batch, batch)
    state.components.after_step(state, stepped)
    state.averages.update(batch, stepped.images, done.applied)
    state.images = stepped.images
    state.components.after_average(state, stepped)
    job.telemetry.wall.mark("optimiser")
    job.telemetry.status.advance(state.images)


def step(job: Training) -> Step:
    """One optimiser step over the global batch, in as many micro-batches as the engine asks for.

    Of micro-batches that share statistics all conditions are made before the first backward, and the components' losses
    are of all of them, in the backward of the last one.
    """
    state, engine, components = job.state, job.state.engine, job.state.components
    together = cut_batch(job.config, job.rank_info.world).together
    done = None
    job.arrays.clear()
    while done is None:
        arrays = [next(job.stream) for _ in range(together)]
        job.arrays += arrays
        job.telemetry.wall.mark("data")
        parts = [prepare_batch(job, each) for each in arrays]
        inputs = [components.inputs(part, state.teaching) for part in parts]
        read: list[Tensor] = []
        for at, batch, each in zip(arrays, parts, inputs, strict=True):
            last = batch is parts[-1]
            # by the images that it works on: a resumed attempt draws what an uninterrupted one would have
            torch.manual_seed(stream_seed(job.config.seed, "dropout", int(at["position"][0])))
            outputs = engine.forward(batch.x, batch.tau, each.condition, each.features, read, last)
            each_loss = job.objective.losses(
                outputs.prediction, batch.x0, batch.eps, batch.tau, outputs.log_variance
            )
            job.telemetry.spectrum.add(each_loss, batch.tau, each.condition.state)
            flow = each_loss.mean()
            losses = components.losses(outputs, joined(parts), state.teaching) if last else {}
            # the engine takes the mean over micro-batches, and these losses are of several
            engine.backward(sum((together * loss for loss in losses.values()), flow))
            # no rank has done its first step before all have come to this line
            job.telemetry.status.begun = True
            job.telemetry.wall.mark("forward_backward")
            done = engine.step(learning_rate(job.config, state.images))
            job.telemetry.wall.mark("optimiser")
            job.telemetry.add(loss=flow, **losses)
            if outputs.features is not None:
                read.append(outputs.features)
    assert done is not None
    return done


def publish_what_is_due(job: Training, epochs: Epochs) -> bool:
    """Snapshots and checkpoints; the final one of each is always written. Returns whether any was due.

    The snapshot goes first: an attempt that dies between the two resumes before it and comes by again, while one
    that resumed behind an unpublished snapshot would never publish it.
    """
    config, state = job.config, job.state
    batch, last = config.train.batch, state.images >= config.train.images
    snapshot = publish_snapshot_if_due(job)
    save = last or due(config.train.checkpoint_every, state.images, batch)
    if save:
        save_checkpoint(job, epochs)
    elif snapshot:
        job.telemetry.say("train", state.images)
    return snapshot or save


def publish_snapshot_if_due(job: Training) -> bool:
    """Publishes the snapshot of this image count where one is due and not there; returns whether one is due."""
    config, state, run = job.config, job.state, job.lease.run
    last = state.images >= config.train.images
    if not last and not due(config.train.snapshot_every, state.images, config.train.batch):
        return False
    job.telemetry.say("snapshot", state.images)
    publish.publish(run.snapshot(state.images), state, config, job.data, job.rank_info, job.lease)
    return True


def save_checkpoint(job: Training, epochs: Epochs) -> None:
    """Writes a checkpoint of this step, and deletes those that are too many."""
    state, run, started = job.state, job.lease.run, time.monotonic()
    job.telemetry.say("checkpoint", state.images)
    state.audits = epochs.carried()
    checkpoint.save(run.checkpoint(state.images), state, job.rank_info, job.lease)
    job.telemetry.saved(state.images, time.monotonic() - started)
    if job.rank_info.rank == 0:
        checkpoint.prune(
            run.checkpoints, job.config.train.keep_checkpoints, job.config.train.keep_every
        )


def stop_here(job: Training, epochs: Epochs, number: int) -> NoReturn:
    """Saves what the newest checkpoint does not hold, and ends training on all ranks.

    Raises:
        Preempted: always.
    """
    images = job.state.images
    new = images > job.telemetry.status.saved
    if new:
        save_checkpoint(job, epochs)
        # the ranks end together: one that ends early has its scheduler end the others
        dist.barrier()
        job.telemetry.say("train", images)
    raise Preempted(signal.Signals(number).name, images if new else None)
