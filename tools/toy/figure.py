"""The picture: a column a path, from how noise travels to how near samples come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools import drawing
from tools.toy.learn import off
from tools.toy.measure import SHOWN, SOLVERS, Measured, Reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "rectified_flow": "rectified flow",
    "ddpm": "DDPM",
    "vp": "VP",
    "ve": "VE",
    "edm": "EDM",
    "sgfm": "SGFM",
}
FORMS = {  # of the path, whatever the preset
    "rectified_flow": r"$x = (1 - \tau)\, x_0 + \tau\, \epsilon$",
    "ddpm": r"$x = a\, x_0 + b\, \epsilon,\; a^2 + b^2 = 1$",
    "vp": r"$x = a\, x_0 + b\, \epsilon,\; a^2 + b^2 = 1$",
    "ve": r"$x = x_0 + \sigma\, \epsilon,\; \sigma \leq 100$",
    "edm": r"$x = x_0 + \sigma\, \epsilon,\; \sigma \leq 80$",
}
LOOKS = {  # of a solver's curve: name, style, colour
    "euler": ("Euler", "o-", "#8a919c"),
    "ddim": ("DDIM", "o--", "#59a14f"),
    "heun": ("Heun", "o-", "#4c78a8"),
    "dpmpp": ("DPM-Solver++(2M)", "o-", "#e1812c"),
    "dopri5": ("dopri5 (adaptive)", "D", "#222222"),
}
EVEN = "#e4e7eb"
INK, FAINT, LANDED, STRAY = "#222222", "#c9ced6", "#2f5d8c", "#d1495b"
FRAME, WIDE = 1.2, 2.2  # half the edge of what is seen, of samples and of trajectories


def plot(measured: dict[str, Measured], reference: Reference, floor: float, path: Path) -> None:
    """Writes the PNG."""
    columns, rows = len(measured), 2 + len(SHOWN)
    size = (1.2 + 2.15 * columns, 2.15 * rows + 0.9)
    with drawing.figure(path, rows, columns, size=size, dpi=100) as (figure, axes):
        for column, (name, found) in enumerate(measured.items()):
            _trajectories(axes[0, column], found)
            title = f"{NAMES.get(name, name)}\n{FORMS[found.path]}"
            axes[0, column].set_title(title, fontsize=11, color=INK, linespacing=1.5)
            for row, evaluations in enumerate(SHOWN, start=1):
                _samples(axes[row, column], reference, found, evaluations)
            _curves(axes[-1, column], found, floor)
        highest = max(s.distance for found in measured.values() for s in found.scores)
        for column, below in enumerate(axes[-1]):
            below.set(ylim=(floor / 1.6, highest * 1.4))
            if column:
                below.set_yticklabels([])
        labels = ["trajectories,\nnoise grey, data blue"]
        labels += [f"Euler,\n{evaluations} evaluations" for evaluations in SHOWN]
        for axis, label in zip(axes[:, 0], [*labels, "distance to the data, D"], strict=True):
            axis.set_ylabel(label, fontsize=10, color=INK)
        handles, names = axes[-1, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.suptitle(
            f"From noise to the {reference.data}: how paths differ, and what network evaluations buy",
            fontsize=14,
        )


def _trajectories(axis: Axes, found: Measured) -> None:
    """Lines that darken towards the data."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    lines = found.trajectories.numpy()  # (T + 1, B, 2)
    pieces = np.stack((lines[:-1], lines[1:]), axis=2).reshape(-1, 2, 2)
    data_time = 1 - found.noise_times.numpy()
    progress = np.repeat(data_time[1:], lines.shape[1])
    shades = LinearSegmentedColormap.from_list("noise to data", [FAINT, LANDED])
    axis.add_collection(LineCollection(list(pieces), array=progress, cmap=shades, linewidths=0.9))
    axis.scatter(lines[0][:, 0], lines[0][:, 1], s=5, color=FAINT, linewidths=0)
    axis.scatter(lines[-1][:, 0], lines[-1][:, 1], s=6, color=LANDED, linewidths=0, zorder=3)
    _bare(axis, WIDE)


def _samples(axis: Axes, reference: Reference, found: Measured, evaluations: int) -> None:
    x = found.samples[evaluations]
    stray = off(reference.data, x).numpy()
    spots = x.flatten(1).numpy()
    axis.scatter(spots[~stray][:, 0], spots[~stray][:, 1], s=1.2, color=LANDED, linewidths=0)
    axis.scatter(spots[stray][:, 0], spots[stray][:, 1], s=1.2, color=STRAY, linewidths=0)
    axis.set_xlabel(f"{stray.mean():.0%} off the data", fontsize=9, color=STRAY, labelpad=2)
    _bare(axis, FRAME)


def _curves(axis: Axes, found: Measured, floor: float) -> None:
    for solver in SOLVERS:
        own = [s for s in found.scores if s.solver == solver]
        label, style, colour = LOOKS[solver]
        axis.plot(
            [s.evaluations for s in own],
            [s.distance for s in own],
            style,
            markersize=3.5,
            linewidth=3.2 if solver == "euler" else 1.4,  # seen below DDIM, where the two are one
            color=colour,
            label=label,
        )
    axis.axhspan(0, floor, color=EVEN, linewidth=0, label="as near as the data to itself")
    axis.set(xscale="log", yscale="log", box_aspect=1, xlim=(4, 500))
    axis.set_xticks([5, 10, 50, 200], labels=["5", "10", "50", "200"])
    axis.set_yticks([0.01, 0.1], labels=["0.01", "0.1"])
    axis.minorticks_off()
    axis.set_xlabel("network evaluations", fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    drawing.open_frame(axis)


def _bare(axis: Axes, half: float) -> None:
    axis.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_color(FAINT)
