"""The comparison's arithmetic and picture, on results whose answer is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from launcher.compose import compose
from selfguide.sampling.grid import write_grid
from selfguide.spec.records import EvaluationRecord, grid_path
from selfguide.spec.run import RunFolder
from shards.errors import UserError
from tools.drawing import table
from tools.study.compare import COMPARISONS, Comparison, Result, Results, recorded
from tools.study.training import Trained

each = pytest.mark.parametrize("of", COMPARISONS.values(), ids=COMPARISONS)


def results(of: Comparison, folder: Path) -> Results:
    grid = folder / "grid.png"
    write_grid(grid, torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8))
    scores = {of.floor: (19.0, 21.0), of.ours: (7.0, 9.0), of.ceiling: (4.0, 6.0)}
    more = {"floor": 5.0, "confident": 0.9, "copy_rate": 0.0}

    def one(experiment: str, seed: int) -> Result:
        fd = scores[experiment][seed]
        return Result(experiment, seed, "id", {of.metric: fd, **more}, str(grid))

    return {experiment: [one(experiment, seed) for seed in (0, 1)] for experiment in scores}


@each
def test_the_gap_is_the_share_of_the_way_from_floor_to_ceiling(
    of: Comparison, tmp_path: Path
) -> None:
    made = results(of, tmp_path)
    summary = of.gap_closed(made)
    assert summary["gap_closed"] == pytest.approx((20 - 8) / (20 - 5))
    assert summary["sd"][of.ours] == pytest.approx(2**0.5)
    rows = [of.row(e, several, summary) for e, several in made.items()]
    assert [r[of.metric] for r in rows] == ["20.00 ± 1.41", "8.00 ± 1.41", "5.00 ± 1.41"]
    assert table("compared", rows).row_count == 3


@each
def test_the_picture_is_drawn(of: Comparison, tmp_path: Path) -> None:
    made = results(of, tmp_path)
    of.plot(made, of.gap_closed(made), tmp_path / "out" / "compare.png")
    assert Image.open(tmp_path / "out" / "compare.png").size[0] > 900


@each
def test_the_arms_of_a_comparison_train_its_experiments(of: Comparison) -> None:
    for experiment, arm in of.by_experiment.items():
        config = compose([*arm.settings, "cluster=local"])
        assert config.experiment == experiment
        assert config.evaluation.protocol == of.metric
        assert arm.label_free == (experiment != of.ceiling)


def test_a_runs_result_is_its_own_protocols_score_at_its_last_image(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "0123")
    config = compose(["experiment=emoji_dit", "cluster=local", "train.images=128_000"])
    trained = Trained(run, config)

    def write(images: int, key: str, score: float, **more: Any) -> None:
        EvaluationRecord(
            status="done", key=key, attempt=1, images=images, protocol_key=key,
            protocol={"metric": "fd_effnet"}, scores={"fd_effnet": score, "fd_effnet_se": 5.0}, **more,
        ).publish(run)  # fmt: skip
        images_of = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
        write_grid(grid_path(run, key, 1), images_of)

    run.evals.mkdir(parents=True)
    write(64_000, "img-000064000-a", 700.0)
    write(128_000, "img-000128000-z", 500.0, sweep="guided")
    with pytest.raises(UserError, match=r"at 128,000 images: give `python -m launcher.evaluate"):
        recorded("fd_effnet", trained)
    write(128_000, "img-000128000-a", 600.0)
    found = recorded("fd_effnet", trained)
    assert (found.experiment, found.seed, found.run) == ("emoji_dit", 0, "0123")
    assert found.scores == {"fd_effnet": 600.0, "fd_effnet_se": 5.0}
    assert Path(found.grid) == grid_path(run, "img-000128000-a", 1)
