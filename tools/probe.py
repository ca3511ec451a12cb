"""How well each layer of a snapshot predicts labels at each noise-time, by a linear map and by nearest neighbours.

    python -m tools.probe RUN --preset probe_digits --figure probe.png
    python -m tools.probe RUN --root data/labelled --noise-times 0.1 0.2 --layers block_4 block_6

This is `evaluation=probe` by hand, with its settings and its numbers. Labels are those of the run's shards, or of
--root; a fifth of them is kept to choose a layer and a noise-time on, and another one, or --test, to say how well these
tell labels. What is measured is kept in --out: a command that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import configs
from selfguide.evaluation.probe import INPUT, PROBES, Probed, probe
from selfguide.snapshot import Snapshot
from selfguide.spec.config import Config, EvaluationConfig, build
from selfguide.spec.config.laws import check
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import Protocol
from selfguide.spec.validate import check_probe
from shards import cli
from shards.format import manifest as manifests
from tools import drawing, flags
from tools.sample import load_snapshot

PRESETS = ("probe", "probe_digits")
TITLES = {"linear": "linear map", "knn": "20 nearest neighbours"}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    snapshot, folder = load_snapshot(options.run, options.runs, options.images, options.ema)
    config = _config(snapshot, options)
    flags.moved(snapshot.student, options.device)
    manifest = manifests.load(options.root or snapshot.data["root"]).hash
    protocol = Protocol.of(config, {"data": {"manifest": manifest}, "guidance": snapshot.guidance})
    work = Path(options.out) / f"{protocol.key}-{snapshot.sha256[:12]}"
    found = probe(snapshot, config.evaluation, RankStatus(), work, root=options.root)
    assert found is not None
    if options.figure:
        plot(Path(options.figure), found.table)
    if options.json:
        print(json.dumps({"snapshot": str(folder), "scores": found.scores, **found.table}))
    else:
        _print(found)
    return 0


def _config(snapshot: Snapshot, options: argparse.Namespace) -> Config:
    """The snapshot's config with the settings of its probe.

    Raises:
        UserError: a setting that is none, or that the snapshot does not have.
    """
    file = Path(configs.__file__).parent / "evaluation" / f"{options.preset}.yaml"
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    asked = {
        "layers": options.layers,
        "noise_times": options.noise_times,
        "pooling": options.pooling,
        "passes": options.passes,
        "learning_rate": options.learning_rate,
        "batch": options.batch,
        "samples": options.samples,
        "seed": options.seed,
        "shards": options.test,
    }
    values |= {name: value for name, value in asked.items() if value is not None}
    if options.test:
        values["manifest"] = manifests.load(options.test).hash
    evaluation = build(EvaluationConfig, values, "evaluation")
    check(evaluation, "evaluation")
    config = replace(snapshot.config, evaluation=evaluation)
    check_probe(config)
    return config


def _grid(table: Mapping[str, Any], name: str) -> tuple[list[str], list[float], np.ndarray]:
    """Layers, noise-times, and a number of each cell (layers, noise-times)."""
    cells = table["cells"]
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    times = sorted({cell["noise_time"] for cell in cells})
    grid = np.full((len(layers), len(times)), np.nan)
    for cell in cells:
        grid[layers.index(cell["layer"]), times.index(cell["noise_time"])] = cell[name]
    return layers, times, grid


def _print(found: Probed) -> None:
    """Prints a table of each kind of probe; the chosen cell has a star."""
    images = found.table["images"]
    for kind in PROBES:
        layers, times, grid = _grid(found.table, f"{kind}_accuracy")
        best = found.table[f"{kind}_best"]
        rows = []
        for layer, of_layer in zip(layers, grid, strict=True):
            row = {"layer": layer}
            for time, value in zip(times, of_layer, strict=True):
                star = "*" if best == {"layer": layer, "noise_time": time} else ""
                row[f"{time:g}"] = f"{star}{100 * value:.1f}"
            rows.append(row)
        score, error = (found.scores[f"{kind}_accuracy{end}"] for end in ("", "_se"))
        baseline = found.scores[f"{kind}_accuracy_{INPUT}"]
        title = (
            f"{TITLES[kind]}: {100 * score:.1f} ± {100 * error:.1f} % of {images['test']:,} test labels at "
            f"{best['layer']}, noise-time {best['noise_time']:g} (chosen on {images['validation']:,} others, *); "
            f"of the input itself {100 * baseline:.1f} %"
        )
        cli.console().print(drawing.table(title, rows))


def plot(file: Path, table: Mapping[str, Any]) -> None:
    """A heat map for each kind of probe: layers upwards, noise-time to the right, the chosen cell framed."""
    from matplotlib.patches import Rectangle

    layers, times, _ = _grid(table, "linear_accuracy")
    low = min(cell[f"{kind}_accuracy"] for cell in table["cells"] for kind in PROBES)
    size = (2.6 + 2 * max(2.4, 0.75 * len(times)), 1.6 + 0.4 * max(3, len(layers)))
    with drawing.figure(file, 1, len(PROBES), size=size, sharey=True) as (figure, axes):
        for axis, kind in zip(axes[0], PROBES, strict=True):
            _, _, grid = _grid(table, f"{kind}_accuracy")
            image = axis.imshow(
                100 * grid,
                vmin=100 * low,
                vmax=100,
                cmap="viridis",
                aspect="auto",
                origin="lower",
            )
            for (row, column), value in np.ndenumerate(100 * grid):
                shade = "white" if value < (100 * low + 200) / 3 else "black"
                axis.text(
                    column, row, f"{value:.1f}", color=shade, ha="center", va="center", fontsize=8
                )
            best = table[f"{kind}_best"]
            at = times.index(best["noise_time"]), layers.index(best["layer"])
            corner = (at[0] - 0.5, at[1] - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", lw=2))
            axis.set_xticks(range(len(times)), [f"{t:g}" for t in times])
            axis.set_yticks(range(len(layers)), layers)
            axis.set_xlabel("noise-time")
            baseline = 100 * table[INPUT][f"{kind}_accuracy"]
            axis.set_title(f"{TITLES[kind]}\ninput itself {baseline:.1f} %", fontsize=10)
        figure.suptitle(
            "labels predicted, % of the test part; framed: chosen on other images", fontsize=11
        )
        figure.colorbar(image, ax=axes[0])


def _parser() -> argparse.ArgumentParser:
    return flags.command(
        "tools.probe",
        __doc__,
        ("run RUN", str, None, flags.RUN),
        flags.RUNS,
        ("--images N", int, None, "the run's snapshot at so many images (the newest)"),
        ("--ema I", int, 0, "which average (0)"),
        (
            "--preset",
            PRESETS,
            "probe",
            "settings of configs/evaluation, of which flags change some (probe)",
        ),
        ("--root SHARDS", str, None, "labelled shards, made as the run's own (its own)"),
        ("--test SHARDS", str, None, "labelled shards to test on (a fifth of the others)"),
        ("--layers NAME+", str, None, "by name, or by number from 1 (all)"),
        ("--noise-times TAU+", float, None, "0 to 1"),
        ("--pooling", ("mean", "cls"), None, "of a layer's tokens"),
        ("--passes N", int, None, "over the training part"),
        ("--learning-rate LR", float, None, "the first one; it falls to 0 by a cosine"),
        ("--batch N", int, None, "images of a step"),
        ("--samples N", int, None, "the most images to choose on, and to test on"),
        ("--seed N", int, None, "of parts, order and noise"),
        ("--device", str, "cpu", "cpu, or cuda (cpu)"),
        ("--out DIR", str, ".probes", "where what is measured is kept (.probes)"),
        ("--figure PNG", str, None, "where to draw the heat maps"),
        flags.JSON,
    )


if __name__ == "__main__":
    cli.run(main)
