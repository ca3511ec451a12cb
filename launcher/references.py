"""What scores are taken with and compared with, resolved where they are asked for: at a submission, or afterwards.

Jobs start in a code copy, so paths must not depend on where that is; and a score's key names shards by the hash of
their manifest and files by their sha256, so these have to be known before the job. A file that is still missing is
known by its name alone, and two such of one name are refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfguide.spec import timm_nets
from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.config.data import fits
from selfguide.spec.config.evaluation import FILES, LEAST_REAL, MANIFESTS, PINS
from selfguide.spec.data_fit import (
    check_counts,
    check_labels,
    check_other_images,
    check_part,
    check_scored,
    part_seed,
)
from selfguide.spec.extras import check_real
from selfguide.spec.metrics import FEATURES
from selfguide.spec.weight_files import locate_reference
from shards import storage
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.format.manifest import Manifest

# roots and shares -> manifests
Load = Callable[["str | tuple[str, ...]", "tuple[float, ...] | None"], "list[Manifest]"]


def absolute(evaluation: EvaluationConfig) -> EvaluationConfig:
    """Its paths; a reference without a folder that is not here is looked for where weights are."""
    names = ("reference", "unconditional", "weights", "decoder")
    files = {name: getattr(evaluation, name) for name in names}
    for name in ("reference", "unconditional"):
        if files[name] and "/" not in files[name] and not Path(files[name]).exists():
            del files[name]
    found: dict[str, Any] = {
        n: str(storage.expanded(path).absolute()) for n, path in files.items() if path
    }
    for name in MANIFESTS:
        if root := getattr(evaluation, name):
            found[name] = absolute_root(root)
    return dataclasses.replace(evaluation, **found)


def absolute_root(root: str) -> str:
    """Of shards, in a folder or on S3."""
    return root if storage.is_remote(root) else str(storage.expanded(root).resolve())


def pinned(
    config: Config,
    evaluation: EvaluationConfig,
    load: Load | None = None,
    names: Collection[str] = tuple(PINS),
) -> EvaluationConfig:
    """`evaluation` with the hashes of what it names, shards, files and weights, once `config` can be scored by it.

    Weights that are not here have none yet.

    Args:
        load: reads the manifests, where it is not to be `load_manifests`.
        names: fields whose shards or files are read.

    Raises:
        UserError: there are no shards, too few images, others than the protocol compares with, or weights that cannot
            be read.
    """
    evaluation = timm_nets.pinned(evaluation)
    hashes: dict[str, Any] = _of_files(evaluation, names)
    for name in (each for each in MANIFESTS if each in names):
        root = getattr(evaluation, name)
        if root is None:
            continue
        try:
            (found,) = (load or load_manifests)(root, None)
        except UserError as error:
            raise UserError(f"evaluation.{name}={root}: {error}") from error
        if evaluation.protocol == "probe":
            check_labels(root, found)
            (trained_on,) = (load or load_manifests)(config.data.root, None)
            check_other_images(root, found, trained_on)
            if not fits(config.data, found.model_shape):
                raise UserError(
                    f"evaluation.{name}={root} are of {list(found.model_shape)} and the model of "
                    f"data.shape={list(config.data.shape)}; give shards that are made as those in {config.data.root}"
                )
        elif found.header["kind"] != "image":
            raise UserError(
                f"evaluation.{name}={root} holds latents: name the shards of the images that were encoded"
            )
        elif found.count < LEAST_REAL:
            raise UserError(
                f"evaluation.{name}={root} holds {found.count} images, and the halves of a reference need {LEAST_REAL} "
                f"or more: give evaluation.{name}=ROOT with more of them"
            )
        if name == "shards" and evaluation.protocol != "probe":
            check_part(
                evaluation, found.count, f"evaluation.shards={root} holds {found.count} images"
            )
            check_real(evaluation, found.count, f"evaluation.shards={root}")
        hashes[MANIFESTS[name]] = found.hash
    if evaluation.reference_count is not None and evaluation.reference_seed is None:
        of = (
            (evaluation.shards, None)
            if evaluation.shards
            else (config.data.roots, config.data.shares)
        )
        hashes["reference_seed"] = part_seed((load or load_manifests)(*of)[0])
    return dataclasses.replace(evaluation, **hashes) if hashes else evaluation


def resolved(
    config: Config,
    header: Mapping[str, Any] | None,
    before: Sequence[EvaluationConfig],
    load: Load,
) -> Config:
    """`config` with its evaluation as a submission would have resolved it, once a snapshot of a run can be scored so.

    Args:
        header: of the data that the snapshot learned; None where it does not say.
        before: evaluations of the run: a reference that these name keeps its hash, so that scores keep their key.
        load: reads manifests, as `load_manifests` does.

    Raises:
        UserError: it cannot.
    """
    typed = absolute(config.evaluation)
    unknown = [name for name, pin in PINS.items() if getattr(typed, pin) is None]
    found = pinned(config, typed, load, unknown)
    config = dataclasses.replace(config, evaluation=as_before(found, typed, before))
    if header:
        from shards.format.header import Header  # needs NumPy, which few commands do

        of = Header.of(header)
        check_scored(config, of)
        check_counts(config, of, lambda: load(config.data.roots, config.data.shares)[0].count)
    return config


def _of_files(evaluation: EvaluationConfig, names: Collection[str]) -> dict[str, Any]:
    """The sha256 of each of these files of statistics that is there and will be read.

    Raises:
        UserError: one is no such file, or of another protocol.
    """
    features = FEATURES.get(evaluation.protocol)
    if features is None or not features.of_images:
        return {}
    found = {}
    for name, pin in FILES.items():
        given = getattr(evaluation, name) if name in names else None
        path = locate_reference(given) if given else None
        if path is None:
            continue
        # needs NumPy, which few commands do
        from selfguide.spec.reference_files import check_file, made_by

        try:
            check_file(name, path, evaluation)
        except UserError as error:
            makes = made_by(name, evaluation.protocol)
            raise UserError(
                f"evaluation.{name}={given}: {error}; {makes} makes one of this protocol"
            ) from error
        found[pin] = _sha256(path, path.stat().st_mtime_ns)
    return found


@functools.cache
def _sha256(path: Path, changed: int) -> str:
    """Of a file at its last change: ADM's have gigabytes, and a sweep names one at each of its points."""
    return storage.sha256(str(path))


