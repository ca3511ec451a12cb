"""All that the loop works with, and a micro-batch made of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.data.crop_flip import CropFlip, sample_crop_flip
from selfguide.data.normaliser import Normaliser
from selfguide.data.transfer import on_device
from selfguide.diffusion.objectives import Objective, sample_times
from selfguide.distributed import RankInfo
from selfguide.models.backbone import Backbone
from selfguide.randomness import normal, stream_seed, uniform
from selfguide.spec.architecture import PatchTransformer
from selfguide.spec.config import Config
from selfguide.spec.run import Lease
from selfguide.training.engine.protocol import DTYPES, Step
from selfguide.training.mirror import Mirror
from selfguide.training.saver import Saver
from selfguide.training.state import State
from selfguide.training.telemetry import Telemetry
from selfguide.training.trace import Trace
from shards.format.header import Header
from shards.read.stream import Stream


@dataclass
class Training:
    """All that the loop works with."""

    config: Config
    rank_info: RankInfo
    state: State
    stream: Stream  # this rank's micro-batches
    objective: Objective
    normaliser: Normaliser
    data: dict[str, Any]  # manifest hash and header, for snapshots
    telemetry: Telemetry
    lease: Lease
    # without one this process writes checkpoints itself
    saver: Saver | None = None
    # without one checkpoints are in the run's folder alone
    mirror: Mirror | None = None
    # kept where the run goes back to a checkpoint. One that is left would take its count of collectives along, and a
    # rank that has left it would seem behind those that have not (`selfguide.distributed.collectives`)
    vote_group: dist.ProcessGroup | None = None
    # of this rank's steps, where one was asked for
    trace: Trace | None = None
    # of this rank and the last step, as they were read
    arrays: list[dict[str, np.ndarray]] = field(default_factory=list)
    # the last step, unread
    done: Step | None = None


def prepare_batch(job: Training, arrays: dict[str, np.ndarray]) -> Batch:
    """A micro-batch on the device: normalised images, and noise that is theirs wherever they are trained."""
    config, device = job.config, job.rank_info.device
    position = on_device(arrays["position"], device)
    x0 = job.normaliser.encode(on_device(arrays["x"], device), config.seed, position)
    x0, crop_flip = crop_and_flip(x0, config, job.normaliser.header, position)
    shown, x0 = x0, job.state.components.augment(x0, position)
    eps = normal(config.seed, "noise", position, tuple(x0.shape[1:]))
    preconditioning, share = job.objective.preconditioning, job.state.images / config.train.images
    tau = sample_times(config.path, preconditioning.path, config.seed, position, share)
    x = preconditioning.noised(x0, eps, tau).to(DTYPES[config.engine.dtype])
    ordinal = torch.as_tensor(arrays["ordinal"])  # on the CPU, where sidecars are looked up
    label = on_device(arrays["y"], device) if "y" in arrays else None
    batch = Batch(x0, eps, tau, x, position, ordinal, label, job.state.images, crop_flip=crop_flip)
    batch.unaugmented = None if shown is x0 else shown
    return batch


def drawn(
    job: Training, arrays: dict[str, np.ndarray], position: Tensor
) -> contextlib.AbstractContextManager[None]:
    """Draws a micro-batch's dropout now, and which of its tokens skip the middle blocks within the context.

    Both follow from its images at `position` (B,), so a resumed attempt draws what an uninterrupted one would have.
    """
    # read off the host's copy, which waits for no device
    torch.manual_seed(stream_seed(job.config.seed, "dropout", int(arrays["position"][0])))
    return routed(job.state.engine.module.backbone, job.config.seed, position)


def routed(
    backbone: Backbone, seed: int, position: Tensor
) -> contextlib.AbstractContextManager[None]:
    """Which tokens of the images at `position` (B,) skip the middle blocks, where some do: by their positions alone.

    So they do not depend on how a batch is cut, as dropout, which torch draws for a micro-batch, does.
    """
    net = backbone.net
    if not getattr(net, "route", 0.0):
        return contextlib.nullcontext()
    assert isinstance(net, PatchTransformer)
    return backbone.routed(uniform(seed, "training-route", position, net.tokens))


def crop_and_flip(
    x0: Tensor, config: Config, header: Header, position: Tensor
) -> tuple[Tensor, CropFlip]:
    """What is shown of whole images (B, C, H, W), and how it was placed; one of a stored pair is mirrored already."""
    grid, data = (x0.shape[-2], x0.shape[-1]), config.data
    window = data.shape[1:] if data.crop else None
    flip = data.flip or header.flips
    crop_flip = sample_crop_flip(config.seed, position, grid, flip=flip, window=window)
    return crop_flip.images(x0, mirrored=header.flips), crop_flip
