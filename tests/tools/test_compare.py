"""The comparison's arithmetic and picture, on results whose answer is known."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from selfguide.sampling.grid import write_grid
from tools.drawing import table
from tools.study.compare import CEILING, FLOOR, OURS, Result, Results, gap_closed, plot, row


def results(folder: Path) -> Results:
    grid = folder / "grid.png"
    write_grid(grid, torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8))
    scores = {FLOOR: (19.0, 21.0), OURS: (7.0, 9.0), CEILING: (4.0, 6.0)}
    more = {"floor": 5.0, "confident": 0.9, "copy_rate": 0.0}

    def one(experiment: str, seed: int) -> Result:
        fd = scores[experiment][seed]
        return Result(experiment, seed, "id", {"fd_digits": fd, **more}, str(grid))

    return {experiment: [one(experiment, seed) for seed in (0, 1)] for experiment in scores}


def test_the_gap_is_the_share_of_the_way_from_floor_to_ceiling(tmp_path: Path) -> None:
    made = results(tmp_path)
    summary = gap_closed(made)
    assert summary["gap_closed"] == pytest.approx((20 - 8) / (20 - 5))
    assert summary["sd"][OURS] == pytest.approx(2**0.5)
    rows = [row(e, several, summary) for e, several in made.items()]
    assert [r["fd_digits"] for r in rows] == ["20.00 ± 1.41", "8.00 ± 1.41", "5.00 ± 1.41"]
    assert table("compared", rows).row_count == 3


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    made = results(tmp_path)
    plot(made, gap_closed(made), tmp_path / "out" / "compare.png")
    assert Image.open(tmp_path / "out" / "compare.png").size[0] > 900
