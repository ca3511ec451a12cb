"""Take over an annotation of images for the latents that `tools.shards encode` made of them.

Latents keep the order of their images, so row i of what was found in images is row i of their latents: groups, boxes
and masks of a data set of images guide a model of its latents, and nothing is looked at twice.

example:
  python -m tools.annotate kmeans data/in1k-256 --vit NAME --groups 1000 --out notes/groups
  python -m tools.annotate adopt data/in1k-sd --annotation notes/groups --out notes/groups-of-latents
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from tools import flags

HELP = "what was found in images, for the latents encoded from them"


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("--annotation DIR", str, flags.REQUIRED, "the sidecar of the images"),
        ("--out DIR", str, flags.REQUIRED, "the sidecar of the latents"),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    manifest, found = manifests.load(options.root), sidecar.read(options.annotation)
    images, target = manifest.source.get("images"), Path(options.out)
    if manifest.plain.get("order") != "source" or not images:
        raise UserError(
            f"{options.root} does not say which images it was encoded from: only what `tools.shards encode` wrote does"
        )
    if found.manifest != images["manifest"]:
        raise UserError(
            f"{found.folder} annotates shards {found.manifest[:12]}, and {options.root} was encoded from "
            f"{images['manifest'][:12]}: give an annotation of those images"
        )
    sidecar.refuse_taken(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in found.attached:
        shutil.copyfile(found.file(name), target / name)
    made = sidecar.write(
        target,
        found.rows(),
        manifest=manifest.hash,
        kind=found.kind,
        groups=found.groups,
        provenance={**found.provenance, "adopted_from": found.manifest},
        attached=found.attached,
        cost=found.cost,
        **{name: found.column(name) for name in found.more},
    )
    facts = {"out": str(made.folder), "kind": made.kind, "count": made.count, "sha256": made.sha256}
    return facts, f"{made.count:,} rows of kind {made.kind} for {options.root}\n{made.folder}"
