"""Whether shards are what a run can learn from: shape, labels, and latents in the units that its first weights know.

All of it is read from the shards' manifest before a job is queued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.config.augment import check_augmented
from selfguide.spec.config.data import check_stored
from selfguide.spec.config.evaluation import LEAST_REAL
from selfguide.spec.extras import OF_TRAINING, check_real
from selfguide.spec.initial_weights import read_snapshot
from selfguide.spec.metrics import FEATURES
from shards import storage
from shards.errors import UserError

if TYPE_CHECKING:  # needs NumPy, and a dry run does not
    from shards.format.header import Header
    from shards.format.manifest import Manifest

PUBLISHED_SCALE = 0.18215  # of the latents that DiT, SiT and U-ViT learned (Rombach et al. 2022)
_OTHERS = ("va_vae", "tiny")  # encoders known here whose latents those are not
_LATENTS_OF = (
    "kind",
    "encoder",
    "encoder_sha256",
    "shift",
    "scale",
)  # of which two latent spaces differ in one


def check_fit(config: Config, manifests: Sequence[Manifest]) -> None:
    """Returns when these shards are what `config` expects; several are known to be alike.

    Raises:
        UserError: the first disagreement, with field, value and cure.
    """
    from shards.format.header import Header

    data, manifest = config.data, manifests[0]
    header = Header.of(manifest.header)
    for root, each in zip((data.root, *data.mix), manifests, strict=True):
        if each.count < 1:
            raise UserError(
                f"data.root={root} holds no sample; write shards into it, or give another data.root"
            )
    check_stored(data, header, manifest.model_shape)
    check_augmented(config, header)
    if manifest.classes and manifest.classes != data.classes:
        raise UserError(
            f"data.classes={data.classes} and the shards in {data.root} have {manifest.classes} classes; "
            f"set data.classes={manifest.classes}"
        )
    if config.guidance.uses_labels and not manifest.classes:
        raise UserError(
            f"guidance=labels, and the shards in {data.root} have no labels; take guidance=online"
        )
    for by in config.scored_by:
        check_scored(by, header)
        check_counts(by, header, lambda: manifest.count)
        if by.evaluation.protocol == "probe":
            check_labels(data.root, manifest)
    if header.kind == "latent" and config.contrastive.on and config.contrastive.view == "moved":
        raise UserError(
            f"contrastive.view=moved, and the shards in {data.root} hold latents: one that is mirrored or moved "
            "is not the latent of the moved image; take contrastive.view=same, where noise alone makes two views"
        )
    _check_first_weights(config, header)
    if data.cache is not None and storage.is_remote(data.root):
        _check_cache(config, data.cache, manifests)


def check_scored(config: Config, header: Header) -> None:
    """Returns when samples can be compared with something: those of latents as images, which latents are not.

    Args:
        header: of the data that the model learns.

    Raises:
        UserError: they cannot.
    """
    evaluation = config.evaluation
    features = FEATURES.get(evaluation.protocol)
    if features is not None and features.of_digits and header.kind == "latent":
        raise UserError(
            f"evaluation.protocol={evaluation.protocol} compares images, and the shards in {config.data.root} hold "
            f"latents of {header.encoder}; set evaluation=none"
        )
    if not _of_images(config):
        return
    if header.kind == "latent" and not (evaluation.reference or evaluation.shards):
        raise UserError(
            f"evaluation.protocol={evaluation.protocol} compares images, and the shards in {config.data.root} hold "
            f"latents of {header.encoder}; give evaluation.shards=ROOT of the images that were encoded, or "
            "evaluation.reference=FILE.npz of their statistics, or evaluation=none"
        )
    if header.kind == "image" and config.data.shape[0] not in (1, 3):
        raise UserError(
            f"evaluation.protocol={evaluation.protocol} reads images of 1 or 3 channels, and data.shape is "
            f"{list(config.data.shape)}; set evaluation=none"
        )


def check_counts(config: Config, header: Header, count: Callable[[], int]) -> None:
    """Returns when there are samples and real images enough for a protocol of images: two halves of a score with error.

    Args:
        header: of the data that the model learns.
        count: of them, where it is asked for.

    Raises:
        UserError: there are too few.
    """
    evaluation, latents = config.evaluation, header.kind == "latent"
    if not _of_images(config):
        return
    check_samples(config, latents)
    of_training = latents or bool({*evaluation.metrics} & {*OF_TRAINING})
    compared = not (evaluation.reference or evaluation.shards)
    if not (of_training or compared):
        return
    if (found := count()) >= LEAST_REAL:
        if compared:
            told = f"data.root={config.data.root} holds {found} images"
            check_part(evaluation, found, told)
            check_real(evaluation, found, told)
        return
    cure = "evaluation=none"
    if compared:
        cure = f"evaluation.shards=ROOT of {LEAST_REAL} images or more, evaluation.reference=FILE.npz, or {cure}"
    raise UserError(
        f"evaluation.protocol={evaluation.protocol} compares samples with images and their two halves, of which it "
        f"needs {LEAST_REAL}, and the shards in data.root={config.data.root} hold {found}; give more of them, or {cure}"
    )


def check_samples(config: Config, latents: bool) -> None:
    """The same of the samples of a model of latents: as many of these are decoded, and their images have halves."""
    samples = config.evaluation.samples
    if latents and _of_images(config) and samples < LEAST_REAL:
        raise UserError(
            f"evaluation.samples={samples}, and the shards in {config.data.root} hold latents, of which as many are "
            f"decoded beside, {LEAST_REAL} at least; take evaluation.samples={LEAST_REAL} or more"
        )


def _of_images(config: Config) -> bool:
    features = FEATURES.get(config.evaluation.protocol)
    return features is not None and features.of_images


def check_part(evaluation: EvaluationConfig, count: int, told: str) -> None:
    """Returns when there are as many real images as a protocol says that it compares with.

    Args:
        told: what says that there are `count` of them.

    Raises:
        UserError: there are fewer.
    """
    asked = evaluation.reference_count
    if asked is not None and asked > count:
        raise UserError(
            f"evaluation.reference_count={asked}: {told}; give evaluation.reference_count={count} or less, or leave it "
            "out"
        )


def part_seed(manifest: Manifest) -> int | None:
    """The seed that draws a part of these shards for a reference, where none is given; None takes the first images.

    Written shards are shuffled, so that their first images are a random sample. Those that were indexed are in their
    source's order, often that of its classes.
    """
    return 0 if manifest.plain.get("order") == "source" else None


def check_labels(root: str, manifest: Manifest) -> None:
    """Returns when the shards have labels, and these are of several classes.

    Raises:
        UserError: there are none, or all are the same.
    """
    images = manifest.label_histogram or ()
    if sum(count > 0 for count in images) < 2:
        found = "are all of one class" if images else "have no labels"
        raise UserError(
            f"evaluation.protocol=probe tells labels from features, and the shards in {root} {found}; set "
            "evaluation=none, or write shards with labels of two classes or more"
        )


def check_other_images(root: str, test: Manifest, training: Manifest) -> None:
    """Returns when the shards in `root`, of the manifest `test`, are others than those that a probe trains on.

    Raises:
        UserError: they are the same, so that it would be tested on what it has learned.
    """
    if test.hash == training.hash:
        raise UserError(
            f"evaluation.shards={root} are the shards that the probe is trained on, so it would be tested on images "
            "that it knows; leave evaluation.shards out, which tests on a fifth of them, or give others"
        )


def _check_first_weights(config: Config, header: Header) -> None:
    """Weights go on learning in the units they know: of another encoder or scale every latent means something else."""
    init = config.init
    if (
        init.source == "snapshot" and Path(str(init.path)).exists()
    ):  # gone ones are the run's own record's to judge
        held, _ = read_snapshot(Path(str(init.path)), verify="sizes")
        _same_latents(held["data"]["header"], header, config)
    elif init.source == "official" and header.kind == "latent":
        if header.encoder in _OTHERS:
            raise UserError(
                f"init.path={init.path} holds weights that learned latents of sd_vae, and the shards in "
                f"data.root={config.data.root} hold those of {header.encoder}; encode them anew, or take init=scratch"
            )
        pairs = {"shift": (0.0, header.shift), "scale": (PUBLISHED_SCALE, header.scale)}
        for field, (theirs, ours) in pairs.items():
            if not _close(theirs, ours):
                raise UserError(
                    f"init.path={init.path} holds weights that learned latents with {field}={theirs}, and the shards "
                    f"in data.root={config.data.root} have header {field}={ours}; write them anew with that, or take "
                    "init=scratch"
                )


def _same_latents(plain: Mapping[str, Any], header: Header, config: Config) -> None:
    """Images are put on one scale by their own header, so of them only the kind is compared."""
    from shards.format.header import Header

    theirs = Header.of(plain)
    for field in _LATENTS_OF if "latent" in (theirs.kind, header.kind) else ("kind",):
        was, now = getattr(theirs, field), getattr(header, field)
        same = _close(was, now) if field in ("shift", "scale") else was == now
        if not same:
            raise UserError(
                f"the snapshot in init.path={config.init.path} learned from data with header {field}={was}, and the "
                f"shards in data.root={config.data.root} have {field}={now}; write them anew as those, or take "
                "another snapshot, or init=scratch"
            )


def _close(one: float | Sequence[float], other: float | Sequence[float]) -> bool:
    """Equal, each channel, as far as numbers that went through files are."""
    a, b = ([v] if isinstance(v, int | float) else [*v] for v in (one, other))
    channels = max(len(a), len(b))
    pairs = zip(a * (channels // len(a)), b * (channels // len(b)), strict=False)
    return (
        len(a) in (1, channels)
        and len(b) in (1, channels)
        and all(math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-8) for x, y in pairs)
    )


def _check_cache(config: Config, folder: str, manifests: Sequence[Manifest]) -> None:
    """A cache that cannot hold what is read at once deletes each block before its other samples are due."""
    from shards.format.order import WINDOW
    from shards.read import cache

    data, needed, whole = config.data, 0, True
    for manifest in manifests:
        blocks = -(-manifest.count // manifest.block)
        at_once = blocks if data.mode == "global" else min(WINDOW, blocks)
        needed += at_once * -(-sum(shard.bytes for shard in manifest.shards) // blocks)
        whole = whole and at_once == blocks
    if data.cache_bytes < needed:
        what = "all of it" if whole else f"a window of {WINDOW} blocks"
        cure = ", or data.mode=window" if data.mode == "global" else ""
        raise UserError(
            f"data.cache_bytes={data.cache_bytes} is too small: data.mode={data.mode} reads from {what} at a time, "
            f"{needed} bytes; give data.cache_bytes={needed} or more{cure}"
        )
    if config.cluster.one_machine:
        cache.check(folder)
