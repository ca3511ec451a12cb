"""The comparison's arithmetic and picture, on results whose answer is known."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from selfguide.evaluation.grid import write_grid
from tools.compare import CEILING, FLOOR, OURS, Result, gap_closed, plot, table


def results(folder: Path) -> list[Result]:
    grid = folder / "grid.png"
    write_grid(grid, torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8))
    scores = {FLOOR: (19.0, 21.0), OURS: (7.0, 9.0), CEILING: (4.0, 6.0)}
    return [
        Result(
            e,
            seed,
            "id",
            {"fd_digits": fd, "floor": 5.0, "confident": 0.9, "copy_rate": 0.0},
            str(grid),
        )
        for e, both in scores.items()
        for seed, fd in enumerate(both)
    ]


def test_the_gap_is_the_share_of_the_way_from_floor_to_ceiling(tmp_path: Path) -> None:
    summary = gap_closed(results(tmp_path))
    assert summary["gap_closed"] == pytest.approx((20 - 8) / (20 - 5))
    assert summary["sd"][OURS] == pytest.approx(2**0.5)
    assert table(results(tmp_path), summary).row_count == 3


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    made = results(tmp_path)
    plot(made, gap_closed(made), tmp_path / "out" / "compare.png")
    assert Image.open(tmp_path / "out" / "compare.png").size[0] > 900