def as_before(
    found: EvaluationConfig, typed: EvaluationConfig, before: Iterable[EvaluationConfig]
) -> EvaluationConfig:
    """What was found, less what a run's own config leaves open for the same reference: so its scores keep their key.

    Args:
        typed: the same before anything was filled in.
        before: of the run's newest attempt.
    """
    kept: dict[str, Any] = {}
    for each in before:
        if each.protocol != found.protocol:
            continue
        for name, pin in FILES.items():
            if getattr(each, name) == getattr(found, name) and getattr(each, pin) is None:
                kept[pin] = None
        # of the same images
        same = each.shards == found.shards and each.manifest == found.manifest
        part = ("reference_count", "reference_seed")
        if same and all(getattr(each, name) == getattr(typed, name) for name in part):
            kept["reference_seed"] = typed.reference_seed
    return dataclasses.replace(found, **kept) if kept else found


def check_told_apart(
    asked: Iterable[EvaluationConfig], known: Iterable[EvaluationConfig] = ()
) -> None:
    """Returns where the files of statistics that these name have contents that are known, or names of their own.

    Args:
        known: what the run is scored by already.

    Raises:
        UserError: two have one name, and nothing else tells scores against them apart.
    """
    paths: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for key, path in _open(known):
        paths[key].append(path)
    for key, path in _open(asked):
        if path in paths[key]:
            continue
        if paths[key]:
            raise UserError(
                f"evaluation.{key[1]}={path} is to be compared with as well as {paths[key][0]}, and scores against "
                "files of one name are told apart by their content, which nobody knows yet: put the file there first, "
                "or give it a name of its own"
            )
        paths[key].append(path)


def _open(evaluations: Iterable[EvaluationConfig]) -> Iterator[tuple[tuple[str, str, str], str]]:
    """What stands for each file whose content is open, (protocol, field, name), and its path."""
    for each in evaluations:
        for field, pin in FILES.items():
            path = getattr(each, field)
            if path and getattr(each, pin) is None:
                yield (each.protocol, field, Path(path).name), path


def load_manifests(
    roots: str | tuple[str, ...], shares: tuple[float, ...] | None
) -> list[Manifest]:
    """Reads the manifests of the data at these roots, mixed in these shares.

    Raises:
        UserError: they are not of one kind, or there are none.
    """
    from shards.read import mixing

    return mixing.load_alike(roots, shares)[1]
