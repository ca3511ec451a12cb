"""Protocols of images: a snapshot's samples, decoded and rounded, in the features of a named net.

Image i is a function of the snapshot and of seed + i. Images are drawn, decoded and embedded in blocks of the
protocol's size, the last one padded, so that ranks and resumptions change no byte.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.data.autoencoders import Autoencoder, load_autoencoder, to_images
from selfguide.discovery.resumable import array
from selfguide.evaluation.beside import Beside, Clusters, over_sets
from selfguide.evaluation.clusters import Clustering, clustering
from selfguide.evaluation.features.net import FeatureNet, exact, load_feature_net
from selfguide.evaluation.metrics.frechet import Reference
from selfguide.evaluation.paired import Draw
from selfguide.evaluation.progress import Progress, reported, silent
from selfguide.evaluation.scores import (
    NEIGHBOURS,
    Crop,
    Known,
    fill,
    make_reference,
    moments_of,
    part_of,
    parts_in,
    read_reference,
    read_unconditional,
    scores_of,
)
from selfguide.sampling.condition_sampler import (
    ConditionSampler,
    TrainingImages,
    condition_sampler,
)
from selfguide.sampling.generate import generate_each
from selfguide.snapshot import Snapshot
from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.extras import OF_TEST, OF_TRAINING
from selfguide.spec.identity import digest
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol, crop_rule
from shards.errors import UserError
from shards.format import manifest as manifests

SHOWN = 64  # of the first images, for the picture beside the record
# of these, drawn once more without a GPU
ON_CPU = 4


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
    # for what takes long beside the drawing of samples
    progress: Progress = silent


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
    work = replace(work, progress=lambda: status.enter("evaluate"))
    net = load_feature_net(
        evaluation.protocol, evaluation.weights, net=evaluation.net, sha256=evaluation.sha256
    ).to(work.device)
    nets = {name: load_feature_net(name).to(work.device) for name in evaluation.fdr_protocols}
    samples = _Samples(snapshot, config)
    sets = [
        _Blocks(samples, net, work.parts, work.progress, number=number, more=tuple(nets.values()))
        for number in range(evaluation.sets)
    ]
    known = reference_of(snapshot, evaluation, net, work)
    for made in sets:
        fill(made.parts, made.rows, doing="samples", rank=work.rank, world=work.world)
    latents = _latents(snapshot, evaluation, net, samples.codec, work)
    against = _Against(snapshot, evaluation, net, nets, known, latents, work)
    if work.rank:
        return None
    assert known is not None
    full = protocol.metric == "fid_adm"
    scores = over_sets(
        [
            scores_of(
                evaluation.protocol,
                net,
                made.parts,
                known,
                full=full,
                evaluation=evaluation,
                beside=against.beside(made),
                progress=work.progress,
            )
            for made in sets
        ]
    )
    if latents is not None:
        decoded = latents.main
        scores["floor_reconstruction"] = known.main.distance(decoded.mean, decoded.covariance)
    if "drift" in evaluation.metrics:
        scores |= samples.drift(evaluation.drift_blocks, work.progress)
    files = {"reference": known.sha256, "unconditional": against.unconditional_sha256}
    return Scored(
        scores=scores,
        nfe=int(max(part[:, -1].max() for made in sets for part in made.parts)),
        images=sets[0].shown(),
        files={role: sha256 for role, sha256 in files.items() if sha256},
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


def check_finite(x: Tensor, first: int) -> None:
    """Returns when samples (B, C, H, W), of which the first one has that number, are finite.

    Raises:
        UserError: one that is not.
    """
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        raise UserError(
            f"sample {first + int(bad.int().argmax())} of this snapshot is NaN or infinite: it cannot be "
            "scored; look at its loss, or sample with more steps or less guidance"
        )


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
        snapshot = self.snapshot
        with exact():
            x, evaluations = self.drawn(first, self.config.evaluation.batch)
            check_finite(x, first)
            return to_images(snapshot.data["header"], x, self.codec), evaluations

    def drawn(self, first: int, size: int, snapshot: Snapshot | None = None) -> tuple[Tensor, int]:
        """A block of samples (size, C, H, W) in model space from `first` on, and network evaluations.

        Args:
            snapshot: draws them in place of the own one, on another device.
        """
        snapshot, seeds = snapshot or self.snapshot, self.seeds(first, size)
        ((x, evaluations),) = generate_each(
            snapshot, self.config.sampler, self._conditions(seeds), seeds, batch=len(seeds)
        )
        return x, evaluations

    def seeds(self, first: int, count: int) -> Tensor:
        """(count,) of the images from `first` on."""
        return self.config.evaluation.seed + first + torch.arange(count)

    def drift(self, blocks: Sequence[int], progress: Progress = silent) -> dict[str, float]:
        """How far the first samples move, before they are rounded, when they are drawn in blocks of these sizes.

        On a GPU also how far the first few are from those that a CPU draws.
        """
        evaluation = self.config.evaluation
        size, count = evaluation.batch, min(SHOWN, evaluation.samples)

        def drawn(size: int, count: int, snapshot: Snapshot | None = None) -> Tensor:
            firsts = reported(range(0, count, size), progress)
            made = [self.drawn(i, size, snapshot)[0] for i in firsts]
            return torch.cat(made)[:count]

        with exact():
            usual = drawn(size, count)
            moved = [float((drawn(each, count) - usual).abs().max()) for each in blocks]
            found = {"drift": max(moved, default=0.0)}
            if self.snapshot.device.type != "cpu":
                student = copy.deepcopy(self.snapshot.student).cpu()
                few = min(ON_CPU, count)
                on_cpu = drawn(few, few, replace(self.snapshot, student=student))
                found["drift_device"] = float((on_cpu - usual[:few]).abs().max())
        return found


class _Blocks:
    """Rows of features of blocks of samples, of one set."""

    def __init__(
        self,
        samples: _Samples,
        net: FeatureNet,
        folder: Path,
        progress: Progress,
        *,
        number: int = 0,
        more: tuple[FeatureNet, ...] = (),
    ) -> None:
        """
        Args:
            number: of the set; each has seeds of its own.
            more: nets whose features stand behind those of the first.
        """
        evaluation = samples.config.evaluation
        self.samples, self.nets, self.progress = samples, (net, *more), progress
        self.folder = folder / f"set-{number}" if number else folder
        self.first = number * evaluation.samples
        self.parts = parts_in(self.folder, evaluation.samples, evaluation.batch)

    def rows(self, ordinals: NDArray[np.int64]) -> Tensor:
        """(B, D + 1): the features of samples, and the network evaluations that each took."""
        self.progress()
        images, evaluations = self.samples.images(self.first + int(ordinals[0]))
        count = len(ordinals)
        if ordinals[0] < SHOWN:
            # before the rows are published: who finds those finds these
            kept = images[:count][: SHOWN - int(ordinals[0])].numpy()
            array(self._pictures(int(ordinals[0])), lambda: kept)
        features = [net.rows(images)[:count] for net in self.nets]
        return torch.cat([*features, torch.full((count, 1), float(evaluations))], 1)

    def columns(self, number: int) -> slice:
        """Where the features of a net lie, without the spatial ones."""
        before = sum(net.width + net.spatial for net in self.nets[:number])
        return slice(before, before + self.nets[number].width)

    def shown(self) -> Tensor:
        """The first images, as uint8 (n, C, H, W)."""
        evaluation = self.samples.config.evaluation
        batch, count = evaluation.batch, evaluation.samples
        firsts = range(0, min(SHOWN, count), batch)
        return torch.from_numpy(np.concatenate([np.load(self._pictures(i)) for i in firsts]))

    def _pictures(self, first: int) -> Path:
        return self.folder / f"images-{first:06d}.npy"


class _Against:
    """What samples are compared with beside the reference; every rank makes its share of it."""

    def __init__(
        self,
        snapshot: Snapshot,
        evaluation: EvaluationConfig,
        net: FeatureNet,
        nets: Mapping[str, FeatureNet],
        known: Known | None,
        latents: Known | None,
        work: Work,
    ) -> None:
        metrics: set[str] = set(evaluation.metrics)
        self.snapshot, self.evaluation, self.known = snapshot, evaluation, known
        self.progress = work.progress
        own = not (evaluation.reference or evaluation.shards)
        self.train: Known | None = None
        if metrics & {*OF_TRAINING}:
            # ranks but the first get no references, and make their share of them all the same
            if snapshot.data["header"]["kind"] != "image":
                self.train = latents
            else:
                self.train = known if own else _own(snapshot, evaluation, net, work)
        self.test = _test(evaluation, net, work) if metrics & {*OF_TEST} else None
        # of the ratio: each net's reference and test images
        self.ratios: list[tuple[str, Known | None, Known | None]] = []
        if "fdr" in metrics:
            self.ratios.append((evaluation.protocol, known, self.test))
        for name, other in nets.items():
            reference = reference_of(snapshot, evaluation, other, work)
            self.ratios.append((name, reference, _test(evaluation, other, work)))
        self.unconditional: Reference | None = None
        self.unconditional_sha256: str | None = None
        if "ufid" in metrics and not work.rank:
            found = read_unconditional(
                str(evaluation.unconditional), net, work.progress, evaluation.unconditional_sha256
            )
            self.unconditional, self.unconditional_sha256 = found.main, found.sha256
        self.clustering: Clustering | None = None
        self.labels: NDArray[np.int64] | None = None
        if metrics & {"cluster_fd", "agreement"} and not work.rank:
            self._clusters(metrics)

    def beside(self, made: _Blocks) -> Beside:
        """The same for a set of samples."""
        evaluation = self.evaluation
        clusters = None
        if self.clustering is not None:
            seeds = made.samples.seeds(made.first, evaluation.samples)
            of_samples = self.clustering.made(seeds)
            clusters = Clusters(real=self.clustering.real, made=of_samples, labels=self.labels)
        distances, validation = {}, {}
        for number, (name, reference, test) in enumerate(self.ratios):
            assert reference is not None
            assert test is not None
            main = reference.main
            moments = moments_of(
                made.parts, made.columns(number), main.mean, progress=self.progress
            )
            distances[name] = main.distance(*moments.gaussian())
            validation[name] = main.distance(test.main.mean, test.main.covariance)
        return Beside(
            train=self.train.features if self.train else None,
            test=self.test.features if self.test else None,
            unconditional=self.unconditional,
            clusters=clusters,
            distances=distances,
            validation=validation,
        )

    def _clusters(self, metrics: set[str]) -> None:
        """Clusters of the training images whose features are kept, and their labels."""
        images = TrainingImages(self.snapshot)
        count = min(self.evaluation.kept, images.count)
        if self.train is not None and self.train.features is not None:
            count = min(count, len(self.train.features))
        ordinals = part_of(images.count, count, self.evaluation.reference_seed)
        self.clustering = clustering(self.snapshot, self.evaluation, ordinals, self.progress)
        if "agreement" in metrics:
            parts = ordinals.split(self.evaluation.batch)
            read = [images.labels(part) for part in reported(parts, self.progress)]
            self.labels = torch.cat(read).numpy()


def reference_of(
    snapshot: Snapshot, evaluation: EvaluationConfig, net: FeatureNet, work: Work
) -> Known | None:
    """A file, given shards, or the snapshot's own images, to compare samples with; None on ranks but the first."""
    if evaluation.reference:
        if work.rank:
            return None
        return read_reference(
            evaluation.reference, net, progress=work.progress, sha256=evaluation.reference_sha256
        )
    root = evaluation.shards or snapshot.data["root"]
    wanted = evaluation.manifest or snapshot.data["manifest"]
    _check_manifest(root, wanted)
    return _made(root, wanted, evaluation, net, work)


