"""Scores of rows of features against a reference: what every set of images goes through, whoever made it.

Features lie in parts on disk, each part whole or not there (`selfguide.discovery.resumable.Rows`), and image i is
always in part i // part. So any number of ranks may make them, a kill loses one part, and sums are taken in the order
of the parts: the same bytes, whoever made which.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfguide.data.autoencoders import Autoencoder, to_images
from selfguide.data.normaliser import Normaliser
from selfguide.discovery.resumable import Make, Rows
from selfguide.evaluation.beside import Beside, Measured, measure
from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.metrics.frechet import Reference, distance, frechet
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.progress import Progress, reported, silent
from selfguide.randomness import sample, uniform
from selfguide.spec.config import EvaluationConfig
from selfguide.spec.extras import measured
from selfguide.spec.metrics import LEAST_SAMPLES
from selfguide.spec.records import PART, REFERENCE
from selfguide.spec.reference_files import check_made_with, check_names_run, made_by
from selfguide.spec.weight_files import locate_reference, reference_places
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.lock import lock
from shards.read.reader import Reader
from shards.sources.arrays import members, read_array
from shards.wait import wait_until

Array = NDArray[np.generic]

# of real images: their features are kept for precision and recall, as many as ADM's reference holds
NEIGHBOURS = EvaluationConfig.kept

# seconds between two looks whether another evaluation is done with a reference
POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Known:
    """A reference with what stands beside a score."""

    main: Reference
    # of the spatial features, where the net has any
    spatial: Reference | None = None
    # (M, D) features of some real images, for precision and recall
    features: Array | None = None
    # sha256 of the file it was read from; None where it was made of shards
    sha256: str | None = None

    @property
    def floor(self) -> float | None:
        """The distance of its two halves, where they are known."""
        return self.main.about.get("floor")


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A window of `edge` by `edge` in each image: its middle, or as (seed, number of the image) decide."""

    edge: int
    random: bool = False
    seed: int = 0

    @classmethod
    def of_evaluation(cls, evaluation: EvaluationConfig) -> Crop | None:
        if evaluation.crop is None:
            return None
        random = evaluation.crop_rule == "random"
        return cls(edge=evaluation.crop, random=random, seed=evaluation.crop_seed)

    def of(self, images: torch.Tensor, ordinals: NDArray[np.int64]) -> torch.Tensor:
        """(B, C, edge, edge) of images (B, C, H, W) at these ordinals.

        Raises:
            UserError: they are smaller.
        """
        height, width = images.shape[-2:]
        if self.edge > min(height, width):
            raise UserError(
                f"evaluation.crop={self.edge} and the reference's images are {height} by {width}: give "
                f"evaluation.crop={min(height, width)} or less"
            )
        free = torch.tensor([height, width]) - self.edge
        at = (free // 2).expand(len(images), 2)
        if self.random:
            turns = uniform(self.seed, "reference crop", torch.from_numpy(ordinals), 2)
            at = (turns.double() * (free + 1)).long()
        cut = [
            image[:, y : y + self.edge, x : x + self.edge]
            for image, (y, x) in zip(images, at.tolist(), strict=True)
        ]
        return torch.stack(cut)


def parts_in(folder: Path, count: int, part: int) -> Rows:
    """Rows of features of `count` images, `part` of them in each file of `folder`."""
    return Rows(folder=folder, prefix=PART, count=count, chunk=part, dtype=np.float32)


def fill(found: Rows, make: Make, *, doing: str, rank: int = 0, world: int = 1) -> None:
    """Makes this rank's parts; rank 0 returns once the parts of all ranks are there."""
    found.fill(make, batch=found.chunk, doing=doing, rank=rank, world=world)
    if rank == 0:
        # without a word: a job hangs only where all of its ranks are quiet, and those that make parts are not
        wait_until(lambda: found.complete, poll_s=0.5)


def moments_of(
    parts: Iterable[Array],
    columns: slice,
    shift: NDArray[np.float64] | None = None,
    blocks: int = 10,
    progress: Progress = silent,
) -> Moments:
    """Moments of these columns of the parts, about `shift`, or about the mean of the first part."""
    made, first = None, 0
    for part in reported(parts, progress):
        features = np.asarray(part[:, columns], dtype=np.float64)
        if made is None:
            made = Moments(features.mean(0) if shift is None else shift, blocks)
        made.update(features, first)
        first += len(features)
    assert made is not None
    return made


def scores_of(
    protocol: str,
    net: FeatureNet,
    parts: Rows,
    known: Known,
    *,
    full: bool,
    evaluation: EvaluationConfig | None = None,
    beside: Beside | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """The scores of the images whose features `parts` hold, under the protocol's name.

    Args:
        full: ADM's further scores as well: sFID, Inception Score, precision and recall.
        evaluation: says what is measured beside; by default what the protocol always measures.
        beside: what that is compared with.

    Raises:
        UserError: fewer images than its error bar needs, or a reference of another width.
    """
    if parts.count < LEAST_SAMPLES:
        raise UserError(
            f"{parts.count} images are too few for a score with its error: give {LEAST_SAMPLES} or more"
        )
    check_reference(known.main, net)
    evaluation = evaluation or EvaluationConfig(protocol="fid_adm" if full else "none")
    main = slice(0, net.width)
    score = frechet(known.main, moments_of(parts, main, known.main.mean, progress=progress))
    found = {
        protocol: score.value,
        f"{protocol}_se": score.se,
        f"{protocol}_corrected": score.corrected,
    } | score.blocks
    if known.floor is not None:
        found["floor"] = known.floor
    if full and known.spatial is not None and net.spatial:
        spatial = slice(net.width, net.width + net.spatial)
        moments = moments_of(parts, spatial, known.spatial.mean, blocks=1, progress=progress)
        found["sfid"] = known.spatial.distance(*moments.gaussian())
    if measured(evaluation):
        features = np.concatenate([part[:, main] for part in parts])
        found |= measure(
            Measured(
                evaluation=evaluation,
                net=net,
                features=features,
                real=known.features,
                beside=beside or Beside(),
                progress=progress,
            )
        )
    return found


def check_reference(reference: Reference, net: FeatureNet) -> None:
    """Returns when a reference was made as this net sees images, as far as it says.

    Raises:
        UserError: names what differs.
    """
    check_made_with(reference.about.get("features") or {}, len(reference.mean), net.about, net.name)


def read_reference(
    given: str,
    net: FeatureNet,
    field: str = "reference",
    progress: Progress = silent,
    sha256: str | None = None,
) -> Known:
    """A reference from a file: ours, ADM's, clean-fid's, or anybody's `mu` and `sigma`.

    Of ADM's the spatial statistics are read, too, and its images, of which precision and recall need the features.

    Args:
        field: the setting that names it, for messages.
        sha256: of the file that a protocol compares with, where it says so.

    Raises:
        UserError: it is no reference, or one of another protocol, or another file than this.
    """
    path = locate_reference(given)
    if path is None:
        places = " or ".join(map(str, reference_places(given)))
        raise UserError(f"{field}={given}: no such file at {places}; {made_by(field)} makes one")
    found = storage.sha256(str(path))
    if sha256 not in (None, found):
        raise UserError(
            f"{field}={given}: the file has sha256 {found[:12]}, and the protocol compares with {str(sha256)[:12]}; "
            f"put that file back, or `python -m launcher.evaluate RUN evaluation.{field}={given}` scores against this "
            "one as well"
        )
    main = Reference.load(path)
    try:
        check_reference(main, net)
    except UserError as error:
        raise UserError(
            f"{field}={given}: {error}; {made_by(field)} makes one of this protocol"
        ) from error
    names = set(members(str(path)))
    spatial = Reference.load(path, spatial=True) if {"mu_s", "sigma_s"} <= names else None
    features: Array | None = None
    if "features" in names:
        features = read_array(str(path), "features")
    elif "arr_0" in names and net.logits is not None:
        pictures = read_array(str(path), "arr_0")
        features = np.concatenate(
            [net.embed(_nchw(part)).numpy() for part in reported(_cut(pictures, 50), progress)]
        )
    if features is not None and features.shape[1:] != main.mean.shape:
        raise UserError(
            f"{path} is no reference: its mean has {len(main.mean)} features, and those of its images are "
            f"{features.shape}"
        )
    return Known(main=main, spatial=spatial, features=features, sha256=found)


def read_unconditional(
    given: str, net: FeatureNet, progress: Progress = silent, sha256: str | None = None
) -> Known:
    """Statistics of an unconditional run's samples from a file.

    Args:
        sha256: of the file that a protocol compares with, where it says so.

    Raises:
        UserError: they are none, of another protocol, of a run that nobody named, or another file than this.
    """
    found = read_reference(given, net, "unconditional", progress, sha256)
    try:
        check_names_run(found.main.about)
    except UserError as error:
        raise UserError(
            f"unconditional={given}: {error}; {made_by('unconditional')} makes one that does"
        ) from error
    return found


def make_reference(
    root: str,
    net: FeatureNet,
    folder: Path,
    *,
    codec: Autoencoder | None = None,
    part: int = 50,
    count: int | None = None,
    seed: int | None = None,
    kept: int = NEIGHBOURS,
    crop: Crop | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Progress = silent,
) -> Known | None:
    """The reference of the images in shards, or of their decoded latents; None on ranks but the first.

    It is made once in `folder`, whose name has to stand for the shards and the net, and read there afterwards.

    Args:
        codec: what decodes latents.
        count: of so many samples only.
        seed: draws them, and among them those that are kept; None takes the first ones.
        kept: images at most whose features it holds.
        crop: cuts a window out of each image.
        progress: called with each part, and while another evaluation makes the same one.

    Raises:
        UserError: the images are too few for two halves, or smaller than the window.
    """
    file = folder / REFERENCE
    manifest = manifests.load(root)
    total = min(count or manifest.count, manifest.count)
    if total < 2 * LEAST_SAMPLES:
        raise UserError(
            f"{total} images of {root}: a reference and its halves need {2 * LEAST_SAMPLES} or more"
        )
    found = parts_in(folder / "parts", total, part)
    chosen = part_of(manifest.count, total, seed).numpy()
    if rank:
        if not file.exists():
            _fill_reference(found, root, manifest, chosen, net, codec, crop, progress, rank, world)
        return None
    folder.mkdir(parents=True, exist_ok=True)

    def pause(_: float) -> None:
        # whoever makes it says itself whether it hangs, and the kernel takes the lock from one that is dead
        progress()
        time.sleep(POLL_S)

    # another evaluation may be making it
    with lock(folder, create=False, required=False, seconds=math.inf, pause=pause):
        if not file.exists():
            _fill_reference(found, root, manifest, chosen, net, codec, crop, progress, 0, world)
            about: dict[str, Any] = {"shards": manifest.hash}
            if seed is not None:
                about["seed"] = seed
            some = part_of(manifest.count, min(kept, total), seed).numpy()
            _publish_reference(file, net, found, about, np.searchsorted(chosen, some), progress)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    # its shards say what it is
    return replace(read_reference(str(file), net), sha256=None)


def part_of(total: int, count: int, seed: int | None) -> torch.Tensor:
    """(count,) ordinals, ascending, of so many of `total` samples: drawn by the seed, or the first ones."""
    return torch.arange(count) if seed is None else sample(seed, "reference", total, count)


def _fill_reference(
    found: Rows,
    root: str,
    manifest: Manifest,
    chosen: NDArray[np.int64],
    net: FeatureNet,
    codec: Autoencoder | None,
    crop: Crop | None,
    progress: Progress,
    rank: int,
    world: int,
) -> None:
    """Makes this rank's parts of the features of the images at these ordinals of `root`."""
    header = manifest.header
    with closing(Reader(root, manifest)) as reader:

        def make(rows: NDArray[np.int64]) -> torch.Tensor:
            progress()
            ordinals = chosen[rows]
            stored = torch.as_tensor(reader.gather(ordinals, fields=("x",))["x"])
            images = to_images(header, Normaliser.of(header).encode(stored), codec)
            return net.rows(images if crop is None else crop.of(images, ordinals))

        fill(found, make, doing=f"features of {found.count:,} images", rank=rank, world=world)


def _publish_reference(
    file: Path,
    net: FeatureNet,
    found: Rows,
    made_of: dict[str, Any],
    kept: NDArray[np.int64],
    progress: Progress,
) -> None:
    """Writes the reference.

    Args:
        made_of: what it says of its images.
        kept: rows (M,), ascending, whose features it holds.
    """
    halves = moments_of(found, slice(0, net.width), blocks=2, progress=progress)
    about = {
        "features": net.about,
        **made_of,
        "floor": distance(*halves.gaussian(without=0), *halves.gaussian(without=1)),
    }
    main, spatial = Reference.of(halves, about), None
    if net.spatial:
        columns = slice(net.width, net.width + net.spatial)
        spatial = Reference.of(moments_of(found, columns, blocks=1, progress=progress))
    _save(file, main, spatial, _rows(found, kept)[:, : net.width])


def _save(file: Path, main: Reference, spatial: Reference | None, features: Array) -> None:
    arrays: dict[str, Any] = {
        "mu": main.mean,
        "sigma": main.covariance,
        "sqrt": main.root,
        "count": main.count,
        "about": json.dumps(main.about),
        "features": features,
    }
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    data = io.BytesIO()
    np.savez(data, **arrays)
    storage.publish(file, data.getvalue(), replace=True)


def _rows(parts: Iterable[Array], wanted: NDArray[np.int64]) -> Array:
    """(M, D) rows at `wanted` (M,), ascending; parts behind the last one are not read."""
    found, first = [], 0
    for part in parts:
        there = wanted[(wanted >= first) & (wanted < first + len(part))]
        found.append(part[there - first])
        first += len(part)
        if first > wanted[-1]:
            break
    return np.concatenate(found)


def _cut(rows: Array, size: int = 1000) -> Iterator[Any]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _nchw(images: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
