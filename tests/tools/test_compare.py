"""The comparison's arithmetic and picture, on results whose answer is known."""

import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from selfguide.sampling.grid import write_grid
from shards.errors import UserError
from tools.compare import CEILING, FLOOR, OURS, Results, gap_closed, plot, row
from tools.drawing import table
from tools.grid import Result, run_all, train


def results(folder: Path) -> Results:
    grid = folder / "grid.png"
    write_grid(grid, torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8))
    scores = {FLOOR: (19.0, 21.0), OURS: (7.0, 9.0), CEILING: (4.0, 6.0)}
    more = {"floor": 5.0, "confident": 0.9, "copy_rate": 0.0}

    def one(experiment: str, seed: int) -> Result:
        fd = scores[experiment][seed]
        return Result(experiment, seed, "id", {"fd_digits": fd, **more}, str(grid))

    return run_all((FLOOR, OURS, CEILING), (0, 1), one)


def test_every_configuration_is_run_with_a_seed_before_the_next_seed() -> None:
    asked: list[tuple[str, int]] = []

    def one(config: str, seed: int) -> int:
        asked.append((config, seed))
        return seed + 10

    assert run_all(("a", "b"), (1, 2), one, "counting") == {"a": [11, 12], "b": [11, 12]}
    assert asked == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


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


def test_a_run_that_fails_ends_the_comparison_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def submit(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 3, stdout="")

    monkeypatch.setattr(subprocess, "run", submit)
    with pytest.raises(UserError, match="digits_dit with seed 2 ended with exit code 3"):
        train(("experiment=digits_dit", "train.images=4096"), 2, tmp_path)
    settings = {"seed=2", "cluster=local", f"runs={tmp_path}", "train.snapshot_every=4096"}
    assert settings < set(asked[0]) and asked[0][-2:] == ["follow=true", "--json"]
