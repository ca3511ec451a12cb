"""Take over an annotation of images for the latents that `tools.shards encode` made of them.

Latents keep the order of their images, so row i of what was found in images is row i of their latents: groups, boxes
and masks of a data set of images guide a model of its latents, and nothing is looked at twice. With --by-key SHARDS,
those that were annotated, rows are matched by equal keys: the same pictures at another resolution, or a part of them.
Boxes and masks are in pixels, so they are not taken over so.

example:
  python -m tools.annotate kmeans data/in1k-256 --vit NAME --groups 1000 --out notes/groups
  python -m tools.annotate adopt data/in1k-sd --annotation notes/groups --out notes/groups-of-latents
  python -m tools.annotate adopt data/in1k-64 --annotation notes/groups --by-key data/in1k-256 --out notes/groups-64
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read.reader import Reader
from tools import flags


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("--annotation DIR", str, flags.REQUIRED, "the sidecar of the images"),
        ("--by-key SHARDS", str, None, "the annotated shards: rows of equal keys are matched"),
        ("--out DIR", flags.here, flags.REQUIRED, "the sidecar of the latents"),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    manifest, found = manifests.load(options.root), sidecar.read(options.annotation)
    target = Path(options.out)
    if options.by_key is not None:
        chosen = _by_key(options.root, manifest, options.by_key, found)
    else:
        _check_encoded(options.root, manifest, found)
        chosen = None
    sidecar.refuse_taken(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in found.attached:
        shutil.copyfile(found.file(name), target / name)
    columns = {name: found.column(name) for name in found.more}
    made = sidecar.write(
        target,
        _taken(found.rows(), chosen),
        manifest=manifest.hash,
        kind=found.kind,
        groups=found.groups,
        provenance={**found.provenance, "adopted_from": found.manifest},
        attached=found.attached,
        cost=found.cost,
        **{name: _taken(column, chosen) for name, column in columns.items()},
    )
    facts = {"out": str(made.folder), "kind": made.kind, "count": made.count, "sha256": made.sha256}
    return facts, f"{made.count:,} rows of kind {made.kind} for {options.root}\n{made.folder}"


def _taken(rows: Any, chosen: NDArray[np.int64] | None) -> Any:
    return rows if chosen is None else rows[chosen]


def _by_key(
    root: str, manifest: Manifest, annotated: str, found: sidecar.Sidecar
) -> NDArray[np.int64]:
    """(N,) the annotated row of each sample: that of the same key.

    Raises:
        UserError: other shards than those annotated, rows in pixels, or keys that are missing or not unique.
    """
    theirs = manifests.load(annotated)
    if found.manifest != theirs.hash:
        raise UserError(
            f"--by-key {annotated}: {found.folder} annotates shards {found.manifest[:12]}, and these are "
            f"{theirs.hash[:12]}: give those that were annotated"
        )
    if found.kind in ("box", "mask"):
        raise UserError(
            f"--by-key: {found.folder} holds rows of kind {found.kind}, in pixels of {annotated}; annotate "
            f"{root} itself"
        )
    known = {key: row for row, key in enumerate(_keys(annotated, theirs))}
    keys = _keys(root, manifest)
    missing = [key for key in keys if key not in known]
    if len(known) < theirs.count or missing:
        why = (
            f"{len(missing):,} samples of {root} have keys that are not there, such as {missing[0]!r}"
            if missing
            else "two samples there have one key"
        )
        raise UserError(f"--by-key {annotated}: {why}; give shards of the same pictures")
    return np.array([known[key] for key in keys], dtype=np.int64)


def _keys(root: str, manifest: Manifest) -> list[str]:
    """The key of each sample, by ordinal."""
    reader = Reader(root, manifest)
    try:
        found: list[str] = reader.gather(np.arange(manifest.count), fields=("key",))["key"].tolist()
    finally:
        reader.close()
    return found


def _check_encoded(root: str, manifest: Manifest, found: sidecar.Sidecar) -> None:
    """
    Raises:
        UserError: the annotation is not of the images that these latents were encoded from.
    """
    images = manifest.source.get("images")
    if manifest.plain.get("order") != "source" or not images:
        raise UserError(
            f"{root} does not say which images it was encoded from: only what `tools.shards encode` wrote does; match "
            "pictures of another size with --by-key SHARDS"
        )
    if found.manifest != images["manifest"]:
        raise UserError(
            f"{found.folder} annotates shards {found.manifest[:12]}, and {root} was encoded from "
            f"{images['manifest'][:12]}: give an annotation of those images"
        )
