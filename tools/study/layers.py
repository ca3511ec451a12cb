"""Where in a diffusion model the groups are: NMI of k-means with labels, over layer, noise-time and pooling.

    python -m tools.study layers data/digits RUN RUN RUN --figure docs/kmeans-layers.png
    python -m tools.study layers data/digits RUN --poolings flat --noise-times 0.1 0.2 --json
    python -m tools.study layers data/digits RUN --poolings mean --over-images --figure over-training.png

The figure is that of Hu et al. 2023 (arXiv 2312.08825, section 3.1); give it one experiment's snapshots of several
seeds: a cell is the median over them. --over-images measures every snapshot that all of these runs have. Labels are
compared with, never used. Cells that are done are kept in --out, so a study that was ended goes on where it was, and
another snapshot adds to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfguide.discovery.features import FeatureNet, InputFeatures, SnapshotFeatures
from selfguide.discovery.kmeans import check, kmeans, report
from selfguide.discovery.resumable import record
from selfguide.snapshot import Snapshot
from selfguide.spec.config import POOLINGS
from selfguide.spec.find import find
from shards import cli, read_all
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest, digest
from tools import drawing, flags
from tools.sample_run import load_snapshot

NOISE_TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
SCORES = ("nmi", "ari", "ami")
Cell = tuple[str, float, str]  # layer, noise-time, pooling
Scores = dict[Cell, list[dict[str, float]]]


@dataclass(frozen=True)
class Data:
    """A small labelled set of shards, in memory."""

    manifest: Manifest
    stored: torch.Tensor
    labels: NDArray[np.int64]

    @staticmethod
    def load(root: str) -> Data:
        manifest = manifests.load(root)
        if not manifest.classes:
            raise UserError(f"{root} has no labels to compare groups with; give shards that have")
        held = read_all(root)
        return Data(manifest, torch.from_numpy(held["x"]), held["y"].astype(np.int64))

    def features(self, net: FeatureNet, batch: int = 256) -> NDArray[np.float32]:
        """(N, F) by ordinal."""
        ordinals = torch.arange(len(self.stored)).split(batch)
        return torch.cat([net(self.stored[part], part) for part in ordinals]).numpy()


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("root SHARDS", str, None, "a small labelled set of shards"),
        ("names RUN+", str, None, "runs of one experiment, or snapshots"),
        flags.RUNS,
        ("--ema I", int, 0, "which average (0)"),
        (
            "--noise-times TAU+",
            float,
            NOISE_TIMES,
            f"0 is data, 1 is noise ({' '.join(map(str, NOISE_TIMES))})",
        ),
        (
            "--poolings +",
            POOLINGS,
            ["mean", "flat", "attention"],
            "tokens to one vector (mean flat attention)",
        ),
        ("--groups K", int, None, "of k-means (as many as there are classes)"),
        ("--seed", int, 0, "of k-means (0)"),
        ("--restarts", int, 10, "of k-means; the tightest is kept (10)"),
        ("--over-images", bool, False, "every snapshot of the runs, not the newest"),
        ("--spherical", bool, False, "centroids of unit length"),
        ("--raw", bool, False, "features as they are, not of unit length"),
        ("--out DIR", flags.here, "study", "where scores are kept (study)"),
        ("--figure FILE", str, None, "where to draw the heat maps (none)"),
        flags.JSON,
    )


def run(options: argparse.Namespace) -> int:
    flags.check_least(options, 0, "seed")
    data = Data.load(options.root)
    groups = options.groups or data.manifest.classes
    fit = {"seed": options.seed, "restarts": options.restarts, "spherical": options.spherical}
    check(len(data.labels), groups, 1, options.restarts, options.spherical, not options.raw)
    fit |= {"normalise": not options.raw}
    counts = _counts(options.names, options.runs) if options.over_images else [None]
    snapshots = _loaded(options, counts[-1])
    layers = [layer.name for layer in snapshots[0].student.backbone.net.layers]
    cells = [(name, t, p) for p in options.poolings for name in layers for t in options.noise_times]
    for snapshot in snapshots:  # everything is checked before anything is measured
        for layer, noise_time, pooling in cells:
            _net(snapshot, data, layer, noise_time, pooling)
    measured = Measured(Path(options.out), data, groups, fit)
    inputs = InputFeatures(data.manifest.header)
    plain = {inputs.name: measured.scores(inputs)}
    by_images = {}
    for images in counts:
        these = snapshots if images == counts[-1] else _loaded(options, images)
        by_images[images] = _scores(measured, data, cells, these, images)
    if options.figure:
        plot(Path(options.figure), _panels(by_images), plain, groups)
    said = {images: summary(scores, plain) for images, scores in by_images.items()}
    if options.json:
        each = [{"images": images, **found} for images, found in said.items()]
        print(json.dumps({"over_images": each} if options.over_images else said[None]))
        return 0
    of = f"medians over {len(snapshots)} snapshots; {inputs.name} {plain[inputs.name]['nmi']:.3f}"
    rows = [
        ({"images": f"{images:,}"} if images else {}) | row(best)
        for images, found in said.items()
        for best in found["best_of_pooling"].values()
    ]
    cli.console().print(drawing.table(f"NMI of k-means with the labels, {of}", rows))
    return 0


def _counts(names: Sequence[str], runs: str) -> list[int | None]:
    """Images of the snapshots that all of these runs have.

    Raises:
        UserError: there is none.
    """
    published = [set(find(name, Path(runs)).published()) for name in names]
    common = sorted(set.intersection(*published))
    if not common:
        raise UserError(
            f"--over-images: {', '.join(names)} have no snapshot at the same number of images; give runs that have"
        )
    return [*common]


def _loaded(options: argparse.Namespace, images: int | None) -> list[Snapshot]:
    return [load_snapshot(name, options.runs, images, options.ema)[0] for name in options.names]


def _scores(
    measured: Measured,
    data: Data,
    cells: Sequence[Cell],
    snapshots: Sequence[Snapshot],
    images: int | None,
) -> Scores:
    """Of every cell those of each snapshot."""
    scores: Scores = {cell: [] for cell in cells}
    jobs = [(cell, snapshot) for snapshot in snapshots for cell in cells]
    at = "" if images is None else f", {images:,} images"
    for cell, snapshot in cli.track(jobs, len(jobs), f"groups of every layer and noise-time{at}"):
        scores[cell].append(measured.scores(_net(snapshot, data, *cell)))
    return scores


def _panels(by_images: Mapping[int | None, Scores]) -> Scores:
    """All cells by what their panel is called: the pooling, and how many images the snapshots saw."""
    return {
        (layer, time, pooling if images is None else f"{pooling}, {images:,} images"): found
        for images, scores in by_images.items()
        for (layer, time, pooling), found in scores.items()
    }


@dataclass(frozen=True)
class Measured:
    """Scores of k-means in a net's features, each kept in a file named by all that decides it."""

    folder: Path
    data: Data
    groups: int
    fit: dict[str, Any]  # settings of `kmeans`

    def scores(self, net: FeatureNet) -> dict[str, float]:
        shards = {"shards": self.data.manifest.hash, "groups": self.groups}
        what = {**shards, **self.fit, **net.provenance}

        def measure() -> dict[str, Any]:
            found = kmeans(self.data.features(net), self.groups, **self.fit)
            return {"what": what, "scores": report(found, self.data.labels)}

        key = digest(what)
        if key in self.before:
            return self.before[key]
        return record(self.folder / f"{key}.json", measure)["scores"]

    @cached_property
    def before(self) -> dict[str, dict[str, float]]:
        """Scores by key that earlier versions kept in one file, of which a kill may have torn the last line."""
        file = self.folder / "cells.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row["key"]: row["scores"] for row in rows}


