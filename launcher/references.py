"""What scores are taken with and compared with, resolved where they are asked for: at a submission, or afterwards.

Jobs start in a code copy, so paths must not depend on where that is; and a score's key names shards by the hash of
their manifest, so that has to be known before the job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfguide.spec import timm_nets
from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.config.data import fits
from selfguide.spec.config.evaluation import MANIFESTS
from selfguide.spec.data_fit import check_labels
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
    names: Collection[str] = tuple(MANIFESTS),
) -> EvaluationConfig:
    """`evaluation` with the hashes of the shards and of the weights that it names, once they are what `config` can be
    scored with. Weights that are not here have none yet.

    Args:
        load: reads the manifests, where it is not to be `load_manifests`.
        names: fields whose shards are read.

    Raises:
        UserError: there are no shards, or others than the protocol compares with, or weights that cannot be read.
    """
    evaluation, hashes = timm_nets.pinned(evaluation), dict[str, Any]()
    for name in names:
        root = getattr(evaluation, name)
        if root is None:
            continue
        try:
            (found,) = (load or load_manifests)(root, None)
        except UserError as error:
            raise UserError(f"evaluation.{name}={root}: {error}") from error
        if evaluation.protocol == "probe":
            check_labels(root, found)
            if not fits(config.data, found.model_shape):
                raise UserError(
                    f"evaluation.{name}={root} are of {list(found.model_shape)} and the model of "
                    f"data.shape={list(config.data.shape)}; give shards that are made as those in {config.data.root}"
                )
        elif found.header["kind"] != "image":
            raise UserError(
                f"evaluation.{name}={root} holds latents: name the shards of the images that were encoded"
            )
        hashes[MANIFESTS[name]] = found.hash
    return dataclasses.replace(evaluation, **hashes) if hashes else evaluation


def load_manifests(
    roots: str | tuple[str, ...], shares: tuple[float, ...] | None
) -> list[Manifest]:
    """Reads the manifests of the data at these roots, mixed in these shares.

    Raises:
        UserError: they are not of one kind, or there are none.
    """
    from shards.read import mixing

    return mixing.load_alike(roots, shares)[1]
