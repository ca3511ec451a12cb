"""Protocols of images: a snapshot's samples, decoded and rounded, in the features of a named net.

Image i is a function of the snapshot and of seed + i. Images are drawn, decoded and embedded in blocks of the
protocol's size, the last one padded, so that ranks and resumptions change no byte.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, load_autoencoder, to_images
from selfguide.discovery.resumable import array
from selfguide.evaluation.features.net import FeatureNet, exact, load_feature_net
from selfguide.evaluation.paired import Draw
from selfguide.evaluation.scores import (
    Known,
    fill,
    make_reference,
    parts_in,
    read_reference,
    scores_of,
)
from selfguide.sampling.condition_sampler import ConditionSampler, condition_sampler
from selfguide.sampling.generate import generate_each
from selfguide.snapshot import Snapshot
from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.identity import digest
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol
from shards.errors import UserError
from shards.format import manifest as manifests

SHOWN = 64  # of the first images, for the picture beside the record


@dataclass(frozen=True, kw_only=True)
class Work:
    """Where one evaluation keeps its parts, and which of its ranks this is."""

    # of this snapshot under this protocol alone
    parts: Path
    # of references, shared by all runs
    references: Path
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Scored:
    scores: dict[str, float]
    # network evaluations a sample took
    nfe: int
    # uint8 (n, C, H, W) of levels 0..255, the first ones
    images: Tensor
    # sha256 of files that were read, by their role
    files: dict[str, str]


def score_images(
    snapshot: Snapshot, config: Config, protocol: Protocol, status: RankStatus, work: Work
) -> Scored | None:
    """Scores a snapshot by a protocol of images; None on ranks but the first.

    Raises:
        UserError: a file is missing or is not what the protocol names, or samples are not finite.
    """
    evaluation = config.evaluation
    net = load_feature_net(
        evaluation.protocol, evaluation.weights, net=evaluation.net, sha256=evaluation.sha256
    ).to(work.device)
    samples = _Samples(snapshot, config)
    made = _Blocks(samples, net, work.parts, status)
    parts = parts_in(work.parts, evaluation.samples, evaluation.batch)
    known = reference_of(snapshot, evaluation, net, work)
    fill(parts, made.rows, doing="samples", rank=work.rank, world=work.world)
    latents = _latents(snapshot, evaluation, net, samples.codec, work)
    if work.rank:
        return None
    assert known is not None
    scores = scores_of(evaluation.protocol, net, parts, known, full=protocol.metric == "fid_adm")
    if latents is not None:
        decoded = latents.main
        scores["floor_reconstruction"] = known.main.distance(decoded.mean, decoded.covariance)
    return Scored(
        scores=scores,
        nfe=int(max(part[:, -1].max() for part in parts)),
        images=made.shown(),
        files={"reference": known.sha256} if known.sha256 else {},
    )


def decoder_of(snapshot: Snapshot, evaluation: EvaluationConfig) -> Autoencoder | None:
    """What makes images of the snapshot's latents; None where it makes images itself."""
    header = snapshot.data["header"]
    if header["kind"] == "image":
        return None
    return load_autoencoder(header["encoder"], evaluation.decoder, device=snapshot.device)


def drawn(snapshot: Snapshot, config: Config, net: FeatureNet) -> Draw:
    """Features of a snapshot's samples under a protocol of images, for a comparison of models.

    Raises:
        UserError: the autoencoder that decodes them is not to be had.
    """
    samples, batch = _Samples(snapshot, config), config.evaluation.batch

    def draw(first: int, last: int) -> Tensor:
        starts = range(first, last, batch)
        return torch.cat([net.embed(samples.images(i)[0])[: last - i] for i in starts])

    return draw


