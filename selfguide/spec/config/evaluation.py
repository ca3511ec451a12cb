"""`evaluation=`: which protocol scores the snapshots, against what, and how many jobs may do so at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.config.laws import AtLeast, ReadWith, Seed

_IMAGES = (
    "protocol=fd_effnet", "protocol=fid_adm", "protocol=fid_clean", "protocol=fdd", "protocol=fd_timm"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """No part of it is identity: scores are records beside the run."""

    protocol: Literal[
        "none", "fd_digits", "fd_effnet", "fid_adm", "fid_clean", "fdd", "fd_timm"
    ] = "none"
    samples: Annotated[int, AtLeast(1)] = 5000
    # images that are drawn, and embedded, together; protocols of images pad the last block to it
    batch: Annotated[int, AtLeast(1)] = 500
    seed: Annotated[int, Seed(2**62)] = 0
    # how often groups are drawn: as in training, or evenly, C-EDM's control
    prior: Literal["empirical", "uniform"] = "empirical"
    in_flight: Annotated[int, AtLeast(1)] = 1
    attempts: Annotated[int, AtLeast(1)] = 3
    # what samples are compared with, in place of the run's own images: a .npz of mean and covariance, or shards of
    # images, such as a held-out part. An experiment may name the file, so that evaluation=none leaves it unread
    reference: str | None = None
    shards: Annotated[str | None, ReadWith(*_IMAGES)] = None
    # hash of these shards' manifest, which the submission fills in
    manifest: Annotated[str | None, ReadWith("shards=ROOT")] = None
    # the file of the feature net's weights, where it does not lie in one of the usual places
    weights: Annotated[str | None, ReadWith(*_IMAGES)] = None
    # a model of timm, and the sha256 of its weights
    net: Annotated[str | None, ReadWith("protocol=fd_timm")] = None
    sha256: Annotated[str | None, ReadWith("protocol=fd_timm")] = None
    # weights of the autoencoder whose latents the data are, where it is not to be looked for
    decoder: Annotated[str | None, ReadWith(*_IMAGES)] = None
    # refuses a submission whose evaluations would have to wait for a file
    require: Annotated[bool, ReadWith(*_IMAGES)] = False
    # of a job, each on a GPU where the cluster is asked for GPUs
    ranks: Annotated[int, AtLeast(1), ReadWith(*_IMAGES)] = 1