def summary(scores: Scores, plain: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """Medians over snapshots of every cell, the best by NMI, the best of each pooling, and the model's plain input."""
    rows: list[dict[str, Any]] = [
        {"layer": layer, "noise_time": noise_time, "pooling": pooling}
        | {name: statistics.median(s[name] for s in found) for name in SCORES}
        | {"each_nmi": [s["nmi"] for s in found]}
        for (layer, noise_time, pooling), found in scores.items()
    ]
    ranked = sorted(rows, key=lambda row: -float(row["nmi"]))
    poolings = dict.fromkeys(pooling for _, _, pooling in scores)
    best = {p: next(row for row in ranked if row["pooling"] == p) for p in poolings}
    return {"best": ranked[0], "best_of_pooling": best, **plain, "cells": rows}


def row(best: dict[str, Any]) -> dict[str, str]:
    """A pooling's row of the table: its best cell."""
    return {
        "pooling": best["pooling"],
        "NMI": f"{best['nmi']:.3f}",
        "each snapshot": ", ".join(f"{score:.3f}" for score in best["each_nmi"]),
        "layer": best["layer"],
        "noise-time": f"{best['noise_time']:g}",
    }


def plot(file: Path, scores: Scores, plain: Mapping[str, dict[str, float]], groups: int) -> None:
    """One heat map for each pooling: layers upwards, noise-time to the right, the best cell framed."""
    from matplotlib.patches import Rectangle

    layers, times, poolings = (list(dict.fromkeys(part)) for part in zip(*scores, strict=True))
    size = (1.6 + 3.9 * len(poolings), 1.4 + 0.5 * len(layers))
    with drawing.figure(file, 1, len(poolings), size=size, sharey=True) as (figure, axes):
        for axis, pooling in zip(axes[0], poolings, strict=True):
            medians = [
                [statistics.median(s["nmi"] for s in scores[name, t, pooling]) for t in times]
                for name in layers
            ]
            grid = np.array(medians)
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
            style = {"ha": "center", "va": "center", "fontsize": 8}
            for (row, column), value in np.ndenumerate(grid):
                shade = "white" if value < 0.6 else "black"
                axis.text(column, row, f"{value:.2f}", color=shade, **style)
            row, column = np.unravel_index(grid.argmax(), grid.shape)
            frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", lw=2)
            axis.add_patch(frame)
            axis.set_xticks(range(len(times)), [f"{t:g}" for t in times])
            axis.set_yticks(range(len(layers)), layers)
            axis.set_xlabel("noise-time")
            axis.set_title(f"{pooling}: {grid.max():.2f}", fontsize=10)
        beside = ", ".join(f"{name} {of['nmi']:.2f}" for name, of in plain.items())
        title = f"NMI of k-means (K={groups}) with the labels; {beside}"
        figure.suptitle(title, fontsize=11)
        figure.colorbar(image, ax=axes[0])


def _net(
    snapshot: Snapshot, data: Data, layer: str, noise_time: float, pooling: str
) -> SnapshotFeatures:
    return SnapshotFeatures(
        snapshot, data.manifest.header, layer=layer, noise_time=noise_time, pooling=pooling
    )