def _own(
    snapshot: Snapshot, evaluation: EvaluationConfig, net: FeatureNet, work: Work
) -> Known | None:
    """The run's own images, where samples are compared with others."""
    own = replace(evaluation, shards=None, reference=None, manifest=None)
    return reference_of(snapshot, own, net, work)


def _test(evaluation: EvaluationConfig, net: FeatureNet, work: Work) -> Known | None:
    """Images that nobody trained on."""
    root = str(evaluation.test)
    wanted = evaluation.test_manifest or manifests.load(root).hash
    _check_manifest(root, wanted)
    whole = replace(evaluation, reference_count=None, reference_seed=None)
    return _made(root, wanted, whole, net, work)


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
    count = evaluation.samples if codec is not None else evaluation.reference_count
    decided = {**net.about, "batch": evaluation.batch, "count": count}
    if codec is not None:
        decided["decoder"] = codec.sha256
    # not named where it is as it always was
    if evaluation.kept != NEIGHBOURS:
        decided["kept"] = evaluation.kept
    if evaluation.reference_seed is not None:
        decided["seed"] = evaluation.reference_seed
    crop = Crop.of_evaluation(evaluation) if codec is None else None
    if crop is not None:
        decided["crop"] = crop_rule(evaluation)
    folder = work.references / f"{manifest[:12]}-{digest(decided)}"
    return make_reference(
        root,
        net,
        folder,
        codec=codec,
        part=evaluation.batch,
        count=count,
        seed=evaluation.reference_seed,
        kept=evaluation.kept,
        crop=crop,
        rank=work.rank,
        world=work.world,
        progress=work.progress,
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
