"""Tables and pictures of reports: what each of them needs around what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