class _Samples:
    """Images of a snapshot by their number, in blocks."""

    def __init__(self, snapshot: Snapshot, config: Config) -> None:
        self.snapshot, self.config = snapshot, config
        self.codec = decoder_of(snapshot, config.evaluation)
        self._conditions: ConditionSampler = condition_sampler(snapshot, config.evaluation.prior)

    def images(self, first: int) -> tuple[Tensor, int]:
        """uint8 images (batch, C, H, W) from `first` on, a whole block, and network evaluations.

        Raises:
            UserError: samples that are not finite.
        """
        evaluation, snapshot = self.config.evaluation, self.snapshot
        seeds = evaluation.seed + first + torch.arange(evaluation.batch)
        with exact():
            ((x, evaluations),) = generate_each(
                snapshot, self.config.sampler, self._conditions(seeds), seeds, batch=len(seeds)
            )
            bad = ~torch.isfinite(x).flatten(1).all(1)
            if bad.any():
                raise UserError(
                    f"sample {first + int(bad.int().argmax())} of this snapshot is NaN or infinite: it cannot be "
                    "scored; look at its loss, or sample with more steps or less guidance"
                )
            return to_images(snapshot.data["header"], x, self.codec), evaluations


class _Blocks:
    """Rows of features of blocks of samples."""

    def __init__(
        self, samples: _Samples, net: FeatureNet, folder: Path, status: RankStatus
    ) -> None:
        self.samples, self.net, self.folder, self.status = samples, net, folder, status

    def rows(self, ordinals: NDArray[np.int64]) -> Tensor:
        """(B, D + 1): the features of samples, and the network evaluations that each took."""
        self.status.enter("evaluate")
        images, evaluations = self.samples.images(int(ordinals[0]))
        count = len(ordinals)
        if ordinals[0] < SHOWN:
            # before the rows are published: who finds those finds these
            kept = images[:count][: SHOWN - int(ordinals[0])].numpy()
            array(self._pictures(int(ordinals[0])), lambda: kept)
        features = self.net.rows(images)[:count]
        return torch.cat([features, torch.full((count, 1), float(evaluations))], 1)

    def shown(self) -> Tensor:
        """The first images, as uint8 (n, C, H, W)."""
        evaluation = self.samples.config.evaluation
        batch, count = evaluation.batch, evaluation.samples
        firsts = range(0, min(SHOWN, count), batch)
        return torch.from_numpy(np.concatenate([np.load(self._pictures(i)) for i in firsts]))

    def _pictures(self, first: int) -> Path:
        return self.folder / f"images-{first:06d}.npy"


def reference_of(
    snapshot: Snapshot, evaluation: EvaluationConfig, net: FeatureNet, work: Work
) -> Known | None:
    """A file, given shards, or the snapshot's own images, to compare samples with; None on ranks but the first."""
    if evaluation.reference:
        return None if work.rank else read_reference(evaluation.reference, net)
    root = evaluation.shards or snapshot.data["root"]
    wanted = evaluation.manifest or snapshot.data["manifest"]
    _check_manifest(root, wanted)
    return _made(root, wanted, evaluation, net, work)


def _latents(
    snapshot: Snapshot,
    evaluation: EvaluationConfig,
    net: FeatureNet,
    codec: Autoencoder | None,
    work: Work,
) -> Known | None:
    """The snapshot's data, decoded: as many as there are samples; None where they are images, or are here no more."""
    root = snapshot.data["root"]
    if codec is None:
        return None
    _check_manifest(root, snapshot.data["manifest"])
    return _made(root, snapshot.data["manifest"], evaluation, net, work, codec=codec)


def _made(
    root: str,
    manifest: str,
    evaluation: EvaluationConfig,
    net: FeatureNet,
    work: Work,
    codec: Autoencoder | None = None,
) -> Known | None:
    """Makes a reference of shards or finds it; its folder is named by all that decides it."""
    count = evaluation.samples if codec is not None else None
    decided = {**net.about, "batch": evaluation.batch, "count": count}
    if codec is not None:
        decided["decoder"] = codec.sha256
    folder = work.references / f"{manifest[:12]}-{digest(decided)}"
    return make_reference(
        root,
        net,
        folder,
        codec=codec,
        part=evaluation.batch,
        count=count,
        rank=work.rank,
        world=work.world,
    )


def _check_manifest(root: str, wanted: str) -> None:
    found = manifests.load(root).hash
    if found != wanted:
        raise UserError(
            f"{root} holds manifest {found[:12]}, and the protocol compares with {wanted[:12]}; put those shards back"
        )


def remove(work: Work) -> None:
    """Deletes the parts of an evaluation whose record is written."""
    shutil.rmtree(work.parts, ignore_errors=True)
