"""Groups by k-means over features, one id a sample: the first and plainest of offline self-guidance.

The sidecar holds the ids, each sample's squared distance from its centroid (column `distance`) and the centroids
(`centroids.npy`, attached). Its record says how the groups are: inertia, share in use, the largest, and where the
shards have labels how the groups agree with them; labels are compared, never used.

One process fits with faiss, on GPUs where it has them. --processes N fits with Lloyd's iteration over N ranks of this
machine that read features from disk piece by piece.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfguide.discovery.agreement import with_classes
from selfguide.discovery.extraction import checked
from selfguide.discovery.kmeans import Groups, beginning, check, kmeans, lloyd, prepared, report
from selfguide.discovery.spent import cost
from selfguide.distributed import RankInfo
from shards import sidecar
from shards.cli import track
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.read.reader import Reader
from tools import flags
from tools.annotate.features import add_source, features_of
from tools.ranks import run_ranks

CENTROIDS = "centroids.npy"
COLUMNS = {"rows.npy", "distance.npy", CENTROIDS}


def add(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    flags.add(parser, ("--groups K", int, flags.REQUIRED, "how many"), flags.OUT)
    flags.add(
        parser.add_argument_group("the fit"),
        ("--seed N", int, 0, "of where fits begin (0)"),
        ("--iterations N", int, 30, "of a fit, at most (30)"),
        ("--restarts N", int, 3, "the tightest is kept (3)"),
        ("--spherical", bool, False, "centroids of unit length"),
        ("--raw", bool, False, "features as they are; default each of unit length"),
        (
            "--assign-raw",
            bool,
            False,
            "fit unit features and assign them as they are, as SGDM's code",
        ),
        (
            "--per-group N",
            int,
            None,
            "samples a group that are fitted; faiss's own, as SGDM's code: 256 (all)",
        ),
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    manifest, target = manifests.load(options.root), Path(options.out)
    fit, published = settings(options), as_published(options)
    check(manifest.count, options.groups, **fit)
    sidecar.refuse_taken(target, COLUMNS)
    features = features_of(options)
    rows, started = checked(features.rows()), time.monotonic()
    if options.processes == 1:
        found = kmeans(rows, options.groups, seed=options.seed, **fit, **published)
    else:
        shares = run_ranks(options.processes, _share, str(features.folder), options, timeout=None)
        found = replace(
            shares[0],
            ids=np.concatenate([s.ids for s in shares]),
            distance=np.concatenate([s.distance for s in shares]),
        )
    seconds = (time.monotonic() - started) * options.processes
    spent = cost(seconds, options.processes, options.device or RankInfo(0, 0, 1).device)
    labels = labels_of(options.root, manifest)
    said = report(found, labels)
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / CENTROIDS, found.centroids)
    made = sidecar.write(
        target,
        found.ids,
        manifest=manifest.hash,
        kind="id",
        groups=options.groups,
        provenance={
            "method": "kmeans",
            "engine": "faiss" if options.processes == 1 else "lloyd",
            "groups": options.groups,
            "seed": options.seed,
            **fit,
            **published,
            "report": said,
            "features": {**features.provenance, "rows_sha256": features.sha256},
            "saw_labels": features.saw_labels,
        },
        attached=(CENTROIDS,),
        cost=spent,
        distance=found.distance,
    )
    facts = {"out": str(made.folder), "count": made.count, "groups": made.groups, **said}
    if labels is not None:
        facts |= with_classes(labels, found.ids)
    lines = [f"{name} {value:.4g}" for name, value in said.items()]
    return (
        facts,
        f"{made.count:,} samples in {made.groups} groups\n{', '.join(lines)}\n{made.folder}",
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """How a fit is made, by the names of `kmeans`."""
    return {
        "iterations": options.iterations,
        "restarts": options.restarts,
        "spherical": options.spherical,
        "normalise": not options.raw,
    }


def as_published(options: argparse.Namespace) -> dict[str, Any]:
    """What of SGDM's code was asked for; earlier records say nothing of it.

    Raises:
        UserError: it was asked for with flags that it does not go with.
    """
    flags.check_least(options, 1, "per_group")
    flags.check_least(options, 0, "seed")
    if options.assign_raw and options.raw:
        raise UserError(
            "--assign-raw says nothing to --raw, which fits them as they are, too; leave it out"
        )
    if options.processes > 1 and (options.assign_raw or options.per_group):
        raise UserError("--assign-raw and --per-group are of one process; leave out --processes")
    raw: dict[str, Any] = {"assigned": "raw"} if options.assign_raw else {}
    return raw if options.per_group is None else raw | {"per_group": options.per_group}


def labels_of(root: str, manifest: manifests.Manifest) -> NDArray[np.int64] | None:
    """(N,) labels by ordinal, None where the shards have none."""
    if not manifest.classes:
        return None
    starts = range(0, manifest.count, 4096)
    with closing(Reader(root, manifest)) as reader:
        found = [
            reader.gather(np.arange(s, min(s + starts.step, manifest.count)), fields=("y",))["y"]
            for s in track(starts, len(starts), "reading labels")
        ]
    return np.concatenate(found).astype(np.int64)


def _share(rank_info: RankInfo, folder: str, options: argparse.Namespace) -> Groups:
    """This rank's rows, in the order of ordinals, under the tightest of the fits that all ranks make together."""
    rows = sidecar.read(folder).rows()
    edges = np.linspace(0, len(rows), rank_info.world + 1, dtype=np.int64)
    mine = rows[edges[rank_info.rank] : edges[rank_info.rank + 1]]
    fit = settings(options)
    restarts = range(fit.pop("restarts"))

    def one(restart: int) -> Groups:
        chosen = beginning(len(rows), options.groups, options.seed, restart)
        initial = prepared(rows[chosen], fit["normalise"])
        return lloyd(mine, initial, **fit, device=options.device or rank_info.device)

    shown = track(restarts, len(restarts), f"{len(restarts)} times k-means")
    fits = map(one, shown if rank_info.rank == 0 else restarts)
    return min(fits, key=lambda found: found.inertia)
