"""The training loop, top to bottom: data, condition, loss, step, average, publish. Images seen is the clock."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from typing import NoReturn

import torch.distributed as dist
from torch import Tensor

from selfguide.data.batch import joined
from selfguide.distributed import on_rank_0
from selfguide.guidance.component import Stepped
from selfguide.spec.accumulation import cut_batch
from selfguide.spec.rank_status import Preempted
from selfguide.spec.run import write_record
from selfguide.spec.schedules import due, learning_rate
from selfguide.training import checkpoint, publish, retention
from selfguide.training.engine.protocol import Step
from selfguide.training.epochs import Epochs
from selfguide.training.preview import preview
from selfguide.training.stop import StopVote
from selfguide.training.tuning import Tuning
from selfguide.training.unstable import Unstable, judge
from selfguide.training.work import Training, drawn, prepare_batch

log = logging.getLogger(__name__)


def train(job: Training) -> None:
    """Runs to `train.images`; publishes snapshots and checkpoints at their cadence and at the end.

    Raises:
        Preempted: a rank was asked to stop; all ranks stopped at this step and saved it.
        Unstable: it no longer learns, and `train.unstable` is `stop`; RollBackError where it is `roll_back`.
    """
    config, state, total = job.config, job.state, job.config.train.images
    epochs = Epochs(job.stream, state.audits, config.data.damaged)
    tuning = Tuning(job.lease, job.rank_info, config.train.log_every)
    job.trace = tuning.trace
    vote = StopVote(job.telemetry.status, job.stream, tuning.newest, job.vote_group)
    job.vote_group = vote.group
    job.telemetry.status.start(state.images, compiles=config.engine.compile)
    job.telemetry.restart(state.images)
    while state.images < total:
        advance(job)
        epochs.settle()
        tuning.trace.stepped(state.images)
        if state.images >= total or due(tuning.log_every, state.images, config.train.batch):
            measured = state.components.report(state.images, state.teaching)
            line = job.telemetry.report(state.images, **measured)
            try:
                judge(job, line.get("loss"))
            except Unstable:
                # a run that goes back begins no second one beside it
                tuning.trace.end(state.images)
                raise
        job.telemetry.wall.mark("other")
        if job.saver is not None:
            job.saver.poll()
        if job.mirror is not None:
            job.mirror.poll(job.telemetry.status.saved, keeping(job))
        published = publish_what_is_due(job, epochs)
        if published:
            job.telemetry.wall.mark("checkpoint")
        if state.images < total and (number := vote.stop(at_once=published)):
            stop_here(job, epochs, signal.Signals(number).name)
        job.telemetry.wall.mark("data")
        if tuning.apply(vote.request, state.images, lambda: save_if_new(job, epochs)):
            stop_here(job, epochs, "launcher.tune", goes_on=False)
        # only now: a rank that waits in the vote for one that still publishes is not stuck
        if published:
            job.telemetry.say("train", state.images)
    tuning.trace.end(state.images)
    copy_newest(job)


def advance(job: Training) -> None:
    """One step, and all that follows from it for averages, components and the teacher."""
    state, batch = job.state, job.config.train.batch
    done = job.done = step(job)
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
            with drawn(job, at, batch.position):
                outputs = engine.forward(
                    batch.x, batch.tau, each.condition, each.features, read, last
                )
            each_loss = job.objective.losses(
                outputs.prediction, batch.x0, batch.eps, batch.tau, outputs.log_variance
            )
            job.telemetry.spectrum.add(each_loss, batch.tau, each.condition.state)
            flow = each_loss.mean()
            losses = components.losses(outputs, joined(parts), state.teaching) if last else {}
            own = components.own_losses(outputs, batch, state.teaching)
            # the engine takes the mean over micro-batches, and the first of these losses are of several
            shared = sum((together * loss for loss in losses.values()), flow)
            engine.backward(sum(own.values(), shared))
            # no rank has done its first step before all have come to this line
            job.telemetry.status.begun = True
            job.telemetry.wall.mark("forward_backward")
            if job.saver is not None:
                job.saver.settle()
                job.telemetry.wall.mark("checkpoint")
            done = engine.step(learning_rate(job.config, state.images))
            job.telemetry.wall.mark("optimiser")
            job.telemetry.add(loss=flow, **losses, **own)
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
    waited = save and save_checkpoint(job, epochs, wait=last)
    if snapshot and not waited:
        job.telemetry.say("train", state.images)
    return snapshot or waited


def publish_snapshot_if_due(job: Training) -> bool:
    """Publishes the snapshot of this image count where one is due and not there; returns whether one is due.

    Beside it are the samples that `train.preview` asks for.

    Raises:
        OSError: on all ranks alike, it cannot be written, unless train.save_failed=go_on; of the run's last one always.
    """
    config, state, run = job.config, job.state, job.lease.run
    last = state.images >= config.train.images
    if not last and not due(config.train.snapshot_every, state.images, config.train.batch):
        return False
    job.telemetry.say("snapshot", state.images)
    folder = run.snapshot(state.images)
    try:
        publish.publish(folder, state, config, job.data, job.rank_info, job.lease)
    except OSError as error:
        # without the last one no run has finished
        if last or config.train.save_failed == "stop":
            raise
        if job.rank_info.rank == 0:
            log.warning(
                f"no snapshot at {state.images:,} images: {error}. Training goes on, since train.save_failed=go_on"
            )
        on_rank_0(lambda: retention.clear(job.lease, folder))
        return True
    if config.train.preview:
        preview(job)
    return True


def save_checkpoint(job: Training, epochs: Epochs, *, wait: bool) -> bool:
    """Has a checkpoint of this step written, and those that are too many deleted; returns whether it is complete.

    One that all `wait` for, as for the last of an attempt, is written here, behind what the saver still has to write.
    """
    state, run, started = job.state, job.lease.run, time.monotonic()
    folder, status = run.checkpoint(state.images), job.telemetry.status
    state.audits = epochs.carried()
    if job.saver is not None and not wait:
        status.enter("checkpoint")
        job.saver.save(folder, state, lambda: keeping(job))
        status.enter("train")
        job.telemetry.wall.mark("checkpoint")
        return False
    job.telemetry.say("checkpoint", state.images)
    if job.saver is not None:
        job.saver.wait()
    checkpoint.save(folder, state, job.rank_info, job.lease)
    job.telemetry.saved(state.images, time.monotonic() - started)
    if job.rank_info.rank == 0:
        retention.prune(run.checkpoints, **keeping(job))  # type: ignore[arg-type]
    return True


def keeping(job: Training) -> Mapping[str, int | None]:
    """Which checkpoints `retention.prune` leaves behind a step."""
    train = job.config.train
    # the run may have to go back to a checkpoint from before it broke
    back_to = job.state.stability.good if train.unstable == "roll_back" else None
    return retention.rules(train, back_to, job.mirror.busy if job.mirror is not None else None)


def copy_newest(job: Training) -> None:
    """At the end of an attempt: all ranks return once its last checkpoint is in the store as well, or cannot be."""
    if job.mirror is not None:
        job.mirror.wait(job.telemetry.status.saved, keeping(job))


def save_if_new(job: Training, epochs: Epochs) -> bool:
    """Saves what the newest checkpoint does not hold; returns whether that was anything."""
    images = job.state.images
    if job.saver is not None:
        job.saver.wait()
    if images <= job.telemetry.status.saved:
        return False
    save_checkpoint(job, epochs, wait=True)
    # the ranks go on together: one that ends early has its scheduler end the others
    dist.barrier()
    job.telemetry.say("train", images)
    job.telemetry.wall.mark("checkpoint")
    return True


def stop_here(job: Training, epochs: Epochs, by: str, *, goes_on: bool = True) -> NoReturn:
    """Saves what the newest checkpoint does not hold, and ends training on all ranks.

    Unless it `goes_on`, no attempt follows by itself.

    Raises:
        Preempted: always.
    """
    new = save_if_new(job, epochs)
    copy_newest(job)
    if not goes_on and job.rank_info.rank == 0:
        asked = {"by": by, "done": time.time()}
        write_record(job.lease.run.cancelled(job.lease.number), asked, replace=True)
    raise Preempted(by, job.state.images if new else None)
