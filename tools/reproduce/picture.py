"""A finished table as a picture: each row's samples, what was published of it, and our score beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from launcher.submission import meant, prepare, resolve
from selfguide.spec.metrics import METRICS
from selfguide.spec.published import Row
from selfguide.spec.records import Protocol, grid_path, records
from shards.errors import UserError
from tools import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of a record's grid of 64 samples, the first line
_LINES = 4
_THEIRS, _OURS = "#b0b7c0", "#4c78a8"


@dataclass(frozen=True)
class Finished:
    """A row, the score that its run is ranked by, all scores of its last snapshot, and the file of its samples."""

    row: Row
    metric: str
    scores: Mapping[str, float]
    grid: Path


def finished(row: Row, words: Sequence[str]) -> Finished:
    """What the run has that is typed with these words.

    Raises:
        UserError: it has no score of its last snapshot.
    """
    # an earlier run keeps what it was scored by
    found = prepare(meant(resolve(words)))
    run, config = found.run, found.config
    images = config.train.images
    folder = run.snapshot(images)
    if not (folder / "MANIFEST.json").is_file():
        raise UserError(f"{run.root} has not been trained to its end")
    protocol = Protocol.of(config, run.snapshot_manifest(images))
    for each in records(run):
        if each.done and each.images == images and protocol.key in (each.protocol_key, each.asked):
            grid = grid_path(run, each.key, each.attempt)
            return Finished(row, config.evaluation.protocol, dict(each.scores), grid)
    raise UserError(f"{run.root} has no score of its final snapshot")


def draw(rows: Sequence[Finished], title: str, file: Path) -> None:
    """One line a row: sixteen samples, a bar of the first published number, and one of our score.

    Raises:
        UserError: no row has a score.
    """
    if not rows:
        raise UserError(f"--figure {file}: no row has a score of its last snapshot yet")
    size, widths = (13, 0.9 + 0.62 * len(rows)), [2.6, 1, 1]
    theirs = [next(iter(each.row.numbers.items()), None) for each in rows]
    ours = [each.scores[each.metric] for each in rows]
    with drawing.figure(file, len(rows), 3, size=size, width_ratios=widths) as (figure, axes):
        for (samples, left, right), each, published in zip(axes, rows, theirs, strict=True):
            image = Image.open(each.grid)
            top = image.crop((0, 0, image.width, image.height // _LINES))
            samples.imshow(top, cmap="gray", interpolation="nearest")
            samples.set(xticks=[], yticks=[])
            samples.set_ylabel(each.row.name, rotation=0, ha="right", va="center", fontsize=11)
            most = max(value for _, value in filter(None, theirs)) if any(theirs) else 1
            name, value = published or ("", None)
            _bar(left, METRICS[name].heading if name else "", value, most, _THEIRS)
            error = each.scores.get(f"{each.metric}_se")
            score, heading = each.scores[each.metric], METRICS[each.metric].heading
            _bar(right, heading, score, max(ours), _OURS, error)
            if "floor" in each.scores:
                right.axvline(each.scores["floor"], color="#333333", linestyle=":", linewidth=1)
        axes[0, 1].set_title("published", fontsize=12)
        floor = rows[0].scores.get("floor")
        real = f"; dotted: real images, {floor:.3g}" if floor is not None else ""
        axes[0, 2].set_title(f"here{real}", fontsize=12)
        figure.suptitle(title, fontsize=13)


def _bar(
    axis: Axes,
    heading: str,
    value: float | None,
    most: float,
    colour: str,
    error: float | None = None,
) -> None:
    """One number as a bar of a share of `most`, with its standard error and heading; words where there is none."""
    axis.barh([0], [value or 0], xerr=error, color=colour, height=0.6, capsize=3, ecolor="#333333")
    spread = f" ± {error:.2g}" if error else ""
    text = f"{heading} {value:.4g}{spread}" if value is not None else "not printed"
    axis.text((value or 0) + (error or 0) + most * 0.03, 0, text, va="center", fontsize=10)
    axis.set(xlim=(0, most * 1.9), ylim=(-0.6, 0.6), xticks=[], yticks=[])
    drawing.open_frame(axis, "top", "right", "bottom")
