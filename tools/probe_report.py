"""What probes found, as tables and pictures: layers by noise-times of one, layers and images of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfguide.evaluation.probe import INPUT, PROBES, Probed
from selfguide.spec.config import Config
from shards import cli
from tools import drawing

TITLES = {"linear": "linear map", "knn": "20 nearest neighbours"}


@dataclass(frozen=True)
class Measured:
    """One probe of several: of a snapshot, one of its averages, and one way to make a vector of a layer."""

    snapshot: Path
    images: int
    average: str
    pooling: str
    found: Probed
    # with the settings of the probe
    config: Config

    @property
    def name(self) -> str:
        """What it is of, less the images."""
        return f"average {self.average}, {self.pooling}"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; `probe` is the table, as in a record."""
        of = {"images": self.images, "average": self.average, "pooling": self.pooling}
        found = {"scores": self.found.scores, "probe": self.found.table}
        return {"snapshot": str(self.snapshot)} | of | found


def _grid(table: Mapping[str, Any], name: str) -> tuple[list[str], list[float], np.ndarray]:
    """Layers, noise-times, and a number of each cell (layers, noise-times)."""
    cells = table["cells"]
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    times = sorted({cell["noise_time"] for cell in cells})
    grid = np.full((len(layers), len(times)), np.nan)
    for cell in cells:
        grid[layers.index(cell["layer"]), times.index(cell["noise_time"])] = cell[name]
    return layers, times, grid


def show(found: Probed) -> None:
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


def show_all(probes: Sequence[Measured]) -> None:
    """Prints a line of each probe: the layer and noise-time that it chose, and how well these tell labels."""
    baselines = probes[-1].found.scores
    for kind in PROBES:
        rows = []
        for each in probes:
            best, scores = each.found.table[f"{kind}_best"], each.found.scores
            score, error = (100 * scores[f"{kind}_accuracy{end}"] for end in ("", "_se"))
            rows.append({
                "images": f"{each.images:,}",
                "average": each.average,
                "of tokens": each.pooling,
                "layer": best["layer"],
                "noise-time": f"{best['noise_time']:g}",
                "%": f"{score:.1f} ± {error:.1f}",
            })  # fmt: skip
        title = (
            f"{TITLES[kind]}: test labels from the layer and noise-time that others chose; of the input itself "
            f"{100 * baselines[f'{kind}_accuracy_{INPUT}']:.1f} %"
        )
        cli.console().print(drawing.table(title, rows, names=4))


def plot_all(file: Path, probes: Sequence[Measured]) -> None:
    """The linear map's accuracy over layers, a curve for each probe at the noise-time that it chose, beside that of its
    best layer over images (Xiang et al. 2025, DDAE++, figures 4 and 5).
    """
    counts = sorted({each.images for each in probes})
    columns = 1 if len(counts) == 1 else 2
    with drawing.figure(file, 1, columns, size=(7.0 * columns, 4.2), sharey=True) as (_, axes):
        over_layers = axes[0][0]
        for each in probes:
            layers, times, grid = _grid(each.found.table, "linear_accuracy")
            best = each.found.table["linear_best"]
            at = times.index(best["noise_time"])
            label = f"{each.images:,} images, {each.name}, noise-time {times[at]:g}"
            over_layers.plot(range(len(layers)), 100 * grid[:, at], marker="o", label=label)
            over_layers.set_xticks(range(len(layers)), layers, rotation=60, fontsize=8)
        baseline = 100 * probes[-1].found.table[INPUT]["linear_accuracy"]
        over_layers.axhline(baseline, color="grey", ls=":", label="the input itself")
        over_layers.set_ylabel("labels predicted by a linear map, % of the test part")
        if columns == 2:
            over_images = axes[0][1]
            for name in dict.fromkeys(each.name for each in probes):
                ours = [each for each in probes if each.name == name]
                scores = [100 * each.found.scores["linear_accuracy"] for each in ours]
                errors = [100 * each.found.scores["linear_accuracy_se"] for each in ours]
                seen = [each.images for each in ours]
                over_images.errorbar(seen, scores, yerr=errors, marker="o", capsize=2, label=name)
            over_images.axhline(baseline, color="grey", ls=":", label="the input itself")
            over_images.set_xlabel("images seen")
        for axis in axes[0]:
            drawing.open_frame(axis)
            axis.legend(fontsize=7, frameon=False)
