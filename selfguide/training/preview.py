"""Pictures of a run while it trains: samples of its main average beside each snapshot, without a second network."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from selfguide.data.autoencoders.images import to_images
from selfguide.data.autoencoders.load import load_autoencoder
from selfguide.distributed import gather
from selfguide.sampling.generate import generate
from selfguide.sampling.grid import png, sheet
from selfguide.snapshot import Snapshot
from selfguide.training.work import Training
from shards import storage
from shards.errors import UserError

log = logging.getLogger(__name__)

# pixels that a side of an image has at least in a picture
SIDE = 32


def preview(job: Training) -> None:
    """Draws `train.preview` samples, each rank its share, and shows them; all ranks call between two steps.

    The average stands in for the weights meanwhile, and no bit of training changes. Rank 0 alone decodes and writes:
    where it cannot, as where the device has no memory for it, it says so and training goes on.
    """
    drawn = gather(_samples(job, -(-job.config.train.preview // job.rank_info.world)))
    if job.rank_info.rank:
        return
    run, images = job.lease.run, job.state.images
    try:
        picture = _picture(job, torch.cat(drawn)[: job.config.train.preview])
        storage.publish(str(run.preview(images)), picture, replace=True)
    except (UserError, OSError, RuntimeError) as error:
        # torch raises RuntimeError, for want of memory too. No other rank takes part here, as all do in sampling
        log.warning(f"no preview at {images:,} images: {error}")
        return
    job.telemetry.picture(images, picture)


def _samples(job: Training, count: int) -> Tensor:
    """This rank's (count, C, H, W) in model space, on the CPU; sample i of all is a function of the weights and i."""
    state, config = job.state, job.config
    guidance = state.components.metadata()
    # blocks that training compiled would be compiled anew for other shapes
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), state.averaged() as network, eager:
        seen = Snapshot(
            network,
            config,
            state.images,
            guidance,
            job.data,
            sha256="",
            average=state.averages.specs[0],
            saw_labels=state.origin["saw_labels"] or not guidance["label_free"],
            origin=state.origin,
        )
        first = job.rank_info.rank * count
        made = generate(seen, config.sampler, seed=first, count=count, batch=count)
        return torch.cat([samples for samples, _ in made])


def _picture(job: Training, samples: Tensor) -> bytes:
    """A PNG of samples (N, C, H, W).

    Raises:
        UserError: the autoencoder that decodes them is not to be had.
    """
    header, device, codec = job.normaliser.header, job.rank_info.device, None
    if header.kind == "latent":
        codec = load_autoencoder(str(header.encoder), job.config.evaluation.decoder, device=device)
    with torch.no_grad():
        images = to_images(header, samples.to(device), codec)
    stacked = images.permute(0, 2, 3, 1).numpy()
    return png(sheet(stacked, zoom=max(1, SIDE // stacked.shape[1])))
