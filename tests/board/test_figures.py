"""Figures: sweeps hold everything else fixed, and every chart's table says what it draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.board import figures
from launcher.board.chart import Series, line_chart
from launcher.board.collect import Table, collect
from launcher.board.read import read_runs
from tests.board import fakes


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two seeds swept over guidance and steps, and a cheaper, worse row."""
    for seed in (0, 1):
        run = fakes.finished_run(tmp_path, "digits_dit", seed, 7.0 + seed)
        for g in (1.5, 2.0):
            scores = {"fd_digits": 6.0 + seed + g}
            fakes.add_record(run, 256_000, scores, protocol={"g": g})
        fakes.add_record(run, 256_000, {"fd_digits": 20.0}, protocol={"steps": 10}, nfe=10)
        both = {"g": 1.5, "steps": 10}
        fakes.add_record(run, 256_000, {"fd_digits": 30.0}, protocol=both, nfe=10)
    fakes.finished_run(tmp_path, "digits_class", 0, 9.0)
    tables = collect(*read_runs(tmp_path)).tables
    return next(table for table in tables if table.key == fakes.PROTOCOL.key)


def found(table: Table, words: str) -> figures.Figure:
    (one,) = [figure for figure in figures.of_table(table) if words in figure.title]
    return one


def test_sweep_over_guidance_has_points_of_the_tables_steps_alone(table: Table) -> None:
    body = found(table, "over guidance").body
    assert [line[0] for line in body] == ["1", "1.5", "2"]
    assert [line[1].split(" ± ")[0] for line in body] == ["7.5", "8", "8.5"]


def test_sweep_over_nfe_has_points_of_the_tables_guidance_alone(table: Table) -> None:
    body = found(table, "network evaluations").body
    assert [(line[0], line[1].split(" ± ")[0]) for line in body] == [("10", "20"), ("50", "7.5")]


def test_pareto_names_rows_and_marks_the_front(table: Table) -> None:
    lines = found(table, "GPU-hours").body
    assert {line[0] for line in lines} == {"digits_dit", "digits_class"}
    assert [line[0] for line in lines if line[-1] == "yes"][-1] == "digits_dit"


def test_log_axis_puts_equal_ratios_at_equal_distances() -> None:
    line = Series(name="s", points=((1.0, 1.0, None), (10.0, 2.0, None), (100.0, 3.0, None)))
    svg = line_chart([line], label="l", x_label="x", y_label="y", log_x=True)
    (road,) = [part for part in svg.split("\n") if part.startswith("<polyline")]
    xs = [float(pair.split(",")[0]) for pair in road.split('"')[3].split()]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_band_is_drawn_of_points_that_have_an_error() -> None:
    line = Series(name="s", points=((0.0, 1.0, 0.1), (1.0, 2.0, None), (2.0, 3.0, 0.2)), band=True)
    svg = line_chart([line], label="l", x_label="x", y_label="y")
    assert svg.count("<polygon") == 1 and 'class="bar' not in svg


@pytest.mark.parametrize(
    ("decoded", "level"),
    [((None, None), "floor 0.5"), ((3.0, None), "floor 0.5"), ((3.0, 4.0), "floor of latents 3")],
)
def test_level_of_a_chart_is_what_a_perfect_model_of_these_latents_would_reach(
    tmp_path: Path, decoded: tuple[float | None, float | None], level: str
) -> None:
    for experiment, value in zip(("digits_dit", "digits_class"), decoded, strict=True):
        run = fakes.make_run(tmp_path, experiment)
        fakes.add_snapshot(run, 256_000)
        more = {} if value is None else {"floor_reconstruction": value}
        fakes.add_record(run, 256_000, {"fd_digits": 9.0, **more})
    (table,) = collect(*read_runs(tmp_path)).tables
    assert found(table, "over training").legend[-1] == ("floor", level)
