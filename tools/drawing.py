"""Tables and pictures of reports: what each of them needs around what it shows."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from rich.table import Table


@contextmanager
def figure(
    file: Path, rows: int, columns: int, *, size: tuple[float, float], dpi: int = 110, **grid: Any
) -> Iterator[tuple[Figure, NDArray[Any]]]:
    """A figure of `size` inches and its axes (rows, columns), written to `file` where the block ends well."""
    from matplotlib.figure import Figure  # takes half a second, and most commands draw nothing

    made = Figure(figsize=size, layout="constrained")
    yield made, made.subplots(rows, columns, squeeze=False, **grid)
    file.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(file, dpi=dpi)


def open_frame(axis: Axes, *sides: str) -> None:
    """Hides the frame's sides, by default top and right."""
    axis.spines[list(sides or ("top", "right"))].set_visible(False)


def table(title: str, rows: Sequence[Mapping[str, str]], names: int = 1) -> Table:
    """Rows of the same columns, by their headings; the first `names` columns say what a row is of."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        made.add_column(name, justify="left" if number < names else "right")
    for row in rows:
        made.add_row(*row.values())
    return made


def colours(groups: int) -> NDArray[np.uint8]:
    """(groups, 3) RGB, neighbours in number apart in hue."""
    # by the golden ratio
    hues = [(k * 0.618 % 1, 0.8, 0.6 + 0.3 * (k % 2)) for k in range(groups)]
    return (255 * np.array([colorsys.hsv_to_rgb(*hue) for hue in hues])).astype(np.uint8)
